"""Oracle with a budget for each query: its keys of largest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.patterns.support.cost import EveryPair
from sparsefinder.patterns.support.ranking import best, share_of


@dataclass(frozen=True)
class OracleTopK(EveryPair):
    """Edge iff ``q_i·k_j`` is among the ``⌈share · n_i⌉`` largest of query ``i``, which has ``n_i`` allowed keys.

    The bound of every method with a fixed number of keys for each query. It needs every score, so it saves no work. Of two equal
    scores the earlier key counts as larger.
    """

    share: float = 0.2  # of the allowed keys

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"share must lie between 0 and 1, got {self.share}")

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return best(qk.scores(), share_of(qk.allowed.sum(-1, keepdim=True), self.share)) & qk.allowed
