"""Antidiagonals of blocks: a query block takes the key blocks that hold a share of its estimated attention (Xu et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.graphs import QK, Layout
from sparsefinder.patterns.support.key_blocks import TokenBlocks
from sparsefinder.patterns.support.ranking import as_ids, check_counts, check_share, fewest, vectors


@dataclass(frozen=True)
class XAttention:
    """Edge iff the key's block is among the fewest that hold a share ``p`` of ``P_I·``, ``I`` the block of the query.

    Tiles of ``stride`` tokens are scored by one antidiagonal, ``s_ab = Σ_t q_{a, S−1−t}·k_{b, t} / (S √D)``, which meets every
    query and every key of the tile; softmax over the tiles of a row gives each tile a weight, and ``P_IJ`` is the sum over the
    tiles of blocks ``I`` and ``J``, which are ``tiles`` tiles long. Where attention is causal, later tiles have no weight; **the
    choice of a query block reads all of its queries and keys**, later ones too, as in the paper.

    Source:
        Xu, Xiao, Huang, Guo, Han (2025), XAttention: Block Sparse Attention with Antidiagonal Scoring,
        https://arxiv.org/abs/2503.16428. Where we differ:

        1. Tiles of 2 tokens and blocks of 4 by default, not 8 or 16 and 128, since sentences are a hundred times shorter.
        2. One ``p`` for all heads; the paper searches one for each head (`calibrate` does that for any pattern).
    """

    p: float = 0.5  # share of a query block's estimated attention
    stride: int = 2  # S, tokens in a tile
    tiles: int = 2  # in a block
    # whether each block that a query does not take is one entry among its scores: see `Layout`
    tail: bool = field(default=False, kw_only=True)

    sparsity_parameter: ClassVar[str | None] = "p"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("p", self.p)
        check_counts(stride=self.stride, tiles=self.tiles)

    @property
    def reads_ahead(self) -> str:
        """What later tokens change in causal attention: what their block takes, where it has more than one token."""
        return "a block chooses by all of its tokens, later ones too" if self.stride * self.tiles > 1 else ""

    def layout(self, qk: QK, layer: int) -> Layout:
        """Key blocks as buckets: the queries of a block are in those that it takes, a key in its own."""
        of_queries, of_keys = TokenBlocks.of_both(qk, self.stride * self.tiles)
        taken = as_ids(fewest(self._weights(qk, of_queries.count, of_keys.count), self.p))
        return of_keys.layout(of_queries.spread(taken), self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """``n · D / S``: one product of a query and a key for each tile that the query is in."""
        return size * -(-tokens // self.stride) * 1.0

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _weights(self, qk: QK, rows: int, columns: int) -> Tensor:
        """``P``, ``(B, H, rows, columns)``, of blocks of queries and of keys; zero on blocks that a sentence does not have."""
        of_queries, of_keys = TokenBlocks.of_both(qk, self.stride)
        q, k = (tiles.pack(x, 0.0) for tiles, x in zip((of_queries, of_keys), vectors(qk), strict=True))
        scores = q.flip(3).flatten(3) @ k.flatten(3).mT / (self.stride * math.sqrt(q.shape[-1]))
        seen = of_queries.filled.any(-1)[:, None, :, None] & of_keys.filled.any(-1)[:, None, None]
        if qk.causal:
            seen = seen & seen.new_ones(seen.shape[-2:]).tril()
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1).masked_fill(~seen, 0.0)
        whole = F.pad(weights, (0, columns * self.tiles - weights.shape[-1], 0, rows * self.tiles - weights.shape[-2]))
        return whole.unflatten(-1, (-1, self.tiles)).sum(-1).unflatten(-2, (-1, self.tiles)).sum(-2)
