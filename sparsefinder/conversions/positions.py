"""Position tables of lengthened models: which rows belong to tokens, how they are repeated, and a proof that they were.

A learned position table has `reserved` leading rows that no token ever uses, and then one row for each token: token i
reads row `reserved + i`. A model for longer inputs repeats the rows of tokens, and only those, so that token i of a
long input reads the source's row

    reserved + (i mod source_length).

The published converter repeats the first 512 of RoBERTa's 514 rows, the two reserved ones among them, and appends the
last two at the very end, so that the 511th and 512th token (and the same two of every further 512) read reserved rows,
which no training has touched (LennartKeller/roberta2longformer, issue 2). `audit` walks a finished table row by row,
and is written apart from the code that builds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparsefinder.errors import UserError

SinusoidLayout = Literal["halves", "interleaved"]

POSITION_BUFFERS = ("position_ids", "token_type_ids")
"""Buffers that embeddings keep, one entry for each row of the position table."""


@dataclass(frozen=True)
class PositionAudit:
    """The outcome of `audit`: how many rows it compared, which differ, and by how much at most."""

    rows_checked: int
    """Rows of the target table that were compared with the row they must hold."""
    wrong_rows: tuple[int, ...]
    """Indices into the target table of the rows that differ by more than the tolerance."""
    max_difference: float
    """Largest absolute difference met; NaN if a row holds one."""

    @property
    def passed(self) -> bool:
        """True when every row holds what it must."""
        return not self.wrong_rows


def check_target_length(source_length: int, target_length: int) -> None:
    """Refuse to shorten a model: raises `UserError` when `target_length` is below `source_length`, both in tokens."""
    if target_length < source_length:
        raise UserError(
            f"maximum length {target_length} is shorter than the source model's {source_length}; "
            f"conversion only lengthens: choose at least {source_length}"
        )


def tile_rows(table: Tensor, length: int, *, reserved: int, target_reserved: int | None = None) -> Tensor:
    """A table for `length` tokens, made by repeating the rows of tokens in `table`.

    Args:
        table: `(reserved + source_length, E)`, any dtype and device.
        length: tokens of the longest input of the target.
        reserved: leading rows of `table` that belong to no token; they stay at the beginning as they are.
        target_reserved: leading rows that the target reserves, by default `reserved`. More: the additional ones are zero. Fewer:
            the last of them are kept.

    Returns:
        `(target_reserved + length, E)` in new memory, same dtype and device; row `target_reserved + i` is `table[reserved + i %
        source_length]`.

    Raises:
        UserError: when `length` is below `source_length`.
        ValueError: when `table` has no row for a token.
    """
    target_reserved = reserved if target_reserved is None else target_reserved
    rows_of_tokens = table[reserved:]
    source_length = len(rows_of_tokens)
    if source_length < 1:
        raise ValueError(f"a table of {len(table)} rows with {reserved} reserved has no row for a token")
    check_target_length(source_length, length)
    tiled = rows_of_tokens[torch.arange(length, device=table.device) % source_length]
    leading = table.new_zeros(target_reserved, table.shape[1])
    kept = min(reserved, target_reserved)
    if kept:
        leading[-kept:] = table[reserved - kept : reserved]
    return torch.cat([leading, tiled])


def sinusoidal_rows(length: int, size: int, *, layout: SinusoidLayout) -> Tensor:
    """The sinusoidal table of Vaswani et al. (2017), recomputed for another length.

    Angle of position p in the pair c of columns: `p / 10000^(2c / size)`. Nothing is repeated: every position gets its own
    row, as in a longer model of the family.

    Args:
        length: tokens.
        size: columns; of an odd size the sines get the additional one.
        layout: `interleaved` puts sine and cosine of a pair side by side (DistilBERT); `halves` puts all sines first and all
            cosines after them (Pegasus, Marian).

    Returns:
        `(length, size)` float32.
    """
    angles = np.arange(length)[:, None] / np.power(10000, 2 * (np.arange(size)[None, :] // 2) / size)
    rows = np.empty((length, size))
    first = (size + 1) // 2
    sines, cosines = (
        (slice(0, first), slice(first, None)) if layout == "halves" else (slice(0, None, 2), slice(1, None, 2))
    )
    rows[:, sines] = np.sin(angles[:, 0::2])
    rows[:, cosines] = np.cos(angles[:, 1::2])
    return torch.from_numpy(rows).float()


def replace_embedding(embedding: nn.Embedding, rows: Tensor) -> None:
    """Give an embedding other rows, in place, so that subclasses (BART's) stay what they are.

    Args:
        embedding: keeps dtype, device and `requires_grad`; `num_embeddings`, which some families use as the bound of their
            positions, is set.
        rows: `(n, E)`.
    """
    weight = embedding.weight
    embedding.weight = nn.Parameter(
        rows.to(dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad
    )
    embedding.num_embeddings = len(rows)


def resize_buffers(module: nn.Module, rows: int) -> tuple[str, ...]:
    """Give every `position_ids` and `token_type_ids` buffer of a model another length.

    Position ids go on counting from the first one they had; token types are zero. Without this a table grows and its
    model still fails at the source's length until it is saved and loaded again (ccdv-ai/convert_checkpoint_to_lsg,
    issues 7 and 9).

    Args:
        module: changed in place, and all below it.
        rows: entries of each buffer.

    Returns:
        The names of the buffers.
    """
    resized = []
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in POSITION_BUFFERS:
                continue
            ids = torch.arange(rows, device=buffer.device, dtype=buffer.dtype)
            ids = ids + buffer[0, 0] if name == "position_ids" else torch.zeros_like(ids)
            persistent = name not in owner._non_persistent_buffers_set
            owner.register_buffer(name, ids[None], persistent=persistent)
            resized.append(f"{prefix}.{name}" if prefix else name)
    return tuple(resized)


def audit(
    source: Tensor,
    target: Tensor,
    *,
    reserved: int,
    target_reserved: int | None = None,
    target_shift: Tensor | None = None,
    tolerance: float = 0.0,
) -> PositionAudit:
    """Compare a tiled table with its source row by row, by counting rows and not by building another table.

    Every row of a token must hold the source's row at `i mod source_length`; reserved rows that both tables have must be equal
    too.

    Args:
        source: `(reserved + source_length, E)`.
        target: `(target_reserved + length, E)`.
        reserved: leading rows of `source` that belong to no token.
        target_reserved: those of `target`, by default `reserved`.
        target_shift: `(E)`, subtracted from the target first: for families that keep a constant of the source (its token-type
            row) in the position table.
        tolerance: largest absolute difference that counts as equal.

    Returns:
        How many rows were compared, and which differ.
    """
    target_reserved = reserved if target_reserved is None else target_reserved
    expected = _expected_rows(len(source), len(target), reserved, target_reserved)
    source, target = source.detach().double().cpu(), target.detach().double().cpu()
    if target_shift is not None:
        target = target - target_shift.detach().double().cpu()
    wrong, worst, checked = [], 0.0, 0
    for row, source_row in expected:
        difference = float((target[row] - source[source_row]).abs().max())
        # `not <=` rather than `>`: a NaN is wrong too.
        if not difference <= tolerance:
            wrong.append(row)
        worst = max(worst, difference) if difference == difference else difference
        checked += 1
    return PositionAudit(checked, tuple(wrong), worst)


def _expected_rows(n_source: int, n_target: int, reserved: int, target_reserved: int) -> Iterator[tuple[int, int]]:
    """Pairs (row of the target, row of the source that it must hold); starts over when the source has no more rows."""
    for kept in range(1, min(reserved, target_reserved) + 1):
        yield target_reserved - kept, reserved - kept
    source_row = reserved
    for row in range(target_reserved, n_target):
        yield row, source_row
        source_row += 1
        if source_row == n_source:
            source_row = reserved


def audit_sinusoidal(
    source: Tensor, target: Tensor, *, layout: SinusoidLayout, tolerance: float = 1e-6
) -> PositionAudit:
    """Check a recomputed sinusoidal table: its first rows against the source's, every row against the formula.

    Args:
        source: `(n, E)`.
        target: `(m, E)`, m >= n.
        layout: as `sinusoidal_rows`.
        tolerance: largest absolute difference to either that counts as equal.

    Returns:
        How many rows were compared, and which agree with neither.
    """
    source, target = source.detach().double().cpu(), target.detach().double().cpu()
    size = target.shape[1]
    frequencies = torch.tensor([10000 ** (-2 * pair / size) for pair in range((size + 1) // 2)], dtype=torch.float64)
    wrong, worst = [], 0.0
    for row in range(len(target)):
        sines, cosines = torch.sin(row * frequencies), torch.cos(row * frequencies)[: size // 2]
        if layout == "halves":
            expected = torch.cat([sines, cosines])
        else:
            expected = torch.stack([sines, torch.cos(row * frequencies)], dim=1).reshape(-1)[:size]
        difference = float((target[row] - expected).abs().max())
        if row < len(source):
            difference = max(difference, float((target[row] - source[row]).abs().max()))
        if not difference <= tolerance:
            wrong.append(row)
        worst = max(worst, difference)
    return PositionAudit(len(target), tuple(wrong), worst)
