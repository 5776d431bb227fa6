"""Texts of a tiny encoder's words, and an index with the model that it was learned for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import WORDS, tiny_model
from torch import Tensor

from sparsefinder import Index

LENGTHS = (38, 21, 9)


def sentences(count: int = 24, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(WORDS), (count, 60), generator=generator)
    return [" ".join(WORDS[word] for word in row) for row in drawn.tolist()]


@dataclass
class Fitted:
    index: Index
    batch: dict[str, Tensor]

    def model(self, **overrides: Any) -> Any:
        """The model that the index was learned for."""
        return tiny_model(**overrides).base_model

    def states(self, model: Any) -> Tensor:
        """Last hidden states of the real tokens, ``(tokens, E)``."""
        with torch.inference_mode():
            out = model.base_model(**self.batch)[0]
        return out[self.batch["attention_mask"].bool()]
