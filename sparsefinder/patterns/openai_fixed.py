"""The fixed pattern of the Sparse Transformer: blocks, and the last columns of each block for everyone (Child et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, memberships


@dataclass(frozen=True)
class OpenAIFixed(Free):
    """Edge iff ``⌊i / l⌋ = ⌊j / l⌋`` or ``j mod l ≥ l − c``: the same block, or one of the last ``c`` keys of any block.

    Source:
        Child et al. 2019 (https://arxiv.org/abs/1904.10509), section 4.2, where ``l`` is near ``√n``. Where we differ:

        1. Every head has both parts (the paper's "merged" head), and the same columns; the paper also gives the parts to heads
           in turn, and the heads of its larger models columns of their own.
        2. In bidirectional attention the columns of later blocks are seen too; the paper is causal. (The published comparison,
           by way of fairseq, sees one key beyond its block and ``c + 1`` columns; the formula above is the paper's.)
        3. Positions are counted over real tokens; a last block that is too short to have its columns has none.
    """

    block: int = 8  # l, tokens in a block
    columns: int = 1  # c, from 0 (blocks only) to l (every pair)

    sparsity_parameter: ClassVar[str | None] = "columns"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        at_least(1, block=self.block)
        if not 0 <= self.columns <= self.block:
            raise UserError(f"columns must lie between 0 and block={self.block}, got {self.columns}")

    def layout(self, qk: QK, layer: int) -> Layout:
        """Blocks as buckets, and one bucket more that all queries and the keys in the columns are in."""
        qk.one_text(type(self).__name__)
        block, within = qk.positions // self.block, qk.positions % self.block
        shared = qk.valid.shape[1] // self.block + 1
        is_column = within >= self.block - self.columns
        q_ids = memberships(qk.q.shape[1], block, torch.full_like(block, shared))
        k_ids = memberships(qk.q.shape[1], block, torch.where(is_column, shared, -1))
        return Layout(Buckets(q_ids, k_ids, shared + 1))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
