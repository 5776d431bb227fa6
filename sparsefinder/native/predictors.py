"""Nearest centroids and chosen clusters of every token, in C++ on a CPU.

The slow references are `sparsefinder.kmeans_centroids.nearest_by_products` and `sparsefinder.selection.select`: results are the
same but for ties and the last bit of a score, where two centroids are equally near or a cluster lies on the threshold.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsefinder.native.build import available, load

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class _Choice(ctypes.Structure):
    """``Choice`` of predictors.cpp: the same fields in the same order."""

    _fields_ = [
        *((name, _LONG) for name in ("groups", "rows", "columns", "numbers_row", "budget", "threads")),
        *((name, ctypes.c_double) for name in ("level", "alpha")),
    ]


def works_on(x: Tensor) -> bool:
    """Whether ``x`` can be read here: float32 or float64 on a CPU, where a C++ compiler is or was at hand."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and available("predictors")


def nearest(x: Tensor, centres: Tensor, top: int) -> Tensor:
    """The ``top`` nearest centroids in each run, the nearest first: ``x (B, H, N, R)`` → ``(B, H, N, runs · top)`` int64.

    ``centres``: ``(H, runs, C, R)``; run ``u`` uses the ids ``u · C … u · C + C − 1``.
    """
    x, centres = x.contiguous(), centres.to(x.dtype).contiguous()
    runs, count, _ = centres.shape[1:]
    ids = torch.empty(*x.shape[:3], runs * top, dtype=torch.int64)
    numbers = (_LONG(n) for n in (*x.shape, runs, count, top, torch.get_num_threads()))
    getattr(load("predictors"), f"nearest_{_DTYPES[x.dtype]}")(*numbers, *_pointers(x, centres, ids))
    return ids


def moments(x: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number ``(B, H, C)``, mean and variance ``(B, H, C, R)`` of the vectors ``x (B, H, N, R)`` in each of ``count`` clusters.

    ``ids``: ``(B, H, N)`` int64; whoever has an id outside ``[0, count)`` is in none. An empty cluster has zeros.
    """
    x, ids = x.contiguous(), ids.contiguous()
    batch, heads, tokens, size = x.shape
    numbers = x.new_zeros(batch, heads, count)
    mean, variance = (x.new_zeros(batch, heads, count, size) for _ in range(2))
    shape = (_LONG(n) for n in (batch * heads, tokens, size, count, torch.get_num_threads()))
    call = getattr(load("predictors"), f"moments_{_DTYPES[x.dtype]}")
    call(*shape, *_pointers(x, ids, numbers, mean, variance))
    return numbers, mean, variance


def chosen(scores: Tensor, numbers: Tensor, rule: str, level: float, alpha: float) -> Tensor:
    """The columns that each row keeps by `sparsefinder.selection`, ``(B, H, N, M)`` → ids ``(B, H, N, P)`` int64, then -1.

    ``numbers``: keys behind each column, ``(B, H, N or 1, M)``. P is what the busiest row needs.
    """
    scores, numbers = scores.contiguous(), numbers.to(scores.dtype).contiguous()
    *groups, rows, columns = scores.shape
    total, threads, library = scores.shape[:-1].numel(), torch.get_num_threads(), load("predictors")
    own = int(numbers.shape[-2] == rows)
    choice = _Choice(total // max(rows, 1), rows, columns, own, rule == "budget", threads, level, alpha)
    kept, counts = torch.empty(total, columns, dtype=torch.int32), torch.empty(total, dtype=torch.int32)
    call = getattr(library, f"choose_{_DTYPES[scores.dtype]}")
    call(ctypes.byref(choice), *_pointers(scores, numbers, kept, counts))
    most = int(counts.max()) if total else 0
    ids = torch.empty(*groups, rows, most, dtype=torch.int64)
    library.spread(*(_LONG(n) for n in (total, columns, most, threads)), *_pointers(kept, counts, ids))
    return ids


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [_POINTER(x.data_ptr()) for x in tensors]
