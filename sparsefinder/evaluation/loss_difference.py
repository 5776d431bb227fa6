"""How much more a language model loses with a predicted graph than with its own dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefinder import models
from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.corpora import Corpus, block_length, token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.errors import UserError
from sparsefinder.evaluation.adapt import attending
from sparsefinder.evaluation.observer import on
from sparsefinder.evaluation.tasks import MaskedWords
from sparsefinder.evaluation.tasks.judges import inputs_of
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.graphs import Attention
from sparsefinder.models.documents_apart import read_apart
from sparsefinder.models.objectives import asked_batches, is_causal
from sparsefinder.storage.store import Store


@dataclass(frozen=True)
class MaskedText:
    """Which text blocks of a corpus are read, and how many of their words are masked."""

    split: str = "validation"  # train, validation or test; evaluate measures on test
    blocks: int = 32
    length: int | None = None  # most tokens of a block; None: what the model can take
    batch_size: int = 8
    mask_probability: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"calibrate.text.{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.mask_probability < 1:
            raise UserError(f"calibrate.text.mask_probability must lie between 0 and 1, got {self.mask_probability}")


@dataclass(frozen=True)
class LossDifference:
    """Nats a masked position beside dense attention, on the same masked positions.

    Args:
        model: A masked language model in evaluation mode.
        batches: Inputs with labels.
        dense: Its loss with dense attention.
        which: The attention that is replaced, where the model has several.
    """

    model: Any
    batches: Sequence[dict[str, Tensor]]
    dense: float
    which: str | None = None

    @classmethod
    def of(cls, store: Store, corpus: Corpus, text: MaskedText) -> LossDifference:
        """That of the model of a run, on text of a corpus."""
        model, tokenizer = models.load_language_model(store.path("model"))
        if not models.has_head(model):
            raise UserError("a target of loss needs a language model, and this one has no head: give a density")
        read_apart(model, tokenizer, corpus)
        length = block_length(text.length, models.describe(model, store.which).max_length, "calibrate.text.length")
        found = token_blocks(corpus, tokenizer, text.split, length, cache=store.scratch("corpus"))
        drawn = draw(len(found), min(text.blocks, len(found)), text.seed, f"the {text.split} split of the corpus")
        blocks = [found[index] for index in drawn]
        batches = asked_batches(model, blocks, tokenizer, text.mask_probability, text.seed, text.batch_size)
        dense = Dense(models.get_normalizer(model), is_causal(model, store.which))
        return cls(model, batches, masked_loss(model, dense, batches, store.which), store.which)

    def __call__(self, configuration: Configuration, learned: Learned) -> float:
        """Of a pattern as it is run: by its buckets where it has them, else as a mask."""
        pattern, normalizer = configuration.build(learned), models.get_normalizer(self.model)
        bucketed = configuration.bucketed(learned, models.describe(self.model, self.which).head_size)
        causal = is_causal(self.model, self.which)
        attention = Bucketed(pattern, normalizer, causal) if bucketed else Masked(pattern, normalizer, causal)
        return masked_loss(self.model, attention, self.batches, self.which) - self.dense


@torch.inference_mode()
def masked_loss(
    model: Any, attention: Attention, batches: Sequence[dict[str, Tensor]], which: str | None = None
) -> float:
    """Mean loss of the words that are asked for, in nats.

    Args:
        model: A masked language model in evaluation mode.
        attention: What it attends with.
        batches: Inputs with labels.
        which: The attention that is replaced, where the model has several.
    """
    judge, total = MaskedWords(), torch.zeros(3, dtype=torch.float64)
    with attending(model, attention, which):
        for batch in batches:
            here = on(batch, model.device)
            sums, _ = judge.judge(model(**inputs_of(here)), here)
            total += sums.sum(0)
    masked, loss, _ = total.tolist()
    return loss / masked
