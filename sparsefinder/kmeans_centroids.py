"""The stage ``cluster``: k-means centroids of projected queries and keys, layer by layer and head by head.

A file of centroids is ``torch.save`` of a list over layers of tensors ``(H, runs, C, R)``, the form of the published
Sparsefinder. One scikit-learn `KMeans` is fitted for each layer and head on the projected queries *and* keys of the
training samples; of several runs the first starts from k-means++, the others at random. Where a layer has more of them than
``max_points``, every sample gives its share, drawn by the seed: memory does not grow with the number of samples.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.native import predictors as native
from sparsefinder.projections import Projections, load_projections
from sparsefinder.samples import Samples, training_samples
from sparsefinder.store import Store, UserError, progress
from sparsefinder.tensor_files import load_tensors, save_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Centroids:
    """Centroids of all layers, each ``(H, runs, C, R)`` float32."""

    layers: Sequence[Tensor]
    source: str = "memory"

    @property
    def clusters(self) -> int:
        """C, the same in every layer."""
        return self.layers[0].shape[2]

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """The centroids ``(H, runs, C, R)`` of a layer, checked against projected queries and keys ``(B, H, N, R)``."""
        if not 0 <= layer < len(self.layers):
            raise UserError(
                f"{self.source} has centroids of {len(self.layers)} layers, but layer {layer} was asked for: "
                "run stage=cluster on these projections"
            )
        centres = self.layers[layer]
        heads, _, _, size = centres.shape
        if (heads, size) != (qk.q.shape[1], qk.q.shape[-1]):
            raise UserError(
                f"{self.source} has centroids of {heads} heads and size R={size}, the projected queries have "
                f"{qk.q.shape[1]} heads and size R={qk.q.shape[-1]}: run stage=cluster on these projections"
            )
        return centres.to(qk.q.device)

    def save(self, path: Path | str) -> None:
        """Write the published form."""
        save_tensors([centres.cpu().contiguous() for centres in self.layers], path)


def load_centroids(path: Path | str) -> Centroids:
    """Read a file of centroids, ours or the published Sparsefinder's; anything else is a `UserError` in one line."""
    path = Path(path)
    content = load_tensors(path, "centroids")
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: centroids must be a list over layers of tensors (H, runs, C, R); run stage=cluster")
    content = [_means(layer) for layer in content]
    for index, centres in enumerate(content):
        if (
            not isinstance(centres, Tensor)
            or centres.ndim != 4
            or not centres.is_floating_point()
            or not centres.numel()
        ):
            raise UserError(f"{path}: layer {index} must be a floating point tensor (H, runs, C, R); run stage=cluster")
        if not torch.isfinite(centres.float()).all():
            raise UserError(f"{path}: layer {index} contains NaN or infinity; run stage=cluster again")
        if centres.shape[1:3] != content[0].shape[1:3]:
            raise UserError(
                f"{path}: layer {index} has {tuple(centres.shape[1:3])} runs and clusters, layer 0 has "
                f"{tuple(content[0].shape[1:3])}"
            )
    return Centroids([centres.float() for centres in content], str(path))


def _means(layer: Any) -> Any:
    """Of the published routing code, whose layers are state dicts, the centroids ``(H, C, R)`` as those of one run."""
    means = layer.get("kmeans.means") if isinstance(layer, dict) else None
    return means[:, None] if isinstance(means, Tensor) and means.ndim == 3 else layer


def nearest(x: Tensor, centres: Tensor, top: int) -> Tensor:
    """The ``top`` nearest centroids in each run, the nearest first: ``x (B, H, N, R)`` → ``(B, H, N, runs · top)`` int64.

    ``centres``: ``(H, runs, C, R)``; run ``u`` uses the ids ``u · C … u · C + C − 1``.
    """
    return native.nearest(x, centres, top) if native.works_on(x) else nearest_by_products(x, centres, top)


def nearest_by_products(x: Tensor, centres: Tensor, top: int) -> Tensor:
    """`nearest` by torch's operations, on any device."""
    runs, clusters, size = centres.shape[1:]
    first = torch.arange(runs, device=x.device)[:, None] * clusters
    found = []
    # head by head: the products of one fit the cache
    for tokens, own in zip(x.unbind(1), centres.to(x.dtype).flatten(1, 2), strict=True):
        # ‖x − c‖² = ‖x‖² − 2 (x·c − ‖c‖²/2): the nearest centroids are those of the largest bracket, one matrix product
        closeness = torch.addmm(own.square().sum(-1) / -2, tokens.reshape(-1, size), own.T)
        closeness = closeness.view(*tokens.shape[:2], runs, clusters)
        # the largest one alone is found twice as fast
        best = closeness.argmax(-1, keepdim=True) if top == 1 else closeness.topk(top, dim=-1).indices
        found.append((best + first).flatten(2))
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of the stage ``cluster``."""

    n_clusters: int = 16  # C
    runs: int = 1  # independent clusterings of each head
    block_size: int = 1  # tokens in a chunk; as in the projections
    max_points: int | None = 250_000  # queries and keys of a layer that are clustered; None: all
    max_iterations: int = 300  # of Lloyd's algorithm
    seed: int = 0
    jobs: int = -1  # heads fitted at the same time; -1: one for each core

    def __post_init__(self) -> None:
        for name in ("n_clusters", "runs", "block_size", "max_iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"cluster.{name} must be 1 or more, got {getattr(self, name)}")
        if self.max_points is not None and self.max_points < self.n_clusters:
            raise UserError(
                f"cluster.max_points={self.max_points} is less than n_clusters={self.n_clusters}; give more, or null for all"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk", "projections")


@dataclass(frozen=True)
class KeyClusterSettings:
    """How a stage clusters the keys alone, after it has learned the space in which it does."""

    n_clusters: int = 64
    max_iterations: int = 100  # of Lloyd's algorithm
    seed: int = 0
    jobs: int = -1  # heads clustered at the same time; -1: one for each core

    @property
    def clusters(self) -> ClusterSettings:
        """How the keys are clustered."""
        return ClusterSettings(
            n_clusters=self.n_clusters, max_iterations=self.max_iterations, seed=self.seed, jobs=self.jobs
        )


def run(settings: ClusterSettings, store: Store) -> None:
    """Make ``centroids`` from ``qk`` and ``projections``."""
    samples = training_samples(store)
    projections = load_projections(store.path("projections"))
    projections.check(*samples.shape)
    centroids = fit_centroids(samples, projections, settings)
    with store.writing("centroids") as path:
        centroids.save(path)


def fit_centroids(
    samples: Samples, projections: Projections, settings: ClusterSettings, sides: Sequence[str] = ("q", "k")
) -> Centroids:
    """One k-means per layer, head and run on all projected tokens, heads in parallel; ``sides``: queries, keys or both."""
    layers = samples.shape[0]
    found = [
        _fit_layer(_points(samples, projections, layer, settings, sides), settings)
        for layer in progress(range(layers), "cluster", layers)
    ]
    log.info("clustered %d layers × %d heads into %d clusters", layers, samples.shape[1], settings.n_clusters)
    return Centroids(found)


@torch.no_grad()
def _points(
    samples: Samples, projections: Projections, layer: int, settings: ClusterSettings, sides: Sequence[str] = ("q", "k")
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
            wanted = (before + count) * most // total - before * most // total  # shares that sum to `most` exactly
            before += count
            yield tokens if wanted == count else tokens[:, _drawn(count, wanted, settings.seed, index)]

    points: np.ndarray = torch.cat(list(of_each_sample()), dim=1).numpy()
    return points


def _drawn(count: int, wanted: int, seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _fit_layer(points: np.ndarray, settings: ClusterSettings) -> Tensor:
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


def _fit_head(points: np.ndarray, settings: ClusterSettings, run: int) -> np.ndarray:
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
