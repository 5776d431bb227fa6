"""BigBird: in blocks, a window, random blocks, and the first and last blocks for everyone (Zaheer et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import uniform
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, odd


@dataclass(frozen=True)
class BigBird(Free):
    """With blocks ``I = ⌊i / b⌋``, ``J = ⌊j / b⌋``: edge iff ``|I − J| ≤ w // 2``, or ``J ∈ R_I``, or ``I`` or ``J`` is global.

    ``R_I`` are ``r`` blocks drawn from those that the query's block does not see otherwise; global are the first and the last
    ``g`` blocks of the sentence. The sparsity parameter is the size of a block, all counts fixed: doubling it never takes
    pairs away.

    Source:
        Zaheer et al. 2020 (https://arxiv.org/abs/2007.14062), internal transformer construction, with ``w = 3``, ``r = 3``,
        ``g = 1`` and ``b = 64`` for 4,096 tokens. Where we differ:

        1. The blocks of ``R_I`` are drawn uniformly for each seed, layer, head and length of the sentence; the published code
           draws them when the model is built, for some lengths only among the first 1,024 tokens.
        2. Blocks are counted over the real tokens of a sentence, and its last one may be shorter; the paper asks for whole
           ones.
        3. In causal attention later keys are taken out; the paper is bidirectional.
    """

    block: int = 4  # b, tokens in a block
    window_blocks: int = 3  # w, odd: the query's own block and w // 2 on each side
    random_blocks: int = 3  # r
    global_blocks: int = 1  # g at each end
    seed: int = 0

    sparsity_parameter: ClassVar[str | None] = "block"
    needs: ClassVar[tuple[str, ...]] = ()
    # in causal attention
    reads_ahead: ClassVar[str] = "where the sentence ends, whose last blocks are global and not drawn"

    def __post_init__(self) -> None:
        at_least(1, block=self.block)
        odd(window_blocks=self.window_blocks)
        at_least(0, random_blocks=self.random_blocks, global_blocks=self.global_blocks)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Blocks of keys as buckets: a query is in those that it sees, a key in its own; and the global blocks' tokens."""
        qk.one_text(type(self).__name__)
        heads = qk.q.shape[1]
        block_of_token = qk.positions // self.block
        blocks = -(-qk.lengths // self.block)  # (B,), of each sentence
        count = max(int(blocks.max()), 1)
        is_global = (block_of_token < self.global_blocks) | (block_of_token >= blocks[:, None] - self.global_blocks)
        steps = torch.arange(self.window_blocks, device=block_of_token.device) - self.window_blocks // 2
        near = torch.arange(count, device=block_of_token.device)[:, None] + steps
        near = near.masked_fill((near < 0) | (near >= count), -1).expand(len(block_of_token), heads, -1, -1)
        seen = torch.cat([near, self._drawn(blocks, count, heads, layer)], dim=-1)  # (B, H, blocks, slots)
        of_token = block_of_token[:, None, :, None].expand(-1, heads, -1, seen.shape[-1])
        return Layout(
            Buckets(seen.gather(2, of_token), of_token[..., :1], count),
            is_global=is_global & qk.valid if self.global_blocks else None,
        )

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _drawn(self, blocks: Tensor, count: int, heads: int, layer: int) -> Tensor:
        """``R_I`` of each block, ``(B, H, count, r)`` int64, -1 where a sentence has no block left to draw.

        The blocks to draw from are those up to ``before`` and those from ``after``; the t-th draw picks one of the ``left − t``
        that are not drawn yet, so that memory grows with ``r`` and not with the number of blocks.
        """
        block = torch.arange(count, device=blocks.device)
        head = torch.arange(heads, device=blocks.device)[:, None]
        end = (blocks - self.global_blocks).view(-1, 1, 1)
        reach = self.window_blocks // 2
        before = torch.minimum(block - reach, end).clamp_min(self.global_blocks) - self.global_blocks
        after = (block + reach + 1).clamp_min(self.global_blocks)
        left = before + (end - after).clamp_min(0)  # (B, 1, count)
        drawn: list[Tensor] = []
        for turn in range(self.random_blocks):
            chance = uniform(self.seed, layer, head, block, torch.tensor(turn, device=block.device))
            pick = (chance * (left - turn)).long()
            for earlier in torch.stack(drawn, -1).sort(-1).values.unbind(-1) if drawn else ():
                pick = pick + (pick >= earlier)
            drawn.append(pick)
        blocks_of_draws = [
            torch.where(pick < before, pick + self.global_blocks, after + pick - before).masked_fill(turn >= left, -1)
            for turn, pick in enumerate(drawn)
        ]
        return torch.stack(blocks_of_draws, -1) if blocks_of_draws else left.new_zeros(len(blocks), heads, count, 0)
