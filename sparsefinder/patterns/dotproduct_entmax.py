"""Sparsefinder by inner product: the support of entmax among the projected queries and keys (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.support.cost import EveryPair


@dataclass(frozen=True)
class DotProductEntmax(EveryPair):
    """Edge iff ``p'_ij > 0`` where ``p'_i = entmax(K' q'_i / √R)`` at an α of its own: the less, the more edges.

    The published ``dotproduct_entmax``. Every pair is compared, so predicting is quadratic (in R, not D). With α = 1 every
    allowed pair is an edge.
    """

    entmax_alpha: float = 1.5  # from 1 (softmax, all pairs) to 2 (sparsemax)

    sparsity_parameter: ClassVar[str | None] = "entmax_alpha"
    needs: ClassVar[tuple[str, ...]] = ("projections",)

    def __post_init__(self) -> None:
        if not 1.0 <= self.entmax_alpha <= 2.0:
            raise UserError(f"entmax_alpha must lie between 1 (all pairs) and 2 (sparsemax), got {self.entmax_alpha}")

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        if self.entmax_alpha == 1.0:
            return qk.allowed.expand(-1, qk.q.shape[1], -1, -1)
        return Normalizer(self.entmax_alpha)(qk.scores()) > 0
