"""k-means of projected queries and keys, layer by layer and head by head.

Of several runs the first starts from k-means++, the others at random. Where a layer has more tokens than ``max_points``, every
sample gives its share, drawn by the seed: memory does not grow with the number of samples.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.fit_centroid_tree import nested_centroids
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import progress

log = logging.getLogger(__name__)

_KEYS_EACH = 4  # keys that a cluster of a tree should have at least, in the mean


@dataclass(frozen=True)
class Clustering:
    """How vectors are clustered."""

    n_clusters: int = 16  # C
    runs: int = 1  # independent clusterings of each head
    block_size: int = 1  # tokens in a chunk; as in the projections
    max_points: int | None = 250_000  # queries and keys of a layer that are clustered; None: all
    max_iterations: int = 300  # of Lloyd's algorithm
    seed: int = 0
    jobs: int = -1  # heads fitted at the same time; -1: one for each core


@dataclass(frozen=True)
class KeyClusterSettings:
    """How a stage clusters the keys, and the keys only, after it has learned the space in which it does."""

    n_clusters: int = 1024  # of keys, on the finest level of a tree
    # clusters on its coarsest level at least, each level has twice as many as the one above; fewer lose recall in short sentences
    coarsest: int = 64
    max_iterations: int = 100  # of Lloyd's algorithm
    seed: int = 0
    jobs: int = -1  # heads clustered at the same time; -1: one for each core

    @property
    def sizes(self) -> tuple[int, ...]:
        """Clusters on each level, the coarsest first."""
        sizes = [self.n_clusters]
        while sizes[0] % 2 == 0 and sizes[0] >= 2 * self.coarsest:
            sizes.insert(0, sizes[0] // 2)
        return tuple(sizes)

    @property
    def clusters(self) -> Clustering:
        """How the keys are clustered on the coarsest level."""
        return Clustering(n_clusters=self.sizes[0], max_iterations=self.max_iterations, seed=self.seed, jobs=self.jobs)


def fit_centroids(
    samples: Samples, projections: Projections, settings: Clustering, sides: Sequence[str] = ("q", "k")
) -> Centroids:
    """One k-means per layer, head and run on all projected tokens, heads in parallel.

    Args:
        samples: Queries and keys, ``(n, D)`` for each head.
        projections: Into the space that is clustered.
        settings: Number of clusters and runs, and how they are fitted.
        sides: ``("q",)``, ``("k",)`` or both: what is clustered.

    Returns:
        Centroids ``(H, runs, C, R)`` of each layer.
    """
    layers = samples.shape[0]
    centroids = [
        _fit_layer(_points(samples, projections, layer, settings, sides), settings)
        for layer in progress(range(layers), "cluster", layers)
    ]
    log.info("clustered %d layers × %d heads into %d clusters", layers, samples.shape[1], settings.n_clusters)
    return Centroids(centroids)


def fit_tree(samples: Samples, projections: Projections, settings: KeyClusterSettings) -> Centroids:
    """A tree of clusters of the projected keys, for each layer and head.

    Args:
        samples: Keys, ``(n, D)`` for each head.
        projections: Into the space that is clustered.
        settings: Number of clusters and levels. Levels with more clusters than a quarter of the keys are left out.

    Returns:
        Centroids ``(H, 1, C, R)`` of each layer on the finest level, and those above it.
    """
    layers, clustering = samples.shape[0], settings.clusters
    keys = min(sum(samples.lengths), clustering.max_points or math.inf)
    sizes = [size for size in settings.sizes if size * _KEYS_EACH <= keys or size == settings.sizes[0]]
    if len(sizes) < len(settings.sizes):
        log.info("%d keys are few: %d clusters on the finest level instead of %d", keys, sizes[-1], settings.n_clusters)
    levels: list[list[Tensor]] = [[] for _ in sizes]
    for layer in progress(range(layers), "cluster", layers):
        points = _points(samples, projections, layer, clustering, sides=("k",))
        for level, centres in zip(levels, _fit_levels(points, sizes, clustering), strict=True):
            level.append(centres)
    log.info("clustered %d layers × %d heads into %s clusters", layers, samples.shape[1], ", ".join(map(str, sizes)))
    coarser = tuple(Centroids(level) for level in levels[:-1])
    return Centroids(levels[-1], coarser=coarser)


def _fit_levels(points: np.ndarray, sizes: Sequence[int], settings: Clustering) -> list[Tensor]:
    from joblib import Parallel, delayed

    coarsest = _fit_layer(points, settings)[:, 0]
    rest = (sizes, settings.max_iterations, settings.seed)
    heads = Parallel(n_jobs=settings.jobs, prefer="threads")(
        delayed(_fit_nested)(torch.from_numpy(head), top, *rest) for head, top in zip(points, coarsest, strict=True)
    )
    return [torch.stack(level)[:, None] for level in zip(*heads, strict=True)]


def _fit_nested(points: Tensor, coarsest: Tensor, sizes: Sequence[int], iterations: int, seed: int) -> list[Tensor]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):  # as in `_fit_head`: heads run side by side, and twice as many threads would wait
        return nested_centroids(points, coarsest, sizes, iterations, seed)


@torch.no_grad()
def _points(
    samples: Samples, projections: Projections, layer: int, settings: Clustering, sides: Sequence[str] = ("q", "k")
) -> np.ndarray:
    """``(H, points, R)``: the projected tokens of the layer, or ``max_points`` of them."""
    size = settings.block_size
    tokens = zip(*({"q": samples.query_lengths, "k": samples.lengths}[side] for side in sides), strict=True)
    counts = [sum(-(-length // size) for length in lengths) for lengths in tokens]
    total = sum(counts)
    most = min(total, settings.max_points or total)

    def of_each_sample() -> Iterator[Tensor]:
        before = 0
        for index, count in enumerate(counts):
            projected = projections(samples.layer(index, layer), layer)
            chunks = projected.in_blocks(size) if size > 1 else projected
            tokens = torch.cat([getattr(chunks, side)[0] for side in sides], dim=1)
            wanted = (before + count) * most // total - before * most // total  # parts that sum to `most` exactly
            before += count
            yield tokens if wanted == count else tokens[:, _drawn(count, wanted, settings.seed, index)]

    points: np.ndarray = torch.cat(list(of_each_sample()), dim=1).numpy()
    return points


def _drawn(count: int, wanted: int, seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _fit_layer(points: np.ndarray, settings: Clustering) -> Tensor:
    from joblib import (
        Parallel,
        delayed,
    )  # here and below: scikit-learn takes a second to import, and patterns need none of it

    if points.shape[1] < settings.n_clusters:
        raise UserError(
            f"n_clusters={settings.n_clusters}, but there are only {points.shape[1]} projected queries and keys to cluster: "
            "choose fewer clusters or extract more samples"
        )
    centres = Parallel(n_jobs=settings.jobs, prefer="threads")(
        delayed(_fit_head)(head, settings, run) for head in points for run in range(settings.runs)
    )
    stacked = np.stack(list(centres)).reshape(points.shape[0], settings.runs, settings.n_clusters, -1)
    return torch.from_numpy(stacked).float()


def _fit_head(points: np.ndarray, settings: Clustering, run: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(
        n_clusters=settings.n_clusters,
        init="k-means++" if run == 0 else "random",
        n_init=1,
        max_iter=settings.max_iterations,
        random_state=settings.seed + run,
    )
    # one OpenMP thread for each head (a limit is the calling thread's own): heads run side by side, and a sum has one
    # order, so a seed has one result
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # fewer distinct points than clusters: some centroids coincide, and their ties go to the first one
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres: np.ndarray = kmeans.fit(points).cluster_centers_
    return centres
