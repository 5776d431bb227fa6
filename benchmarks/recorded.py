"""A real encoder for the benchmarks: lengthened, with texts of any length, and what patterns learn from it."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder import models
from sparsefinder.attention import Dense
from sparsefinder.conversions.positions import replace_embedding, resize_buffers, tile_rows
from sparsefinder.experiment.configuration import Learned
from sparsefinder.models.position_tables import CONVENTIONS, reserved_rows_of
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.fit_centroids import KeyClusterSettings, fit_tree
from sparsefinder.sparse_model.learning import record
from sparsefinder.storage.samples import Samples

TRAINING = 24  # texts of `LEARNED` tokens that patterns learn from
LEARNED = 512
RANK = 32  # numbers that queries and keys are compared by

Vectors = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values ``(1, H, N, D)``."""


def arguments(description: str | None, model: str) -> argparse.ArgumentParser:
    """What every benchmark of an encoder is given: a ``model``, and the files to learn from and to measure on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help=f"a folder with a {model}")
    parser.add_argument("--train", type=Path, required=True, help="a text file that patterns learn from")
    parser.add_argument("--test", type=Path, required=True, help="a text file to measure on")
    return parser


def lengthened(folder: Path, length: int) -> tuple[Any, Any]:
    """An encoder that reads so many tokens, its position table repeated (RoBERTa's and BERT's), and its tokenizer."""
    model, tokenizer = models.load_encoder(folder)
    if models.describe(model).max_length < length and CONVENTIONS[model.config.model_type] != "rotary":
        embeddings: Any = model.base_model.embeddings
        table: nn.Embedding = embeddings.position_embeddings
        rows = tile_rows(table.weight.detach(), length, reserved=reserved_rows_of(model.config))
        replace_embedding(table, rows)
        resize_buffers(embeddings, len(rows))
        model.config.max_position_embeddings = len(rows)
    tokenizer.model_max_length = length
    return model.base_model.eval(), tokenizer


def twin(model: Any) -> Any:
    """A copy of a model that may attend in another way, with the same weights in memory."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def texts(file: Path, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """Token ids ``(1, length)`` of consecutive stretches of a file, special tokens included; as many as there are."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    inside = length - 2
    return [
        torch.tensor([tokenizer.build_inputs_with_special_tokens(ids[start : start + inside])])
        if hasattr(tokenizer, "build_inputs_with_special_tokens")
        else torch.tensor([[tokenizer.cls_token_id, *ids[start : start + inside], tokenizer.sep_token_id]])
        for start in range(0, min(len(ids) - inside, count * inside), inside)
    ]


def learned(samples: Samples) -> Learned:
    """What routed patterns learn: the closed-form space, and a tree of clusters of keys in it."""
    lowrank = fit_lowrank(samples, RANK)
    return Learned(
        {"lowrank": lowrank, "key_centroids": fit_tree(samples, lowrank, KeyClusterSettings(max_iterations=25))}
    )


def samples(model: Any, training: Sequence[Tensor]) -> Samples:
    """Queries and keys of all layers from texts of the length that the model was trained at."""
    return record(model, training, Dense(models.get_normalizer(model)), lambda tokens: slice(None))


class _EnoughError(Exception):
    """All layers that were wanted have been met."""


@torch.inference_mode()
def vectors(model: Any, ids: Tensor, wanted: Sequence[int]) -> list[Vectors]:
    """What some layers attend with, as the model itself attends; nothing beyond the last of them is computed."""
    found: dict[int, Vectors] = {}
    dense = Dense(models.get_normalizer(model))

    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        if layer in wanted:
            found[layer] = (q.contiguous(), k.contiguous(), v.contiguous())
        if len(found) == len(set(wanted)):
            raise _EnoughError
        return dense(q, k, v, valid, layer)

    with models.plugged(model, attend), contextlib.suppress(_EnoughError):
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return [found[layer] for layer in wanted]
