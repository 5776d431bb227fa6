"""What a language model is asked, by its kind: words behind masks, always the next one, or a damaged text as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefinder.corpora import (
    Batch,
    Denoising,
    Masking,
    NextWords,
    TokenBlocks,
    denoising_batches,
    masked_batches,
    next_word_batches,
)
from sparsefinder.corpora.masking import collate
from sparsefinder.models.families import kind_of

Objective = Masking | NextWords | Denoising


def is_causal(model: Any, which: str | None = None) -> bool:
    """Whether no query of an attention of the model sees a later key.

    Args:
        model: Of one of the families.
        which: The attention; None for the only one that an encoder or a decoder has.
    """
    return which == "dec" if which else kind_of(model.config) == "decoder"


def objective_of(model: Any, tokenizer: Any, fraction: float = 0.15) -> Objective:
    """How an example is made of a block of text; ``fraction`` is that of masked or hidden words."""
    kind = kind_of(model.config)
    if kind == "encoder_decoder":
        return Denoising.of(tokenizer, model.config.decoder_start_token_id, fraction)
    return NextWords() if kind == "decoder" else Masking.of(tokenizer, fraction)


def collated(objective: Objective, examples: Sequence[tuple[Tensor, Tensor]], pad_token_id: int) -> Batch:
    """A batch of examples that an objective made, as the model reads it."""
    start = objective.start_token_id if isinstance(objective, Denoising) else None
    return collate(examples, pad_token_id, start)


def asked_batches(
    model: Any,
    blocks: Sequence[Tensor] | TokenBlocks,
    tokenizer: Any,
    fraction: float = 0.15,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Batch]:
    """Batches with labels of all blocks, the same for every variant of a model.

    See `masked_batches`, `next_word_batches` and `denoising_batches`.
    """
    objective = objective_of(model, tokenizer, fraction)
    if isinstance(objective, Denoising):
        return denoising_batches(blocks, objective, tokenizer.pad_token_id, seed, batch_size)
    if isinstance(objective, NextWords):
        return next_word_batches(blocks, tokenizer.pad_token_id, batch_size)
    return masked_batches(blocks, tokenizer, fraction, seed, batch_size)


def whole_text(model: Any, batch: Batch) -> Batch:
    """What a model reads of a batch with labels, without its questions: the words behind masks are put back.

    A text for an encoder-decoder stays damaged, since the whole one is what its decoder reads.
    """
    read = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if kind_of(model.config) == "encoder":
        labels = batch["labels"]
        read["input_ids"] = torch.where(labels >= 0, labels, read["input_ids"])
    return read
