"""The next word after every token: what a causal language model is evaluated by, the second half of a block apart.

A model that uses a long context guesses the second half of a block better than the first; an attention that forgets what is far
away loses there first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sparsefinder.corpora.masking import IGNORED
from sparsefinder.evaluation.tasks.judges import Batch, per_position


@dataclass(frozen=True)
class NextWords:
    """Every token but the first of a block, of which labels are a step ahead (`sparsefinder.corpora.NextWords`)."""

    unit: str = "tokens"
    asked: str = "next_tokens"
    measures: tuple[str, ...] = ("perplexity", "accuracy", "loss_second_half", "perplexity_second_half")

    def judge(self, output: Any, batch: Batch) -> tuple[Tensor, list[Any]]:
        """As `Judge`; of each block are kept how much of its second half was asked, and the loss there."""
        labels = batch["labels"]
        sums, _, _ = per_position(output.logits, labels)
        asked = (labels != IGNORED).sum(-1, keepdim=True)
        first = torch.arange(labels.shape[1], device=labels.device) < asked - asked // 2
        late, _, _ = per_position(output.logits, labels.masked_fill(first, IGNORED))
        return sums.cpu(), late[:, :2].tolist()

    def scores(self, blocks: pd.DataFrame, answers: Sequence[Any]) -> dict[str, float]:
        """As `Judge`."""
        asked = int(blocks[self.unit].sum())
        loss = float(blocks["loss"].sum()) / asked
        late_asked, late_loss = (sum(values) for values in zip(*answers, strict=True))
        late = late_loss / max(late_asked, 1)
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": int(blocks["right"].sum()) / asked,
            "loss_second_half": late,
            "perplexity_second_half": math.exp(min(late, 700.0)),
        }
