"""The support of dense entmax attention as lists, without a matrix of N × N: in C++ on a CPU, in tiles elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsefinder.executors.blocks.dense_tiles import TilesExecutor
from sparsefinder.executors.choose_executor import AUTO, Executor, choose
from sparsefinder.executors.native.dense import NativeDenseExecutor
from sparsefinder.executors.workload import Pairs, Work
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.numerics.padding import at_least_float32


@dataclass(frozen=True)
class Support:
    """Pairs of positive probability, sorted by example, head, query and key.

    ``counts``: ``(B, H, N)`` int64, how many each query has; ``keys``: ``(P,)`` int64; ``probabilities``: ``(P,)``.
    """

    counts: Tensor
    keys: Tensor
    probabilities: Tensor

    @property
    def rows(self) -> Tensor:
        """The query of each pair, counted over examples and heads: ``(P,)`` int64."""
        return torch.arange(self.counts.numel(), device=self.keys.device).repeat_interleave(self.counts.flatten())


class SupportExecutor(Executor, Protocol):
    """What lists the support."""

    def support(
        self, q: Tensor, k: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `Support` is made of."""


_SPARSE: tuple[SupportExecutor, ...] = (NativeDenseExecutor(), TilesExecutor())
_SOFTMAX: tuple[SupportExecutor, ...] = (TilesExecutor(),)


@torch.no_grad()
def support(qk: QK, alpha: float | Tensor) -> Support:
    """The pairs ``p_ij > 0`` under α-entmax of ``q·k / √D``; under softmax, all that are allowed.

    ``alpha``: a number, or ``(H,)`` with one for each head, each 1 < α ≤ 2.
    """
    normalizer = PerHead(alpha) if isinstance(alpha, Tensor) else Normalizer(alpha)
    q, k = at_least_float32(qk.q), at_least_float32(qk.k)
    executor = choose(_SPARSE if normalizer.sparse else _SOFTMAX, AUTO, Work.of(q, k))
    return Support(
        *executor.support(q, k, Pairs(qk.queries_valid, qk.valid, ahead=0 if qk.causal else None), normalizer)
    )
