"""Attention on a layout, query by query, in C++: the fast way on a CPU.

Where `sparsefinder.executors.blocks.decompose` cuts a layout into dense blocks, pads them to like sizes, and moves their
scores into rows, this lists a query's keys, multiplies with those alone and finishes the row while it is in the first cache:
with entmax most values are then never read, since their weight is zero. The backward pass computes a row again instead of
keeping it. Work is that of the pairs in the graph; memory, beyond the result, is a few numbers per token and one row per
thread.

The formulas are those of `sparsefinder.attention` and `sparsefinder.numerics.normalizers`; results differ from theirs by
rounding only.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsefinder.executors.native.library import DTYPES, LONG, POINTER, Library, pointers
from sparsefinder.executors.workload import Work
from sparsefinder.graphs import QK, Layout
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.padding import at_least_float32


class _Graph(ctypes.Structure):
    """``Graph`` of bucketed.cpp: the same fields in the same order."""

    _fields_ = [
        *(
            (name, LONG)
            for name in ("batch", "heads", "group", "queries", "tokens", "size", "q_slots", "k_slots", "buckets")
        ),
        *((name, LONG) for name in ("back", "ahead", "causal", "threads")),
        *((name, POINTER) for name in ("q_ids", "k_ids", "query_valid", "valid", "is_global")),
        ("alpha", ctypes.c_double),
    ]


_LIBRARY = Library("bucketed", 2, (_Graph,))


class NativeExecutor:
    """A layout on a CPU: the pairs of the graph and no others."""

    name = "native"
    never_automatic = ""

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        if work is not None and work.tail:
            return "multiplies the keys of a layout, not its tail"
        return _LIBRARY.why_not(work)

    def attend(self, qk: QK, v: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """``v (B, H_k, N_k, D)`` and vectors without what padding contained → ``(B, H, N_q, D)`` in the dtype of ``v``."""
        exact = qk.with_vectors(at_least_float32(qk.q), at_least_float32(qk.k))
        return attend(exact, v, layout, normalizer.alpha)

    def computed_pairs(self, qk: QK, layout: Layout) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64."""
        return pairs(qk, layout)


def attend(qk: QK, v: Tensor, layout: Layout, alpha: float) -> Tensor:
    """Entmax attention (softmax where α = 1) on the pairs of ``layout``, differentiable once in ``q``, ``k`` and ``v``.

    Padding and queries without a key get zeros, whatever padded positions contain.

    Args:
        qk: queries ``(B, H, N_q, D)`` and keys ``(B, H_k, N_k, D)``, float32 or float64, on a CPU.
        v: of the shape of the keys and any floating point.
        layout: the pairs.
        alpha: from 1 to 2.

    Returns:
        ``(B, H, N_q, D)`` in the dtype of ``v``.
    """
    if v.shape != qk.k.shape:
        raise ValueError(f"values must be of the shape of the keys, {tuple(qk.k.shape)}, got {tuple(v.shape)}")
    run = _Run(layout, qk, alpha)
    result: Tensor = _Attend.apply(qk.q, qk.k.to(qk.q.dtype), v.to(qk.q.dtype), run)
    return result.to(v.dtype)


def pairs(qk: QK, layout: Layout) -> Tensor:
    """Pairs of ``layout``, each counted once: ``(B, H)`` int64, on a CPU and without a matrix of N × N."""
    counts = torch.zeros(qk.q.shape[:2], dtype=torch.int64)
    _Run(layout, qk, 1.0)("count", counts)
    return counts


class _Run:
    """One call of a function of the library: a layout of tokens, without their vectors."""

    def __init__(self, layout: Layout, qk: QK, alpha: float):
        if layout.window or layout.is_global is not None:
            qk.one_text("a window or global tokens")
        self.layout, self.alpha, self.causal = layout, alpha, qk.causal
        self.query_valid, self.valid = qk.queries_valid, qk.valid
        self.shape, self.group = qk.graph_shape, qk.group
        self.size = qk.q.shape[-1]

    def __call__(self, function: str, *tensors: Tensor) -> None:
        """``tensors``: contiguous, what the function reads and then what it writes."""
        # whatever could be broadcast is written out: C++ reads by the shape alone
        batch, heads, queries, keys = self.shape
        buckets, nobody = self.layout.buckets, torch.empty(batch, heads, 1, 0, dtype=torch.int64)
        each = (nobody, nobody) if buckets is None else (buckets.q_ids, buckets.k_ids)
        q_ids, k_ids = (
            ids.expand(batch, heads, tokens, -1).to(torch.int64).contiguous()
            for ids, tokens in zip(each, (queries, keys), strict=True)
        )
        is_global = torch.zeros_like(self.valid) if self.layout.is_global is None else self.layout.is_global
        masks = (self.query_valid.contiguous(), self.valid.contiguous(), is_global.expand_as(self.valid).contiguous())
        slots = q_ids.shape[-1], k_ids.shape[-1], 0 if buckets is None else buckets.count
        reach = self.layout.window // 2
        back, ahead = (reach, reach) if self.layout.window else (-1, -1)
        read = (x.data_ptr() for x in (q_ids, k_ids, *masks))
        graph = _Graph(
            *(batch, heads, self.group, queries, keys, self.size, *slots),
            *(back, ahead, self.causal, torch.get_num_threads()),
            *read,
            self.alpha,
        )
        _LIBRARY.call(function, ctypes.byref(graph), *pointers(*tensors))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: _Run) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.zeros_like(q)
        run(f"forward_{DTYPES[q.dtype]}", q, k, v, out)
        ctx.save_for_backward(q, k, v)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors  # asked for once: under gradient checkpointing they are there once
        read = (*saved, gradient.contiguous())
        q, k, v = (torch.zeros_like(x) for x in saved)
        ctx.run(f"backward_{DTYPES[q.dtype]}", *read, q, k, v)
        return q, k, v, None
