"""What a language model is asked, by its kind: the words behind masks, or after every token the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsefinder.corpora import Batch, Masking, NextWords, TokenBlocks, masked_batches, next_word_batches
from sparsefinder.models.families import kind_of


def is_causal(model: Any) -> bool:
    """Whether no query of the model's only attention sees a later key."""
    return kind_of(model.config) == "decoder"


def objective_of(model: Any, tokenizer: Any, fraction: float = 0.15) -> Masking | NextWords:
    """How an example is made of a block of text; ``fraction`` is that of masked words."""
    return NextWords() if is_causal(model) else Masking.of(tokenizer, fraction)


def asked_batches(
    model: Any,
    blocks: Sequence[Tensor] | TokenBlocks,
    tokenizer: Any,
    fraction: float = 0.15,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Batch]:
    """Batches with labels of all blocks, the same for every variant of a model; see `masked_batches`, `next_word_batches`."""
    if is_causal(model):
        return next_word_batches(blocks, tokenizer.pad_token_id, batch_size)
    return masked_batches(blocks, tokenizer, fraction, seed, batch_size)
