"""A masked language model for longer texts, its architecture unchanged: the rows of its position table are repeated.

The same rules and the same proof as where the architecture changes too (`sparsefinder.conversions.positions`): a text that the
model could read before means what it meant, to the digit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefinder.conversions.certificate import Certificate, at_most
from sparsefinder.conversions.checks import check_finite, check_lengths, check_positions, max_difference
from sparsefinder.conversions.measuring import in_float32, measuring
from sparsefinder.conversions.positions import (
    audit,
    check_target_length,
    replace_embedding,
    resize_buffers,
    sinusoidal_rows,
    tile_rows,
)
from sparsefinder.errors import UserError
from sparsefinder.models.position_tables import CONVENTIONS, reserved_rows_of


def lengthen(model: PreTrainedModel, tokenizer: Any, length: int) -> Certificate:
    """Make a model read ``length`` tokens, in place, and its tokenizer cut there.

    Args:
        model: of one of `sparsefinder.models.FAMILIES`; where positions are relative only the number of tokens is noted.
        tokenizer: its tokenizer.
        length: tokens of the longest input, special ones included.

    Returns:
        The certificate, all of whose checks passed: short texts mean what they did, every row of the table is the one it must be,
        and outputs are finite at the new length.

    Raises:
        UserError: where the model reads more already, or a check fails.
    """
    config: Any = model.config
    rotary = CONVENTIONS.get(config.model_type) == "rotary"
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if not rotary and not hasattr(embeddings, "position_embeddings"):
        raise UserError(
            f"model.max_length={length}: a {config.model_type} has no position table that is known here; leave it out, or give a "
            "masked language model"
        )
    reserved = reserved_rows_of(config)
    before = config.max_position_embeddings - reserved
    check_target_length(before, length)
    texts = [_text(model, tokens) for tokens in sorted({1, 2, before // 2, before})]
    with measuring(in_float32(model)) as source:
        expected = [_states(source, text) for text in texts]
    certificate = Certificate(
        model.name_or_path or type(model).__name__, config.model_type, {"max_length": length, "source_length": before}
    )
    table: Tensor | None = None
    if not rotary:
        table = embeddings.position_embeddings.weight.detach().clone()
        _replace(embeddings, config, length, reserved)
    config.max_position_embeddings = length + reserved
    tokenizer.model_max_length = length
    with measuring(in_float32(model)) as target:
        worst = max(max_difference(e, _states(target, text)) for e, text in zip(expected, texts, strict=True))
        certificate = certificate.with_checks(
            at_most(
                "short-input difference of hidden states", worst, 0.0, f"lengths {[text.shape[1] for text in texts]}"
            ),
            check_finite(
                "outputs that are not finite at the maximum length",
                [_states(target, _text(model, length))],
                f"one input of {length} tokens",
            ),
        )
    if table is not None:
        new: Tensor = embeddings.position_embeddings.weight
        certificate = certificate.with_checks(*check_lengths(tokenizer, length, len(new), reserved))
        if not _sinusoidal(config):
            certificate = certificate.with_checks(check_positions(audit(table, new, reserved=reserved)))
    certificate.require()
    return certificate


def _replace(embeddings: nn.Module, config: Any, length: int, reserved: int) -> None:
    """The position table of ``length`` tokens, and the buffers that have an entry for each of its rows."""
    positions: Any = embeddings.position_embeddings
    if _sinusoidal(config):
        rows = sinusoidal_rows(length, positions.embedding_dim, layout="interleaved")
    else:
        rows = tile_rows(positions.weight.detach(), length, reserved=reserved)
    replace_embedding(positions, rows)
    resize_buffers(embeddings, len(rows))


def _sinusoidal(config: Any) -> bool:
    return bool(getattr(config, "sinusoidal_pos_embds", False))  # of DistilBERT


def _text(model: Any, tokens: int) -> Tensor:
    """Random words but the padding, ``(1, tokens)``."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size - 1, (1, tokens), generator=generator)
    return (ids + (ids >= model.config.pad_token_id)).to(model.device)


def _states(model: Any, text: Tensor) -> Tensor:
    states: Tensor = model.base_model(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state
    return states
