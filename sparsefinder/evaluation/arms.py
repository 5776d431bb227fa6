"""What `compare` compares: an attention on its graph, or a way of reading a long text with dense attention."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsefinder import models
from sparsefinder.errors import UserError
from sparsefinder.evaluation.adapt import attending
from sparsefinder.evaluation.variants import AttentionChoice
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.models.objectives import is_causal
from sparsefinder.numerics.normalizers import Normalizer

DENSE, SOFTMAX, NONE = "dense", "softmax", "no attention"
"""Names of the arms that are always there: the model as it is, with torch's softmax, and with attention left out."""

READINGS = ("chunks", "truncated")


@dataclass(frozen=True)
class Reading:
    """What users do with a model that reads short texts: cut a long one into chunks, or drop what is too long."""

    kind: str  # chunks: each is read alone; truncated: the beginning is, and words behind it are guessed by their frequency
    tokens: int  # of a chunk, or of the beginning

    def __post_init__(self) -> None:
        if self.kind not in READINGS:
            raise UserError(f"arms: reading={self.kind} is unknown; choose one of {', '.join(READINGS)}")
        if self.tokens < 8:
            raise UserError(f"arms: reading {self.kind} of {self.tokens} tokens: give 8 or more")


@dataclass(frozen=True)
class Arm:
    """One of the things compared; its name is its own among them."""

    name: str
    attention: AttentionChoice | None = None  # None: the model's own
    configuration: Configuration | None = None  # of an attention that takes a pattern
    reading: Reading | None = None

    @property
    def quadratic(self) -> bool:
        """Whether it compares every pair of tokens, in a matrix."""
        return self.configuration is not None and self.configuration.quadratic

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts that its pattern works with."""
        return () if self.configuration is None else self.configuration.needs

    def build(self, learned: Learned, normalizer: Normalizer) -> Any:
        """The attention; None where the model attends as it does by itself."""
        if self.attention is None:
            return None
        pattern = None if self.configuration is None else self.configuration.build(learned)
        return self.attention.build(pattern, normalizer)


@dataclass(frozen=True)
class LeftOut:
    """No attention: every token passes on its own value. What is left of a model's time is what no attention can save."""

    causal: bool  # as the model's masks are; a token sees itself alone

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        """Values ``(B, H_k, N, D)`` as an output ``(B, H, N, D)``."""
        return v if v.shape[1] == q.shape[1] else v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def plugged(model: Any, arm: Arm, attention: Any) -> AbstractContextManager[None]:
    """The model as an arm runs it, for a while; ``attention`` is what `Arm.build` gave."""
    if arm.name == SOFTMAX:
        return models.softmax(model)
    if arm.name == NONE:
        return models.plugged(model, LeftOut(is_causal(model)))
    return contextlib.nullcontext() if attention is None else attending(model, attention)
