"""Balanced clusters around the centroids that the Routing Transformer's own online k-means has trained (Roy et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from sparsefinder.graphs import QK, Layout
from sparsefinder.patterns.routing import taken
from sparsefinder.patterns.support.ranking import check_share, vectors
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class TrainedRouting:
    """`Routing` to centroids that the stage ``cluster_online`` moved by a running average, in Sparsefinder's projected space.

    A centroid takes the ``⌈share · n⌉`` queries and as many keys of largest cosine with it. In causal attention nothing reads
    the future.
    """

    share: float = 0.1  # of the queries and of the keys, for each centroid
    online_centroids: Centroids | None = None  # attached by a `Configuration`

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ("projections", "online_centroids")

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Centroids as buckets: a token is in those that take it."""
        if self.online_centroids is None:
            raise missing("routing_trained", "online_centroids")
        centres = F.normalize(self.online_centroids(qk, layer).flatten(1, 2), dim=-1)
        q, k = (F.normalize(x, dim=-1) for x in vectors(qk))
        return taken(q, k, centres.to(q.dtype), qk, self.share)

    def cost(self, tokens: int, size: int) -> float:
        """``2 · C · R``: queries and keys with each centroid."""
        if self.online_centroids is None:
            raise missing("routing_trained", "online_centroids")
        return 2.0 * self.online_centroids.count * size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Half of it: each key with each centroid."""
        return self.cost(tokens, size) / 2

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)
