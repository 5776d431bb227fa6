"""Balanced clusters by distance: Sparsefinder's centroids take their nearest queries and keys (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.ranking import as_ids, check_share, first_share, vectors
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class NearestRouting:
    """`LearnedRouting` by distance: a centroid takes the ``⌈share · n⌉`` queries, and as many keys, of smallest ``‖x − c‖``.

    With ``block_size`` these are chunks of tokens, as in the published ``extender_rhf``. In causal attention nothing reads the
    future.
    """

    share: float = 0.1  # of the queries and of the keys, for each centroid
    centroids: Centroids | None = None  # attached by a `Configuration`

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ("projections", "centroids")

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Centroids as buckets: run ``u`` uses the ids ``u · C … u · C + C − 1``."""
        if self.centroids is None:
            raise missing("routing_nearest", "centroids")
        centres = self.centroids(qk, layer).flatten(1, 2)

        def ids(x: Tensor) -> Tensor:
            # −‖x − c‖² without ‖c‖², which is the same for all tokens that a centroid chooses from
            closeness = 2 * x @ centres.to(x.dtype).mT - x.square().sum(-1, keepdim=True)
            return as_ids(first_share(closeness, qk, self.share))

        q, k = vectors(qk)
        return Layout(Buckets(ids(q), ids(k), centres.shape[1]))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)
