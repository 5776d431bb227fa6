"""Consecutive tokens in blocks, and the choice of a share of the blocks for each query.

Blocks are counted over the real tokens of a sentence, so padding on either side moves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.ranking import share_of


@dataclass(frozen=True)
class TokenBlocks:
    """Real tokens, ``size`` to a block; the last block of a sentence may hold fewer.

    Args:
        tokens: ``(B, blocks, size)`` int64, the index of the token in each slot of a block.
        filled: Bool of the same shape, False in slots without a token.
        block_of: ``(B, N)`` int64, the block of each token; arbitrary on padding.
        slot_of: ``(B, N)`` int64, the slot of each token among the slots of all blocks; arbitrary on padding.
    """

    tokens: Tensor
    filled: Tensor
    block_of: Tensor
    slot_of: Tensor

    @classmethod
    def cut(cls, qk: QK, size: int) -> TokenBlocks:
        """The blocks of each sentence of a batch; as many as the longest one needs, and one for a batch without tokens.

        Args:
            qk: Queries and keys, of which only the keys' ``valid`` is read.
            size: Tokens in a block.
        """
        blocks = max(-(-int(qk.lengths.max()) // size), 1)
        order = (~qk.valid).long().argsort(dim=-1, stable=True)  # real tokens first, in their order
        order = F.pad(order, (0, max(blocks * size - order.shape[1], 0)))[:, : blocks * size]
        slots = torch.arange(blocks * size, device=order.device)
        filled = slots < qk.lengths[:, None]
        shape = (-1, blocks, size)
        return cls(order.view(shape), filled.view(shape), qk.positions // size, qk.positions)

    @classmethod
    def of_both(cls, qk: QK, size: int) -> tuple[TokenBlocks, TokenBlocks]:
        """The blocks of the queries and those of the keys: the same ones, but in cross-attention."""
        of_keys = cls.cut(qk, size)
        return cls.cut(qk.swapped, size) if qk.crosses else of_keys, of_keys

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.tokens.shape[1]

    def pack(self, x: Tensor, missing: float) -> Tensor:
        """Vectors block by block.

        Args:
            x: ``(B, H, N, D)``.
            missing: What a slot without a token gets.

        Returns:
            ``(B, H, blocks, size, D)``.
        """
        packed = x.gather(2, _index(self.tokens.flatten(1), x)).unflatten(2, self.tokens.shape[1:])
        return packed.masked_fill(~self.filled[:, None, :, :, None], missing)

    def unpack(self, x: Tensor) -> Tensor:
        """``(B, H, blocks, size, D)`` → ``(B, H, N, D)``, the inverse of ``pack``."""
        flat = x.flatten(2, 3)
        return flat.gather(2, _index(self.slot_of, flat))

    def spread(self, x: Tensor) -> Tensor:
        """``(B, H, blocks, D)`` → ``(B, H, N, D)``: each token has what its block has."""
        return x.gather(2, _index(self.block_of, x))

    def means(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → the mean of each block, ``(B, H, blocks, D)``; zeros for a block without tokens."""
        return self.pack(x, 0.0).sum(3) / self.filled.sum(-1).clamp_min(1)[:, None, :, None]

    def running_means(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → the mean of each token's block up to the token itself, ``(B, H, N, D)``."""
        size = self.tokens.shape[2]
        return self.unpack(self.pack(x, 0.0).cumsum(3) / torch.arange(1, size + 1, device=x.device)[:, None])

    def best(self, scores: Tensor, share: float) -> Tensor:
        """The ``⌈share · blocks⌉`` blocks of largest score for each row; of equal scores the earlier block comes first.

        Args:
            scores: ``(B, H, M, blocks)``, ``-inf`` for a block that the row may not take.
            share: Of the blocks that the row may take, in (0, 1].

        Returns:
            ``(B, H, M, P)`` int64, -1 where a row has fewer than others.
        """
        budgets = share_of((scores > -math.inf).sum(-1, keepdim=True), share)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., : max(int(budgets.max()), 1)]
        return order.masked_fill(torch.arange(order.shape[-1], device=order.device) >= budgets, -1)

    def visible(self, scores: Tensor, of_own_block: Tensor | None) -> Tensor:
        """Scores with ``-inf`` on blocks that are not there or lie in the future.

        Args:
            scores: ``(B, H, M, blocks)``.
            of_own_block: For causal attention with a row for each token, ``(B, H, M)``: the score of its own block, from what
                it sees of it. None otherwise.

        Returns:
            ``(B, H, M, blocks)``.
        """
        scores = scores.masked_fill(~self.filled.any(-1)[:, None, None], -math.inf)
        if of_own_block is None:
            return scores
        block = self.block_of[:, None, :, None]
        later = torch.arange(self.count, device=scores.device) > block
        return scores.masked_fill(later, -math.inf).scatter(
            3, block.expand(*of_own_block.shape, 1), of_own_block[..., None]
        )

    def layout(self, chosen: Tensor, tail: bool) -> Layout:
        """Blocks as buckets: a query is in those that were ``chosen (B, H, N, P)``, a key in its own."""
        k_ids = self.block_of[:, None, :, None].expand(-1, chosen.shape[1], -1, 1)
        return Layout(Buckets(chosen, k_ids, self.count), tail=tail)


def _index(slots: Tensor, x: Tensor) -> Tensor:
    return slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
