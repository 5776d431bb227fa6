"""The strided pattern of the Sparse Transformer: the neighbourhood, and every l-th token (Child et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, memberships


@dataclass(frozen=True)
class OpenAIStrided(Free):
    """Edge iff ``|i − j| < near`` or ``(i − j) mod l = 0``: a near key, or one that is whole strides away.

    Source:
        Child et al. 2019 (https://arxiv.org/abs/1904.10509), section 4.2, with ``near = l`` and ``l`` near ``√n``. Where we
        differ:

        1. ``near`` is a setting of its own, so that there is a sparsity parameter: with ``near = l`` the number of pairs falls
           and rises again with ``l``, and is least, about ``2√(2n)`` keys a query, near ``l = √(n/2)``. ``near = stride`` is
           the paper's pattern.
        2. Every head has both parts (the paper's "merged" head); the paper also gives them to heads in turn.
        3. In bidirectional attention it looks to both sides; the paper is causal.
        4. The stride is counted over real tokens.
    """

    stride: int = 32  # l
    near: int = 32  # keys closer than this are seen

    sparsity_parameter: ClassVar[str | None] = "near"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        at_least(1, stride=self.stride, near=self.near)

    def layout(self, qk: QK, layer: int) -> Layout:
        """What is left of a position modulo the stride as buckets, and a window."""
        qk.one_text(type(self).__name__)
        ids = memberships(qk.q.shape[1], qk.positions % self.stride)
        return Layout(Buckets(ids, ids, self.stride), window=2 * self.near - 1)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
