"""The stage ``cluster``: k-means centroids of projected queries and keys, layer by layer and head by head.

A file of centroids is ``torch.save`` of a list over layers of tensors ``(H, runs, C, R)``, the form of the published
Sparsefinder. One scikit-learn `KMeans` is fitted for each layer and head on the projected queries *and* keys of the
training samples; of several runs the first starts from k-means++, the others at random. Where a layer has more of them than
``max_points``, every sample gives its share, drawn by the seed: memory does not grow with the number of samples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sparsefinder.errors import UserError, check_counts
from sparsefinder.predictors.fit_centroids import Clustering, fit_centroids
from sparsefinder.predictors.projections import load_projections
from sparsefinder.storage.held_out import training_samples
from sparsefinder.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterSettings(Clustering):
    """Settings of the stage ``cluster``."""

    # heads that share their keys are learned for as one, with the mean of their queries
    share_in_group: bool = False

    def __post_init__(self) -> None:
        check_counts("cluster", self, "n_clusters", "runs", "block_size", "max_iterations")
        if self.max_points is not None and self.max_points < self.n_clusters:
            raise UserError(
                f"cluster.max_points={self.max_points} is less than n_clusters={self.n_clusters}; give more, or null for all"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk", "projections")


def run(settings: ClusterSettings, store: Store) -> None:
    """Make ``centroids`` from ``qk`` and ``projections``."""
    samples = training_samples(store, settings.share_in_group)
    projections = load_projections(store.path("projections"))
    projections.check(*samples.shape)
    centroids = fit_centroids(samples, projections, settings)
    with store.writing("centroids") as path:
        centroids.save(path)
