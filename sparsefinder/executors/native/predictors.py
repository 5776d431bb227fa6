"""Nearest centroids and chosen clusters of every token, in C++ on a CPU.

The slow references are ``nearest_by_products`` of `sparsefinder.predictors.nearest_clusters` and what
`sparsefinder.patterns.routed` does on other devices: results are the same but for the last bit of a score, where two centroids
are equally near or a cluster lies on the threshold.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsefinder.executors.native.library import DTYPES, LONG, POINTER, Library, pointers


class _Choice(ctypes.Structure):
    """``Choice`` of predictors.cpp: the same fields in the same order."""

    _fields_ = [
        *((name, LONG) for name in ("heads", "groups", "rows", "columns", "branching", "budget", "threads")),
        ("levels", POINTER),
        ("alpha", ctypes.c_double),
    ]


_LIBRARY = Library("predictors", 5, (_Choice,))


def works_on(x: Tensor) -> bool:
    """Whether ``x`` can be read here."""
    return _LIBRARY.reads(x)


def nearest(x: Tensor, centres: Tensor, top: int) -> Tensor:
    """The nearest centroids in each run, the nearest first.

    Args:
        x: ``(B, H, N, R)``.
        centres: ``(H, runs, C, R)``; run ``u`` uses the ids ``u · C … u · C + C − 1``.
        top: how many of each run.

    Returns:
        Ids ``(B, H, N, runs · top)`` int64.
    """
    x, centres = x.contiguous(), centres.to(x.dtype).contiguous()
    runs, count, _ = centres.shape[1:]
    ids = torch.empty(*x.shape[:3], runs * top, dtype=torch.int64)
    numbers = (LONG(n) for n in (*x.shape, runs, count, top, torch.get_num_threads()))
    _LIBRARY.call(f"nearest_{DTYPES[x.dtype]}", *numbers, *pointers(x, centres, ids))
    return ids


def moments(x: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and variance of the vectors in each cluster; an empty one has zeros.

    Args:
        x: ``(B, H, N, R)``.
        ids: ``(B, H, N)`` int64; whoever has an id outside ``[0, count)`` is in no cluster.
        count: clusters ``C``.

    Returns:
        ``(B, H, C)``, ``(B, H, C, R)`` and ``(B, H, C, R)``.
    """
    x, ids = x.contiguous(), ids.contiguous()
    batch, heads, tokens, size = x.shape
    numbers = x.new_zeros(batch, heads, count)
    mean, variance = (x.new_zeros(batch, heads, count, size) for _ in range(2))
    shape = (LONG(n) for n in (batch * heads, tokens, size, count, torch.get_num_threads()))
    _LIBRARY.call(f"moments_{DTYPES[x.dtype]}", *shape, *pointers(x, ids, numbers, mean, variance))
    return numbers, mean, variance


def routed(
    q: Tensor,
    numbers: Tensor,
    mean: Tensor,
    variance: Tensor,
    rule: str,
    level: float | Tensor,
    alpha: float,
    entrance: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The clusters that each query keeps by `sparsefinder.numerics.selection`: ids ``(B, H, N, P)`` int64, then -1.

    Scores are ``q_i·μ_c + √(Σ_r q_ir² σ²_cr)``, a few rows of them at a time. P is what the busiest query needs.

    Args:
        q: ``(B, H, N, R)``.
        numbers: ``(B, H, C)``, keys in each cluster.
        mean: ``(B, H, C, R)``.
        variance: ``(B, H, C, R)``.
        rule: ``budget`` or ``margin``.
        level: of the rule; one for all heads, or ``(H,)``.
        alpha: of entmax, for the margin.
        entrance: number, mean and variance of fewer clusters, each of which holds equally many of these, side by side: a
            query looks into those alone that it opens (`sparsefinder.patterns.routed`). None: at every cluster.
    """
    doors = tuple(x.to(q.dtype).contiguous() for x in entrance or (numbers, mean, variance))
    read = tuple(x.to(q.dtype).contiguous() for x in (q, numbers, mean, variance)) + doors
    branching = numbers.shape[-1] // doors[0].shape[-1] if entrance else 0
    return _kept("route", q, read, numbers.shape[-1], branching, rule, level, alpha)


def routed_causally(q: Tensor, ids: Tensor, centres: Tensor, rule: str, level: float | Tensor, alpha: float) -> Tensor:
    """The clusters that each query of causal attention keeps, as `routed`: it counts the keys up to itself.

    Args:
        q: ``(B, H, N, R)``.
        ids: ``(B, H, N)`` int64, the cluster of each key; who has an id outside ``[0, C)`` is no key.
        centres: ``(H, C, R)``, which stand for the keys in them; the score of a cluster is ``q_i·μ_c``.
        rule: ``budget`` or ``margin``.
        level: of the rule; one for all heads, or ``(H,)``.
        alpha: of entmax, for the margin.
    """
    read = (q.contiguous(), centres.to(q.dtype).contiguous(), ids.contiguous())
    return _kept("route_causal", q, read, centres.shape[1], 0, rule, level, alpha)


def _kept(
    what: str,
    q: Tensor,
    read: tuple[Tensor, ...],
    columns: int,
    branching: int,
    rule: str,
    level: float | Tensor,
    alpha: float,
) -> Tensor:
    batch, heads, rows, size = q.shape
    counts, kept = torch.zeros(batch, heads, rows, dtype=torch.int32), POINTER()
    levels = torch.as_tensor(level, dtype=torch.float64).expand(heads).contiguous()
    shape = (heads, batch * heads, rows, columns)
    choice = _Choice(*shape, branching, rule == "budget", torch.get_num_threads(), *pointers(levels), alpha)
    function = f"{what}_{DTYPES[q.dtype]}"
    _LIBRARY.call(function, ctypes.byref(choice), LONG(size), *pointers(*read, counts), ctypes.byref(kept))
    try:
        most = int(counts.max()) if counts.numel() else 0
        ids = torch.empty(batch, heads, rows, most, dtype=torch.int64)
        _LIBRARY.call("spread", kept, ctypes.byref(choice), LONG(most), *pointers(counts, ids))
    finally:
        _LIBRARY.call("release", kept)
    return ids
