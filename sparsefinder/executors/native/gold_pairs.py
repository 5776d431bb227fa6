"""The hinge that projections learn from pairs of positive probability, in C++ on a CPU.

The slow reference is what `sparsefinder.predictors.contrastive.contrastive_loss` does on other devices. Negatives are the same
for the same chances.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsefinder.executors.native.library import DTYPES, LONG, POINTER, Library, pointers


class _Hinge(ctypes.Structure):
    """``Hinge`` of gold_pairs.cpp: the same fields in the same order."""

    _fields_ = [
        *((name, LONG) for name in ("heads", "tokens", "size", "pairs", "by_row", "threads")),
        ("margin", ctypes.c_double),
        *((name, POINTER) for name in ("rows", "columns", "zeros", "chance")),
    ]


_LIBRARY = Library("gold_pairs", 1, (_Hinge,))


def works_on(x: Tensor) -> bool:
    """Whether ``x`` can be read here."""
    return _LIBRARY.reads(x)


@dataclass(frozen=True)
class Positives:
    """Positives and the chances by which negatives are drawn, as `sparsefinder.predictors.gold_pairs.GoldPairs` has them."""

    rows: Tensor
    columns: Tensor
    zeros: Tensor
    chances: Tensor


def hinge(q: Tensor, k: Tensor, pairs: Positives, margin: float, by_row: bool) -> Tensor:
    """The hinge of squared L2 distances, differentiable once in ``q`` and ``k``: a scalar.

    Args:
        q: ``(H, n, R)``.
        k: ``(H, n, R)``.
        pairs: the positives, and the chances of the negatives.
        margin: of the hinge.
        by_row: one hinge around the sums of a row, instead of one for each pair; see `sparsefinder.quantization`.
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
