"""Oracle with a budget for each head: its pairs of largest score, however many a query gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError, one_of
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.support.cost import EveryPair
from sparsefinder.patterns.support.ranking import best, share_of

ORDERS = ("score", "margin")


@dataclass(frozen=True)
class OracleHead(EveryPair):
    """Edge iff ``z_ij`` is among the ``⌈share · n⌉`` largest of its head, which has ``n`` allowed pairs: one threshold per head.

    ========  ==========================================================================
    score     ``z_ij = q_i·k_j``, what one threshold on an inner product can reach
    margin    ``z_ij = s_ij − max_j s_ij + ln_α(max_j p_ij)`` with ``s_ij = q_i·k_j / √D``
    ========  ==========================================================================

    ``ln_α(p) = (p^{α−1} − 1) / (α − 1)``, the logarithm for ``α = 1``, so that ``margin`` is ``s_ij`` up to a shift of each row,
    and the gold pairs are those above ``−1 / (α − 1)``: no graph of so many pairs recalls more gold edges. A shift of a row
    changes ``score`` and no probability, so ``score`` bounds only methods that compare such products between queries. Both
    need every score, so they save no work. Each sentence has a budget of its own.
    """

    share: float = 0.2  # of the allowed pairs
    by: str = "score"  # score or margin
    alpha: float = 1.5  # of the entmax in margin; 1 is softmax

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()
    each_query_alone: ClassVar[bool] = False  # its pairs compete with those of other queries
    # in causal attention
    reads_ahead: ClassVar[str] = "one threshold is taken over all pairs of the sentence"

    def __post_init__(self) -> None:
        Normalizer(self.alpha)
        if not 0 <= self.share <= 1:
            raise UserError(f"share must lie between 0 and 1, got {self.share}")
        if self.by not in ORDERS:
            raise UserError(f"by={self.by} is unknown; {one_of(ORDERS, self.by)}")

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        scores = qk.scores()
        if self.by == "margin":
            scores = self._margins(scores)
        pairs = qk.allowed.sum((-2, -1)).unsqueeze(-1)  # (B, 1, 1)
        return best(scores.flatten(2), share_of(pairs, self.share)).view(scores.shape) & qk.allowed

    def _margins(self, scores: Tensor) -> Tensor:
        scores = scores.double()
        largest = Normalizer(self.alpha)(scores).amax(-1, keepdim=True)
        power = self.alpha - 1.0
        logarithm = largest.log() if power == 0 else (largest**power - 1.0) / power
        peak = scores.amax(-1, keepdim=True)
        # a query without an allowed key has no peak, and no pair that could be kept
        return (scores - peak + logarithm).nan_to_num(nan=-torch.inf)
