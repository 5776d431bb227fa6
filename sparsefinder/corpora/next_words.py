"""What a causal language model is asked: after every token of a block, for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.corpora.blocks import TokenBlocks
from sparsefinder.corpora.masking import IGNORED, Batch, collate
from sparsefinder.errors import UserError


@dataclass(frozen=True)
class NextWords:
    """The whole block, whose labels are its tokens one step earlier: position ``i`` is asked for token ``i + 1``.

    Called as `sparsefinder.corpora.Masking` is; the seed and the number of the example change nothing. A model's own loss would
    shift labels once more: losses are taken from its logits.
    """

    def __call__(self, ids: Tensor, seed: int, example: int) -> tuple[Tensor, Tensor]:
        """``ids (n,)`` int64 → inputs and labels of the same shape; the last position is not asked."""
        return ids, torch.cat([ids[1:], ids.new_full((1,), IGNORED)])


def next_word_batches(blocks: Sequence[Tensor] | TokenBlocks, pad_token_id: int, batch_size: int = 16) -> list[Batch]:
    """All blocks in order, padded on the right, asked for every token but the first.

    Args:
        blocks: Ids, ``(n_i,)`` int64 each.
        pad_token_id: What padded positions hold.
        batch_size: Blocks of a batch; the last one may have fewer.

    Raises:
        UserError: No block has two tokens.
    """
    examples = [NextWords()(blocks[index], 0, index) for index in range(len(blocks))]
    if not any(len(ids) > 1 for ids, _ in examples):
        raise UserError(f"there is no next word to ask for: {len(examples)} blocks of one token each")
    return [
        collate(examples[start : start + batch_size], pad_token_id) for start in range(0, len(examples), batch_size)
    ]
