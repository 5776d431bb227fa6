"""Local attention in blocks: a sentence is cut into blocks, and each attends to itself (Liu et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, memberships


@dataclass(frozen=True)
class BlockLocal(Free):
    """Edge iff ``⌊i / b⌋ = ⌊j / b⌋``: both tokens are in the same block of ``b``.

    Positions are counted over real tokens, and the last block of a sentence may be shorter.

    Source:
        Liu et al. 2018 (https://arxiv.org/abs/1801.10198), local attention.
    """

    block: int = 16  # b, tokens in a block

    sparsity_parameter: ClassVar[str | None] = "block"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        at_least(1, block=self.block)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Blocks as buckets."""
        qk.one_text(type(self).__name__)
        ids = memberships(qk.q.shape[1], qk.positions // self.block)
        return Layout(Buckets(ids, ids, qk.valid.shape[1] // self.block + 1))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
