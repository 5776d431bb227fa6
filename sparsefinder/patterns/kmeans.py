"""Sparsefinder by clustering: tokens that share a near centroid in the projected space meet (Treviso et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.nearest_clusters import nearest
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class KMeans:
    """Edge iff the query and the key share **any** of their ``top_clusters`` nearest centroids in any run of k-means."""

    top_clusters: int = 1  # centroids that a token belongs to
    # whether each other cluster is one entry among a query's scores (see `Layout`): top_clusters=1 and one run
    tail: bool = field(default=False, kw_only=True)
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
        return Layout(Buckets(q_ids, k_ids, centres.shape[1] * centres.shape[2]), tail=self.tail)

    def layout_of_heads(self, qk: QK, layer: int, values: Sequence[int]) -> Layout:
        """The same with so many clusters for each head, ``H`` of them: as fast as with the most of them."""
        most = replace(self, top_clusters=max(values)).layout(qk, layer).buckets
        assert most is not None
        top = torch.tensor([replace(self, top_clusters=value).top_clusters for value in values])[:, None, None]
        of_a_run = torch.arange(most.q_ids.shape[-1]) % max(values)  # the nearest of a run come first
        spare = (of_a_run >= top).to(qk.q.device)
        q_ids, k_ids = (ids.masked_fill(spare, -1) for ids in (most.q_ids, most.k_ids))
        return Layout(Buckets(q_ids, k_ids, most.count), tail=self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """``2 · C · R``: each query and each key with each centroid of all runs."""
        if self.centroids is None:
            raise missing("kmeans", "centroids")
        return 2.0 * self.centroids.count * size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Half of it: each key with each centroid."""
        return self.cost(tokens, size) / 2

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)
