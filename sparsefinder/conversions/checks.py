"""What is checked of every converted model, whatever it was converted into."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparsefinder.conversions.certificate import Check, at_most, equals
from sparsefinder.conversions.positions import PositionAudit


def max_difference(expected: Tensor, measured: Tensor, valid: Tensor | None = None) -> float:
    """Largest absolute difference of two tensors over real tokens, in float64.

    Args:
        expected: `(B, N, …)`.
        measured: the same shape.
        valid: `(B, N)`, non-zero on real tokens; None for all.

    Returns:
        NaN if either tensor holds one there; infinity if the shapes differ, so that a check of it fails.
    """
    if expected.shape != measured.shape:
        return math.inf
    if valid is not None:
        expected, measured = expected[valid.bool()], measured[valid.bool()]
    if not expected.numel():
        return 0.0
    return float((expected.detach().double().cpu() - measured.detach().double().cpu()).abs().max())


def check_finite(name: str, tensors: Iterable[Tensor], note: str = "") -> Check:
    """A check that counts numbers that are not finite and allows none."""
    return equals(name, sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors), 0, note)


def check_positions(result: PositionAudit, name: str = "position table, rows that differ") -> Check:
    """The outcome of `positions.audit` as a check."""
    first = f"; first wrong rows {list(result.wrong_rows[:5])}" if result.wrong_rows else ""
    note = f"{result.rows_checked} rows compared one by one, largest difference {result.max_difference:.3g}{first}"
    return equals(name, len(result.wrong_rows), 0, note)


def check_ids(tokenizer: Any, vocab_size: int) -> tuple[Check, ...]:
    """Checks that every id the tokenizer can give has a row among the word embeddings.

    The distilled BART checkpoints have a mask id that equals the vocabulary size, and fail only once a text is masked.

    Args:
        tokenizer: a tokenizer of transformers.
        vocab_size: how many word embeddings there are.

    Returns:
        One check for the largest id of the vocabulary and one for each special token that is set (mask, pad, …).
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    checks = [at_most("largest token id", largest, vocab_size - 1, "last row of the word embeddings")]
    for role in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token_id = getattr(tokenizer, f"{role}_id", None)
        if token_id is not None:
            inside = 0 <= token_id < vocab_size
            checks.append(Check(f"id of {role}", token_id, vocab_size - 1, inside, repr(getattr(tokenizer, role))))
    return tuple(checks)


def check_lengths(tokenizer: Any, length: int, rows: int, reserved: int) -> tuple[Check, ...]:
    """Checks that tokenizer and position table agree on the maximum length.

    Args:
        tokenizer: a tokenizer of transformers, which must cut at `length`.
        length: the maximum in tokens; the last of them reads row `reserved + length - 1`.
        rows: of the position table.
        reserved: its leading rows that belong to no token.

    Returns:
        The two checks.
    """
    last = reserved + length - 1
    return (
        equals("tokenizer's model_max_length", int(tokenizer.model_max_length), length),
        at_most("last position row at the maximum length", last, rows - 1, "last row of the position table"),
    )
