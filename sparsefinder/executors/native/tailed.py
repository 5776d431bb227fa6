"""Attention on clusters of keys in C++, those that a query does not take as one entry each: the fast way on a CPU.

`sparsefinder.executors.native.bucketed` multiplies a query at a time with keys that lie anywhere. Here the keys and values of a
head are sorted by cluster once and laid in panels, as are the means, variances and mean values of the clusters; a block of
queries goes over the clusters as if these were keys, and then, cluster after cluster, those queries that take it go over its
keys together. All products are of a few queries with a panel of keys whose sums stay in registers, exponentials are taken lane
by lane, and the number that they are compared with is known from the entries before a key is looked at.

With entmax a row keeps what may lie above its threshold, which the entries bound from below, and nothing else. Keys of a window
and global ones are multiplied besides, and taken off the entries that they lie in.

Of causal attention a thread goes through a head from the first query to the last: a key joins what its cluster amounts to when
its own query is reached, and of a cluster that is taken the later keys are left out. Backward goes from the last query to the
first, and takes the keys away again.

Of softmax a layout without a tail is multiplied in the same panels, without the clusters: a row begins with the mean of one that
it takes instead of its entries. Where buckets fill their panels that is several times as fast as a query at a time.

Which clusters a query takes is given, or it is decided here from the entries themselves (`sparsefinder.patterns.refined`),
which are known by then: so routing costs a comparison an entry.

The formulas are those of `sparsefinder.numerics.tail_normalizer`; results differ from those of
`sparsefinder.executors.blocks.tail` by rounding only.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsefinder.executors.native.bucketed import pairs
from sparsefinder.executors.native.library import DTYPES, LONG, POINTER, Library, Rows, with_rows
from sparsefinder.executors.workload import Work
from sparsefinder.graphs import QK, ChosenBuckets, Layout
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.padding import exactly


class _Problem(ctypes.Structure):
    """``Problem`` of surroundings.hpp: the same fields in the same order."""

    _fields_ = [
        *((name, LONG) for name in ("batch", "heads", "group", "queries", "keys", "size")),
        *((name, LONG) for name in ("slots", "clusters", "threads", "reach", "tail", "causal")),
        *((name, POINTER) for name in ("q_ids", "k_ids", "query_valid", "key_valid", "is_global", "levels")),
        ("alpha", ctypes.c_double),
    ]


_LIBRARY = Library("tailed", 3, (_Problem, Rows), wide=True)


class TailedExecutor:
    """A layout with a tail on a CPU, and of softmax one without whose buckets share no key."""

    name = "tailed"
    never_automatic = ""

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        if work is not None and not work.tail and (work.alpha != 1.0 or not work.disjoint):
            return "multiplies layouts with a tail, and of softmax others whose buckets share no key"
        return _LIBRARY.why_not(work)

    def attend(self, qk: QK, v: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """``v (B, H_k, N_k, D)`` and vectors without what padding contained → ``(B, H, N_q, D)`` in the dtype of ``v``."""
        return attend(qk, v, layout, normalizer.alpha)

    def computed_pairs(self, qk: QK, layout: Layout) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64; an entry of a tail is one too."""
        return pairs(qk, layout) + qk.q.shape[2] * layout.entries


def attend(qk: QK, v: Tensor, layout: Layout, alpha: float = 1.0) -> Tensor:
    """Attention on clusters of keys, differentiable once in queries, keys and values.

    Padding and queries without a key get zeros.

    Args:
        qk: queries ``(B, H, N_q, D)`` and keys ``(B, H_k, N_k, D)`` of any floating point, on a CPU, zeros on padding.
        v: of the shape of the keys, the same.
        layout: every key in one bucket at most; with a tail, or of softmax without.
        alpha: of the normalizer, from 1, softmax, to 2.

    Returns:
        ``(B, H, N_q, D)`` in the dtype of ``v``, its memory ``(B, N_q, H, D)``, as that of torch's attention.
    """
    if v.shape != qk.k.shape:
        raise ValueError(f"values must be of the shape of the keys, {tuple(qk.k.shape)}, got {tuple(v.shape)}")
    result: Tensor = _Attend.apply(*exactly(qk.q, qk.k, v), _Run(layout, qk, alpha))
    return result.to(v.dtype)


class _Run:
    """One call of a function of the library: a layout of tokens, without their vectors."""

    def __init__(self, layout: Layout, qk: QK, alpha: float):
        assert layout.buckets is not None
        assert layout.tail or alpha == 1.0
        self.tail = layout.tail
        if layout.window or layout.is_global is not None:
            qk.one_text("a window or global tokens")
        if qk.causal:
            qk.one_text("causal attention")
        buckets, self.alpha = layout.buckets, alpha
        self.shape, self.group, self.count = qk.graph_shape, qk.group, buckets.count
        self.reach, self.causal = layout.window // 2 if layout.window else -1, qk.causal
        self.is_global = None if layout.is_global is None else layout.is_global.expand_as(qk.valid).contiguous()
        batch, heads, queries, keys = self.shape
        self.levels, q_ids = None, torch.empty(batch, heads, 1, 0, dtype=torch.int64)
        if (
            layout.tail and isinstance(buckets, ChosenBuckets) and buckets.alpha == alpha
        ):  # here, by what the entries weigh anyway
            self.levels = buckets.levels.to(torch.float64).expand(heads).contiguous()
        else:
            q_ids = buckets.q_ids
        self.q_ids, self.k_ids = (
            ids.expand(batch, heads, tokens, -1).to(torch.int64).contiguous()
            for ids, tokens in ((q_ids, queries), (buckets.k_ids, keys))
        )
        self.masks = qk.queries_valid.contiguous(), qk.valid.contiguous()

    def __call__(self, function: str, *tensors: Tensor) -> None:
        """``tensors``: what the function reads and then what it writes; rows ``(B, H, N, D)``, or contiguous ``(B, H, N)``."""
        batch, heads, queries, keys = self.shape
        problem = _Problem(
            *(batch, heads, self.group, queries, keys, tensors[0].shape[-1]),
            *(self.q_ids.shape[-1], self.count, torch.get_num_threads(), self.reach, self.tail, self.causal),
            *(x.data_ptr() for x in (self.q_ids, self.k_ids, *self.masks)),
            *(None if x is None else x.data_ptr() for x in (self.is_global, self.levels)),
            self.alpha,
        )
        arguments = (Rows.of(x) if x.ndim == 4 else POINTER(x.data_ptr()) for x in tensors)
        _LIBRARY.call(f"{function}_{DTYPES[tensors[0].dtype]}", ctypes.byref(problem), *arguments)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: _Run) -> Tensor:
        q, k, v = (with_rows(x) for x in (q, k, v))
        batch, heads, queries, size = q.shape
        out = q.new_empty(batch, queries, heads, size).transpose(1, 2)
        peaks = q.new_empty(batch, heads, queries)
        run("forward", q, k, v, out, peaks)
        ctx.save_for_backward(q, k, v, out, peaks)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, peaks = ctx.saved_tensors
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
        ctx.run("backward", q, k, v, out, with_rows(gradient), of_q, of_k, of_v, peaks)
        return of_q, of_k, of_v, None
