"""k-means of projected queries and keys, layer by layer and head by head.

Of several runs the first starts from k-means++, the others at random. Where a layer has more tokens than ``max_points``, every
sample gives its share, drawn by the seed: memory does not grow with the number of samples.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import progress

log = logging.getLogger(__name__)


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

    n_clusters: int = 64  # of keys
    max_iterations: int = 100  # of Lloyd's algorithm
    seed: int = 0
    jobs: int = -1  # heads clustered at the same time; -1: one for each core

    @property
    def clusters(self) -> Clustering:
        """How the keys are clustered."""
        return Clustering(
            n_clusters=self.n_clusters, max_iterations=self.max_iterations, seed=self.seed, jobs=self.jobs
        )


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


@torch.no_grad()
def _points(
    samples: Samples, projections: Projections, layer: int, settings: Clustering, sides: Sequence[str] = ("q", "k")
) -> np.ndarray:
    """``(H, points, R)``: the projected tokens of the layer, or ``max_points`` of them."""
    size = settings.block_size
    counts = [len(sides) * -(-length // size) for length in samples.lengths]
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
