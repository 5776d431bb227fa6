"""Sparsefinder by clustering: tokens that share a near centroid in the projected space meet (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.kmeans_centroids import Centroids
from sparsefinder.store import UserError


@dataclass(frozen=True)
class KMeans:
    """Edge iff the query and the key share **any** of their ``top_clusters`` nearest centroids in any run of k-means."""

    top_clusters: int = 1  # centroids that a token belongs to
    centroids: Centroids | None = None  # attached by a `Configuration`

    dial: ClassVar[str | None] = "top_clusters"
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
            raise UserError("kmeans needs centroids: run stage=cluster first, or give a file with centroids=PATH")
        centres = self.centroids(qk, layer)
        return Layout(
            Buckets(self._nearest(qk.q, centres), self._nearest(qk.k, centres), centres.shape[1] * centres.shape[2])
        )

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)

    def _nearest(self, x: Tensor, centres: Tensor) -> Tensor:
        runs, clusters = centres.shape[1:3]
        # ‖x − c‖² = ‖x‖² − 2 (x·c − ‖c‖²/2): the nearest centroids are those of the largest bracket, one matrix product
        closeness = x[:, :, None] @ centres.transpose(-1, -2)[None] - centres.square().sum(-1)[:, :, None] / 2
        nearest = closeness.topk(self.top_clusters, dim=-1).indices  # (B, H, runs, N, top)
        first = torch.arange(runs, device=x.device)[:, None, None] * clusters
        return (nearest + first).movedim(2, 3).flatten(3)
