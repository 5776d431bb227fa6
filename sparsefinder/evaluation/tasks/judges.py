"""Counting a model's answers: the same examples, the same counting for every variant of a model.

A judge says of every example of a batch how much was asked, the loss and how much of it was right, and keeps what was
answered, so that scores that no sum gives (F1) can be taken from all examples together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from sparsefinder.corpora.masking import IGNORED
from sparsefinder.evaluation.tasks.measures import accuracy, macro_f1

Batch = dict[str, Tensor]
INPUTS = (  # what a model reads of a batch; the rest are labels
    *("input_ids", "attention_mask", "token_type_ids"),
    *("decoder_input_ids", "decoder_attention_mask"),
)


class Judge(Protocol):
    """What `evaluate` needs to know about a task."""

    @property
    def unit(self) -> str:
        """The column of ``evaluate/blocks`` that says how much was asked."""

    @property
    def asked(self) -> str:
        """The column of ``evaluate/results`` that says the same."""

    @property
    def measures(self) -> tuple[str, ...]:
        """The columns that `scores` gives."""

    def judge(self, output: Any, batch: Batch) -> tuple[Tensor, list[Any]]:
        """Of each example asked, loss (nats, summed) and right, ``(B, 3)`` float64; and what was answered, one value each."""

    def scores(self, blocks: pd.DataFrame, answers: Sequence[Any]) -> dict[str, float]:
        """The measures, of all examples in their order: the rows of ``blocks``, and what `judge` kept of each."""


def inputs_of(batch: Batch) -> Batch:
    """The part of a batch that a model reads."""
    return {name: batch[name] for name in INPUTS if name in batch}


def per_position(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asked, loss and right of each example, ``(B, 3)`` float64, from logits ``(B, N, C)`` and labels ``(B, N)``.

    Positions with the label `IGNORED` are not asked for. Also the answer and the truth at the others, ``(M,)`` each.
    """
    chosen = labels != IGNORED
    guesses, truth = logits[chosen].float(), labels[chosen]
    losses = torch.nn.functional.cross_entropy(guesses, truth, reduction="none").double()
    answers = guesses.argmax(-1)
    of_position = torch.stack([torch.ones_like(losses), losses, (answers == truth).double()], 1)
    block = torch.arange(len(chosen), device=labels.device)[:, None].expand(chosen.shape)[chosen]
    return losses.new_zeros(len(chosen), 3).index_add_(0, block, of_position), answers, truth


@dataclass(frozen=True)
class MaskedWords:
    """The words behind the masks of a masked language model, or by other names all words of a text that is written."""

    unit: str = "masked"
    asked: str = "masked_tokens"
    measures: tuple[str, ...] = ("perplexity", "accuracy")

    def judge(self, output: Any, batch: Batch) -> tuple[Tensor, list[Any]]:
        """As `Judge`; nothing more is kept."""
        sums, _, _ = per_position(output.logits, batch["labels"])
        return sums.cpu(), []

    def scores(self, blocks: pd.DataFrame, answers: Sequence[Any]) -> dict[str, float]:
        """As `Judge`."""
        masked = int(blocks[self.unit].sum())
        loss = float(blocks["loss"].sum()) / masked
        return {"perplexity": math.exp(min(loss, 700.0)), "accuracy": int(blocks["right"].sum()) / masked}


@dataclass(frozen=True)
class Classes:
    """A class of each example (labels ``(B,)``) or of some of its tokens (labels ``(B, N)``)."""

    unit: str  # examples or words
    measures: tuple[str, ...] = ("accuracy", "macro_f1")

    @property
    def asked(self) -> str:
        """As `Judge`."""
        return self.unit

    def judge(self, output: Any, batch: Batch) -> tuple[Tensor, list[Any]]:
        """As `Judge`; the pairs (answer, truth) of each example are kept."""
        logits, labels = output.logits, batch["labels"]
        if labels.ndim == 1:
            logits, labels = logits[:, None], labels[:, None]
        sums, answers, truth = per_position(logits, labels)
        pairs = iter(zip(answers.tolist(), truth.tolist(), strict=True))
        return sums.cpu(), [[next(pairs) for _ in range(int(asked))] for asked in sums[:, 0].tolist()]

    def scores(self, blocks: pd.DataFrame, answers: Sequence[Any]) -> dict[str, float]:
        """As `Judge`."""
        pairs = [pair for example in answers for pair in example]
        return {"accuracy": accuracy(pairs), "macro_f1": macro_f1(pairs)}
