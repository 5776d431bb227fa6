"""The stage ``cluster_online``: centroids of the Routing Transformer's online k-means, on Sparsefinder's projected vectors.

Queries and keys of a sample, scaled to unit length, each go to the centroid of largest cosine; a centroid then moves towards the
direction of what came to it, by a running average over samples (Roy et al. 2021, https://arxiv.org/abs/2003.05997, section 4.1).
Random tokens of the first samples, moved by a few rounds of spherical k-means among these, are where it starts. A file has the
form of `kmeans_centroids`, with one run; those of the published ``routing_trained`` are read too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError, check_counts
from sparsefinder.patterns.support.kmeans_per_sentence import lloyd, means_of, nearest
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import Projections, load_projections
from sparsefinder.storage.held_out import training_samples
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

_POOL = 16  # tokens for each centroid that the start looks at


@dataclass(frozen=True)
class OnlineSettings:
    """Settings of the stage ``cluster_online``."""

    n_clusters: int = 16  # C
    decay: float = 0.99  # of the running average: what a centroid keeps of itself when a sample moves it
    epochs: int = 10  # times that the samples are gone through
    start_iterations: int = 10  # rounds of spherical k-means before that, on the first samples
    block_size: int = 1  # tokens in a chunk; as in the projections
    seed: int = 0
    # heads that share their keys are learned for as one, with the mean of their queries
    share_in_group: bool = False

    def __post_init__(self) -> None:
        check_counts("cluster_online", self, "n_clusters", "epochs", "block_size")
        if self.start_iterations < 0:
            raise UserError(f"cluster_online.start_iterations must be 0 or more, got {self.start_iterations}")
        if not 0 <= self.decay < 1:
            raise UserError(f"cluster_online.decay must be at least 0 and less than 1, got {self.decay}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk", "projections")


def run(settings: OnlineSettings, store: Store) -> None:
    """Make ``online_centroids`` from ``qk`` and ``projections``."""
    samples = training_samples(store, settings.share_in_group)
    projections = load_projections(store.path("projections"))
    projections.check(*samples.shape)
    centroids = fit_online(samples, projections, settings)
    with store.writing("online_centroids") as path:
        centroids.save(path)


@torch.no_grad()
def fit_online(samples: Samples, projections: Projections, settings: OnlineSettings) -> Centroids:
    """Centroids ``(H, 1, C, R)`` of unit length for each layer; the tokens of one layer are in memory at a time."""
    layers = samples.shape[0]
    centroids = [
        train_online(list(_directions(samples, projections, layer, settings.block_size)), settings, layer)
        for layer in progress(range(layers), "cluster_online", layers)
    ]
    log.info("moved %d centroids of %d layers × %d heads", settings.n_clusters, layers, samples.shape[1])
    return Centroids(centroids)


def train_online(points: Sequence[Tensor], settings: OnlineSettings, layer: int = 0) -> Tensor:
    """Centroids ``(H, 1, C, R)`` of samples of unit vectors ``(1, H, M, R)``; drawn by the seed and the layer."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer)
    centres = _start(points, settings, generator)
    for _ in range(settings.epochs):
        for index in torch.randperm(len(points), generator=generator).tolist():
            centres = moved(centres, points[index], settings.decay)
    return centres[0][:, None]


def moved(centres: Tensor, points: Tensor, decay: float) -> Tensor:
    """``centres (1, H, C, R)`` after one sample ``(1, H, M, R)``; one to which nothing comes stays where it is."""
    means, counts = means_of(points, _all(points), nearest(points, centres), centres.shape[2])
    average = decay * centres + (1 - decay) * F.normalize(means, dim=-1)
    return torch.where(counts > 0, F.normalize(average, dim=-1), centres)


def _start(points: Sequence[Tensor], settings: OnlineSettings, generator: torch.Generator) -> Tensor:
    """Tokens of the first samples that have enough, drawn, and moved by spherical k-means among them."""
    clusters, pool, count = settings.n_clusters, list[Tensor](), 0
    for sample in points:
        pool.append(sample)
        count += sample.shape[2]
        if count >= _POOL * clusters:
            break
    if count < clusters:
        raise UserError(
            f"n_clusters={clusters}, but there are only {count} projected queries and keys to cluster: choose fewer clusters or "
            "extract more samples"
        )
    together = torch.cat(pool, dim=2)
    drawn = torch.randperm(count, generator=generator)[:clusters]
    return lloyd(together, _all(together), together[:, :, drawn], settings.start_iterations, spherical=True)


def _directions(samples: Samples, projections: Projections, layer: int, block_size: int) -> Iterator[Tensor]:
    """Of each sample the projected queries and keys ``(1, H, M, R)``, at unit length."""
    for index in range(len(samples)):
        projected = projections(samples.layer(index, layer), layer)
        chunks = projected.in_blocks(block_size) if block_size > 1 else projected
        yield F.normalize(torch.cat([chunks.q, chunks.k], dim=2), dim=-1)


def _all(points: Tensor) -> Tensor:
    return torch.ones(1, points.shape[2], dtype=torch.bool)
