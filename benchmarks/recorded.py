"""A real encoder for the benchmarks: lengthened, with texts of any length, and what patterns learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from sparsefinder import models
from sparsefinder.conversions.positions import replace_embedding, resize_buffers, tile_rows
from sparsefinder.experiment.configuration import Learned
from sparsefinder.graphs import QK
from sparsefinder.models.loading import load_with_head
from sparsefinder.models.observed_attention import Watched
from sparsefinder.models.position_tables import reserved_rows_of
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.sparse_model.learning import learn

NEEDS = ("lowrank", "key_centroids")
TRAINING = 24  # texts of `LEARNED` tokens that patterns learn from
LEARNED = 512


def lengthened(folder: Path, length: int) -> tuple[Any, Any]:
    """An encoder that reads so many tokens, its position table repeated (RoBERTa's and BERT's), and its tokenizer."""
    model, tokenizer = load_with_head(folder, AutoModel)
    shape = models.describe(model)
    if shape.max_length < length:
        embeddings: Any = model.embeddings
        table: nn.Embedding = embeddings.position_embeddings
        rows = tile_rows(table.weight.detach(), length, reserved=reserved_rows_of(model.config))
        replace_embedding(table, rows)
        resize_buffers(embeddings, len(rows))
        model.config.max_position_embeddings = len(rows)
    tokenizer.model_max_length = length
    return model.eval(), tokenizer


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


def learned(model: Any, training: Sequence[Tensor]) -> Learned:
    """What routed patterns learn from texts of the length that the model was trained at."""
    return learn(NEEDS, model, list(training), Normalizer(1.0), seed=0)


@torch.inference_mode()
def vectors(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values ``(1, H, N, D)`` of some layers, as the model itself attends."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def look(layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
        if layer in layers:
            found[layer] = (qk.q.contiguous(), qk.k.contiguous(), v.contiguous())

    def dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    with models.plugged(model, Watched(dense, look)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return found
