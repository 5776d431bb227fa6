"""Averages of blocks: queries of a block take the key blocks whose mean key fits their mean query best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK, Layout
from sparsefinder.patterns.support.key_blocks import TokenBlocks
from sparsefinder.patterns.support.ranking import check_counts, check_share, vectors


@dataclass(frozen=True)
class BlockPool:
    """Edge iff the key's block ``J`` is among the ``⌈share · blocks⌉`` of largest ``q̄_I · k̄_J``, where ``I`` holds the query.

    ``q̄_I`` and ``k̄_J`` are means over the tokens of a block. Without ``pool_queries`` each query chooses for itself, by
    ``q_i · k̄_J``. Where attention is causal, a query chooses among the blocks up to its own, a share of those, and the means
    of its own block, of keys and of queries, end at the query: a choice never reads the future.

    Source:
        Pooled queries are the block-sparse heads of MInference (Jiang et al. 2024, https://arxiv.org/abs/2407.02490) and the
        form of SeerAttention without training (Gao et al. 2024, https://arxiv.org/abs/2410.13276); single queries are MoBA (Lu
        et al. 2025, https://arxiv.org/abs/2502.13189). Where we differ:

        1. A share of the blocks instead of a number of them.
        2. The papers pool whole query blocks in causal attention too, so that all queries of a block agree, and ours need not.
        3. MoBA always takes the query's own block: unite with a window for that.
        4. Blocks of 4 tokens by default, not 64 to 512, since sentences are a hundred times shorter.
    """

    share: float = 0.2  # of the blocks that there are (causal: up to the query's own)
    size: int = 4  # tokens in a block
    pool_queries: bool = True  # one choice for the queries of a block
    # whether each block that a query does not take is one entry among its scores: see `Layout`
    tail: bool = field(default=False, kw_only=True)

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_counts(size=self.size)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Key blocks as buckets: a query is in those that it, or its block, takes, and a key in its own."""
        of_queries, blocks = TokenBlocks.of_both(qk, self.size)
        q, k = vectors(qk)
        means = blocks.means(k).transpose(-1, -2)
        if qk.causal:
            q = blocks.running_means(q) if self.pool_queries else q
            of_own_block = (q * blocks.running_means(k)).sum(-1)
            return blocks.layout(blocks.best(blocks.visible(q @ means, of_own_block), self.share), self.tail)
        rows = of_queries.means(q) if self.pool_queries else q
        chosen = blocks.best(blocks.visible(rows @ means, None), self.share)
        return blocks.layout(of_queries.spread(chosen) if self.pool_queries else chosen, self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """``D`` for each block of keys; with pooled queries once for a block of them."""
        return size * -(-tokens // self.size) / (self.size if self.pool_queries else 1)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
