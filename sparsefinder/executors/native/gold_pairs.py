"""The support of entmax as a list of pairs, and the hinge that projections learn from it, in C++ on a CPU.

The slow references are what `sparsefinder.predictors.gold_pairs.gold_pairs` and
`sparsefinder.predictors.contrastive.contrastive_loss` do on other devices. Supports are the same but for pairs within rounding
of the threshold; negatives are the same for the same chances.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsefinder.executors.native.library import DTYPES, LONG, POINTER, Library, pointers


class _Rows(ctypes.Structure):
    """``Rows`` of gold_pairs.cpp: the same fields in the same order."""

    _fields_ = [
        *((name, LONG) for name in ("heads", "tokens", "size", "causal", "threads")),
        ("alpha", ctypes.c_double),
    ]


class _Hinge(ctypes.Structure):
    """``Hinge`` of gold_pairs.cpp: the same fields in the same order."""

    _fields_ = [
        *((name, LONG) for name in ("heads", "tokens", "size", "pairs", "by_row", "threads")),
        ("margin", ctypes.c_double),
        *((name, POINTER) for name in ("rows", "columns", "zeros", "chance")),
    ]


_LIBRARY = Library("gold_pairs", 1, (_Rows, _Hinge))


def works_on(x: Tensor) -> bool:
    """Whether ``x`` can be read here."""
    return _LIBRARY.reads(x)


def support(q: Tensor, k: Tensor, causal: bool, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of positive probability under α-entmax of ``q·k / √D``, a few rows of scores at a time.

    ``q``, ``k``: ``(H, n, D)``. Returns ``rows`` and ``columns`` ``(P,)`` int64, sorted by both, row ``h · n + i`` for query
    ``i`` of head ``h``, and how many each row has, ``(H·n,)`` int64.
    """
    q, k = q.contiguous(), k.to(q.dtype).contiguous()
    heads, tokens, size = q.shape
    counts, pairs = torch.zeros(heads * tokens, dtype=torch.int64), POINTER()
    shape = _Rows(heads, tokens, size, causal, torch.get_num_threads(), alpha=alpha)
    function = f"support_{DTYPES[q.dtype]}"
    _LIBRARY.call(function, ctypes.byref(shape), *pointers(q, k, counts), ctypes.byref(pairs))
    try:
        rows, columns = (torch.empty(int(counts.sum()), dtype=torch.int64) for _ in range(2))
        _LIBRARY.call("list", pairs, ctypes.byref(shape), *pointers(counts, rows, columns))
    finally:
        _LIBRARY.call("release", pairs)
    return rows, columns, counts


@dataclass(frozen=True)
class Positives:
    """Positives and the chances by which negatives are drawn, as `sparsefinder.predictors.gold_pairs.GoldPairs` has them."""

    rows: Tensor
    columns: Tensor
    zeros: Tensor
    chances: Tensor


def hinge(q: Tensor, k: Tensor, pairs: Positives, margin: float, by_row: bool) -> Tensor:
    """The hinge of squared L2 distances, differentiable once in ``q`` and ``k (H, n, R)``: a scalar.

    ``by_row``: one hinge around the sums of a row, instead of one for each pair; see `sparsefinder.quantization`.
    """
    loss: Tensor = _Contrast.apply(q, k.to(q.dtype), pairs, margin, by_row)
    return loss


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, pairs: Positives, margin: float, by_row: bool) -> Tensor:
        q, k = q.contiguous(), k.contiguous()
        lists = (x.to(torch.int64).contiguous() for x in (pairs.rows, pairs.columns, pairs.zeros))
        of_pairs = (*lists, pairs.chances.contiguous())
        numbers = (*q.shape, len(pairs.rows), by_row, torch.get_num_threads())
        positives = _Hinge(*numbers, margin, *(x.data_ptr() for x in of_pairs))
        gradients = torch.zeros_like(q), torch.zeros_like(k)
        loss, function = ctypes.c_double(), f"hinge_{DTYPES[q.dtype]}"
        _LIBRARY.call(function, ctypes.byref(positives), *pointers(q, k, *gradients), ctypes.byref(loss))
        ctx.save_for_backward(*gradients)
        return q.new_tensor(loss.value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, k = (gradient * own for own in ctx.saved_tensors)
        return q, k, None, None, None
