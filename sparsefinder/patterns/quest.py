"""Bounds of key blocks: a query takes the blocks that could hold its largest scores (Tang et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK, Layout
from sparsefinder.patterns.support.key_blocks import TokenBlocks
from sparsefinder.patterns.support.ranking import check_counts, check_share, vectors


@dataclass(frozen=True)
class Quest:
    """Edge iff the key's block is among the ``⌈share · blocks⌉`` of largest ``u_iJ = Σ_d max(q_id · low_Jd, q_id · high_Jd)``.

    ``low_J`` and ``high_J`` are the smallest and largest value of each coordinate over the keys of block ``J``, so ``u_iJ ≥
    q_i·k_j`` for each of its keys. Where attention is causal, a query chooses among the blocks up to its own, a share of
    those, and of its own block only the keys that it sees make the bound: a choice never reads the future.

    Source:
        Tang, Zhao, Zhu, Xiao, Kasikci, Han (2024), Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference,
        https://arxiv.org/abs/2406.10774. Where we differ:

        1. For every query of a sentence, not for the one that is being generated.
        2. A share of the blocks instead of a number of tokens.
        3. The paper keeps the first two layers dense, here every layer is predicted.
        4. Blocks of 4 keys by default, not 16, since sentences are a hundred times shorter.
    """

    share: float = 0.2  # of the blocks that there are (causal: up to the query's own)
    size: int = 4  # keys in a block
    # whether each block that a query does not take is one entry among its scores: see `Layout`
    tail: bool = field(default=False, kw_only=True)

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_counts(size=self.size)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Key blocks as buckets: a query is in those that it takes, a key in its own."""
        blocks = TokenBlocks.cut(qk, self.size)
        bounds, of_own_block = self._bounds(qk, blocks)
        return blocks.layout(blocks.best(blocks.visible(bounds, of_own_block), self.share), self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """``2 · D`` for each block of keys."""
        return 2.0 * size * -(-tokens // self.size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _bounds(self, qk: QK, blocks: TokenBlocks) -> tuple[Tensor, Tensor | None]:
        """``u``, ``(B, H, N, blocks)``, and where causal that of the own block so far, ``(B, H, N)``."""
        q, k = vectors(qk)
        # the larger of two products is that with `high` where q is positive, with `low` where it is negative
        up, down = q.clamp_min(0.0), q.clamp_max(0.0)
        lows, highs = blocks.pack(k, math.inf), blocks.pack(k, -math.inf)
        there = blocks.filled.any(-1)[:, None, :, None]
        low, high = (x.masked_fill(~there, 0.0) for x in (lows.amin(3), highs.amax(3)))
        bounds = up @ high.transpose(-1, -2) + down @ low.transpose(-1, -2)
        if not qk.causal:
            return bounds, None
        low, high = blocks.unpack(lows.cummin(3).values), blocks.unpack(highs.cummax(3).values)
        padded = ~qk.valid[:, None, :, None]
        return bounds, (up * high.masked_fill(padded, 0.0) + down * low.masked_fill(padded, 0.0)).sum(-1)
