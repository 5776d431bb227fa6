"""The tables that a conversion fills: learned global tokens and longer positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder.conversions.positions import replace_embedding, resize_buffers, sinusoidal_rows, tile_rows
from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.settings import MAX_GLOBAL_TOKENS
from sparsefinder.lsg.families import Family


def word_table(model: Any) -> Tensor:
    """Word embeddings of a model, `(V, E)`."""
    weight: Tensor = model.get_input_embeddings().weight.data
    return weight


def global_table(model: Any, family: Family) -> nn.Embedding | None:
    """Learned global tokens of an LSG model; None for a decoder alone, which has none."""
    base = model.base_model
    owner = getattr(base, "encoder", None) if family.encoder_decoder else base.embeddings
    return getattr(owner, "global_embeddings", None)


def position_tables(model: Any, family: Family) -> dict[str, nn.Embedding]:
    """Position tables of a model, plain or LSG, by the part that they belong to."""
    base = model.base_model
    if not family.encoder_decoder:
        return {"position table": base.embeddings.position_embeddings}
    parts = {name: getattr(base, name) for name in ("encoder", "decoder") if hasattr(base, name)}
    return {f"{name}'s position table": part.embed_positions for name, part in parts.items()}


def global_rows(
    words: Tensor,
    positions: Tensor,
    bos_id: int,
    mask_id: int | None,
    *,
    stride: int,
    token_type: Tensor | None = None,
    seed: int = 123,
) -> Tensor:
    """A table of 512 global tokens from a model's own embeddings: word + position (+ token type).

    The first is the beginning-of-text token at position 0, the others are mask tokens at positions `stride` apart (0, 64, …, 448,
    1, 65, … for 512 positions and a stride of 64).

    Args:
        words: word embeddings `(V, E)`.
        positions: `(n, E)` without reserved rows.
        bos_id: id of the beginning-of-text token.
        mask_id: id of the mask token; None draws the others from a normal distribution with mean and covariance of the words.
        stride: in tokens.
        token_type: `(E)`, added to every row; None for none.
        seed: of what is drawn.

    Returns:
        `(512, E)`.
    """
    rows = spread_positions(positions, stride, seed)
    if token_type is not None:
        rows = rows + token_type
    if mask_id is None:
        generator = torch.Generator().manual_seed(seed)
        mean = words.float().mean(0)
        # Σᵢ zᵢ (uᵢ − mean) / √(V − 1) has the covariance of the words, also where that is singular
        draw = torch.randn(MAX_GLOBAL_TOKENS, len(words), generator=generator).to(words.device)
        drawn = (mean + draw @ (words.float() - mean) / max(len(words) - 1, 1) ** 0.5).to(words.dtype)
    else:
        drawn = words[mask_id].expand(MAX_GLOBAL_TOKENS, -1).clone()
    drawn[0] = words[bos_id]
    return rows + drawn


def spread_positions(positions: Tensor, stride: int, seed: int) -> Tensor:
    """512 rows of a position table, ordered so that neighbours lie a stride apart.

    A table that is longer is thinned to 512 rows first; one that is shorter is filled up with draws from a normal distribution
    with its mean and deviation, as in the published converter.

    Args:
        positions: `(n, E)`, without reserved rows.
        stride: positions from one row to the next.
        seed: of the draws.

    Returns:
        `(512, E)`, of the same dtype and device.

    Raises:
        UserError: where the stride does not fit.
    """
    count, width = positions.shape
    if count < MAX_GLOBAL_TOKENS:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(MAX_GLOBAL_TOKENS - count, width, generator=generator).to(positions)
        positions = torch.cat([positions, positions.mean(0) + noise * positions.std(0)])
    factor = len(positions) // MAX_GLOBAL_TOKENS
    step = stride // factor if stride > 0 else 0
    if step < 1 or stride % factor or MAX_GLOBAL_TOKENS % step:
        fitting = ", ".join(str(factor * 2**power) for power in range(10))
        raise UserError(f"global_positional_stride {stride} does not fit {count} positions; choose one of {fitting}")
    thinned = positions[: factor * MAX_GLOBAL_TOKENS : factor]
    return thinned.view(-1, step, width).transpose(0, 1).reshape(-1, width)


def lengthen_positions(model: Any, family: Family, length: int) -> None:
    """Give every position table of a model more rows, and its buffers and configuration with it; the model works at once.

    Learned rows are repeated, reserved ones not; Pegasus' sinusoids are recomputed.

    Args:
        model: a plain or LSG model, changed in place.
        family: its family.
        length: longest input in tokens.
    """
    reserved = family.reserved(model.config)
    for table in position_tables(model, family).values():
        if family.positions == "sinusoidal":
            rows = sinusoidal_rows(length, table.embedding_dim, layout="halves")
        else:
            rows = tile_rows(table.weight.data, length, reserved=reserved)
        replace_embedding(table, rows)
    resize_buffers(model, reserved + length)
    in_config = reserved if family.positions == "after_padding" else 0
    model.config.max_position_embeddings = in_config + length
    for module in model.modules():
        for name in ("max_source_positions", "max_target_positions"):
            if hasattr(module, name):
                setattr(module, name, length)
