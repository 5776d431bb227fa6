"""Sparsefinder by clustering: tokens that share a near centroid in the projected space meet (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.predictors.centroids import Centroids, nearest
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class KMeans:
    """Edge iff the query and the key share **any** of their ``top_clusters`` nearest centroids in any run of k-means."""

    top_clusters: int = 1  # centroids that a token belongs to
    centroids: Centroids | None = None  # attached by a `Configuration`

    sparsity_parameter: ClassVar[str | None] = "top_clusters"
    needs: ClassVar[tuple[str, ...]] = ("projections", "centroids")

    def __post_init__(self) -> None:
        if self.top_clusters < 1:
            raise UserError(f"top_clusters must be 1 or more, got {self.top_clusters}")
        if self.centroids is not None and self.top_clusters > self.centroids.clusters:
            raise UserError(
                f"top_clusters={self.top_clusters}, but {self.centroids.source} has {self.centroids.clusters} clusters: "
                "choose fewer, or run stage=cluster with a larger n_clusters"
            )

    def layout(self, qk: QK, layer: int) -> Layout:
        """Clusters as buckets: run ``u`` uses the ids ``u · C … u · C + C − 1``."""
        if self.centroids is None:
            raise missing("kmeans", "centroids")
        centres = self.centroids(qk, layer)
        q_ids, k_ids = (nearest(x, centres, self.top_clusters) for x in (qk.q, qk.k))
        return Layout(Buckets(q_ids, k_ids, centres.shape[1] * centres.shape[2]))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)
