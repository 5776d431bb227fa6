"""Converted models as rows of `evaluate`: the finetuned model as a Longformer, BigBird or Nyströmformer.

These architectures have softmax attention of their own and no way to plug another one in, so such a row is a whole model: the
same weights, the same masked positions. The finetuned model's attention was trained with entmax; compare the row with dense
softmax too, and give it `adapt_steps`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder import models
from sparsefinder.conversions.bigbird import convert_roberta_to_bigbird, stay_sparse
from sparsefinder.conversions.longformer import convert_roberta_to_longformer
from sparsefinder.conversions.nystromformer import convert_roberta_to_nystromformer
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError
from sparsefinder.numerics.normalizers import Normalizer

Batch = dict[str, Tensor]  # input_ids, attention_mask and labels, each (B, N)


def with_numbers(batch: Batch) -> Batch:
    """The same batch with a mask of 0 and 1, which these architectures calculate with."""
    return {name: tensor.long() for name, tensor in batch.items()}


@dataclass(frozen=True)
class Converted:
    """A model, and how it wants its batches."""

    model: Any
    read: Callable[[Batch], Batch] = with_numbers


@dataclass(frozen=True)
class Longformer:
    """A window around every token (Beltagy et al. 2020)."""

    attention_window: int = 64  # tokens, even: half on each side

    def __call__(self, model: Any, tokenizer: Any, length: int) -> Converted:
        """Convert a copy of ``model`` for inputs of up to ``length`` tokens."""
        converted, _ = convert_roberta_to_longformer(_softmax(model), tokenizer, length, self.attention_window)
        return Converted(converted.eval())


@dataclass(frozen=True)
class BigBird:
    """A window, random and global blocks (Zaheer et al. 2020); kept sparse after short inputs, which run dense."""

    block_size: int = 16
    num_random_blocks: int = 1

    def __call__(self, model: Any, tokenizer: Any, length: int) -> Converted:
        """Convert a copy of ``model`` for inputs of up to ``length`` tokens."""
        converted, _ = convert_roberta_to_bigbird(
            _softmax(model), tokenizer, length, block_size=self.block_size, num_random_blocks=self.num_random_blocks
        )
        stay_sparse(converted)
        return Converted(converted.eval())


@dataclass(frozen=True)
class Nystromformer:
    """Attention through landmarks, means of segments (Xiong et al. 2021); it reads inputs of exactly one length.

    Shorter blocks are padded. Their padding is never attended, but it is in the means of the last landmarks: that is the method.
    """

    num_landmarks: int = 32

    def __call__(self, model: Any, tokenizer: Any, length: int) -> Converted:
        """Convert a copy of ``model`` for inputs of ``length`` tokens, padding included."""
        if length % self.num_landmarks:
            raise UserError(
                f"conversion.num_landmarks={self.num_landmarks} does not divide the model's {length} tokens"
            )
        converted, _ = convert_roberta_to_nystromformer(_softmax(model), tokenizer, length, self.num_landmarks)

        def widened(batch: Batch) -> Batch:
            missing = length - batch["input_ids"].shape[1]
            fillings = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
            wide = {name: F.pad(tensor.long(), (0, missing), value=fillings[name]) for name, tensor in batch.items()}
            # given as (B, N), transformers 5.23 makes a mask with a row per query, which does not fit the landmarks
            absent = wide["attention_mask"][:, None, None, :] == 0
            return wide | {"attention_mask": torch.zeros(absent.shape).masked_fill(absent, -math.inf)}

        return Converted(converted.eval(), widened)


def _softmax(model: Any) -> Any:
    if model.config.model_type not in ("roberta", "xlm-roberta", "camembert"):
        raise UserError(
            f"a {model.config.model_type} cannot be converted for evaluate: choose a roberta, xlm-roberta or camembert, "
            "or conversion=none"
        )
    dense = copy.deepcopy(model)
    models.set_normalizer(dense, Normalizer(1.0))
    return dense
