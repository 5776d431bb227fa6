"""The nearest centroid of every vector in C++ on a CPU: among all of them, or level by level.

The slow references are ``nearest_by_products`` and ``nearest_child_by_products`` of `sparsefinder.predictors.nearest_clusters`:
results are the same but where two centroids are equally near to the last bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsefinder.executors.native.library import DTYPES, LONG, Library, Rows, pointers, with_rows

Biased = tuple[Tensor, Tensor]
"""Centroids ``(H, C, D)``, and what is added to the product of a vector with each ``(H, C)``: ``−|c|²/2`` for the nearest."""


class _Problem(ctypes.Structure):
    """``Problem`` of nearest_centroids.cpp: the same fields in the same order."""

    _fields_ = [(name, LONG) for name in ("batch", "heads", "tokens", "size", "entrance", "count", "threads")]


_LIBRARY = Library("nearest_centroids", 1, (_Problem, Rows), wide=True)


def works_on(x: Tensor) -> bool:
    """Whether ``x`` can be read here."""
    return _LIBRARY.reads(x)


def nearest(x: Tensor, centres: Biased, entrance: Biased | None = None) -> Tensor:
    """The centroid with the largest ``x·c + bias``; in a tree the best child of the best one of the entrance.

    Args:
        x: ``(B, H, N, D)``, of any strides; a vector with NaN gets any id.
        centres: C of them.
        entrance: E of them, a divisor of C; the children of number ``e`` are ``e · C/E … (e + 1) · C/E − 1``.

    Returns:
        Ids ``(B, H, N)`` int64.
    """
    x = with_rows(x)
    doors = (x.new_empty(x.shape[1], 0, x.shape[-1]), x.new_empty(x.shape[1], 0)) if entrance is None else entrance
    read = [each.to(x.dtype).contiguous() for each in (*doors, *centres)]
    ids = torch.empty(x.shape[:3], dtype=torch.int64)
    problem = _Problem(*x.shape, read[0].shape[1], read[2].shape[1], torch.get_num_threads())
    _LIBRARY.call(f"nearest_{DTYPES[x.dtype]}", ctypes.byref(problem), Rows.of(x), *pointers(*read, ids))
    return ids
