"""α of a model's entmax over the steps of a training: from next to softmax to its end value (``finetune.alpha_schedule``)."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsefinder.models.dense_normalizer import set_normalizer
from sparsefinder.numerics.normalizers import Normalizer

_START_ALPHA = 1.01  # of `alpha_schedule`: next to softmax
_ALPHA_STEP = 0.01  # α moves in steps, because setting it looks the attention layers up


class Annealing(TrainerCallback):
    """α from next to softmax to its end value over the first half of the steps; a function of the step alone."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer before each step: the model attends with that step's α."""
        set_normalizer(kwargs["model"], Normalizer(annealed(self.alpha, state.global_step, state.max_steps)))


def annealed(alpha: float, step: int, steps: int) -> float:
    """α at ``step`` of ``steps``: a ramp from 1.01 that ends at half of the steps, in multiples of 0.01."""
    reached = _START_ALPHA + (alpha - _START_ALPHA) * min(1.0, 2.0 * step / steps)
    if reached >= alpha:
        return alpha
    return max(_START_ALPHA, min(alpha, math.floor(reached / _ALPHA_STEP) * _ALPHA_STEP))
