"""Exact dense entmax attention in C++, without a matrix of N × N.

With ``x_j = (α−1) q·k_j/√D`` the threshold of entmax lies at most 1 below the largest ``x``, so a key further below it has
probability zero, whatever the others are; and the threshold of some of the keys is never above that of all. So one pass over the
keys keeps, for each query, the few that can still be in the support. In that pass products are taken of vectors rounded to 8
bits, with a bound of what the rounding can do (AVX-512 VNNI; with AVX2 keys are rounded to 7; elsewhere, and in float64,
nothing is): it may let keys pass, it never loses one. What passes is multiplied exactly. The threshold is Newton's on those
alone, the product with ``v`` and the gradients visit the support, and all that is kept for the backward pass is a peak and a
threshold for each query: with them the same pass finds the support again.

Work is ``N²·D`` operations on bytes and what the support costs; a row of equal scores costs what dense attention costs. Memory,
beyond the result, is linear: the rounded keys, and the candidates of a few queries for each thread.

The slow reference is `sparsefinder.attention.Masked` of ``Full()``. The formulas are those of
`sparsefinder.numerics.normalizers`.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsefinder.executors.native.library import DTYPES, LONG, POINTER, Library, pointers
from sparsefinder.executors.workload import Pairs, Work, check_shapes
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.numerics.padding import exactly


class _Problem(ctypes.Structure):
    """``Problem`` of dense_rows.hpp: the same fields in the same order."""

    _fields_ = [
        *((name, LONG) for name in ("batch", "heads", "key_heads", "queries", "keys", "size", "back", "ahead")),
        *((name, LONG) for name in ("mask_batch", "mask_head", "mask_row", "threads", "seed", "without")),
        *((name, POINTER) for name in ("query_valid", "key_valid", "mask", "alpha")),
        *((name, ctypes.c_double) for name in ("scale", "dropped")),
    ]


_LIBRARY = Library("dense", 1, (_Problem,))


class NativeDenseExecutor:
    """Dense attention on a CPU: exact products with the keys that can be in the support."""

    name = "native"
    never_automatic = ""

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        return _LIBRARY.why_not(work)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead, dropout: float
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k``, ``v (B, H_k, N_k, D)``, of any precision → ``(B, H, N_q, D)``, float32 at least."""
        seed = int(torch.randint(1 << 62, ())) if dropout else 0
        return attend(*exactly(q, k, v), pairs, _of_heads(normalizer, q.shape[1]), dropout, seed)

    def support(
        self, q: Tensor, k: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, keys and probabilities of the pairs of positive probability; see `support`."""
        return support(q, k, pairs, _of_heads(normalizer, q.shape[1]))


def _of_heads(normalizer: Normalizer | PerHead, heads: int) -> Tensor:
    alpha = normalizer.alpha
    return alpha if isinstance(alpha, Tensor) else torch.full((heads,), alpha, dtype=torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Pairs,
    alpha: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
    without: int = 0,
) -> Tensor:
    """α-entmax attention on ``pairs``, differentiable once in ``q``, ``k``, ``v`` and ``alpha``: ``(B, H, N_q, D)``.

    A query that is padding or has no key gets zeros.

    Args:
        q: ``(B, H, N_q, D)``; with ``k`` and ``v`` all float32, or all float64, on a CPU.
        k: ``(B, H_k, N_k, D)`` with ``H`` a multiple of ``H_k``.
        v: of the shape of ``k``.
        pairs: which there are.
        alpha: ``(H,)``, each 1 < α ≤ 2.
        dropout: share of the probabilities that are set to zero, the others divided by what is left.
        seed: chooses them.
        without: filters that are left out, the fastest first, as on a processor that lacks the instructions (for tests): 1
            that of AVX-512, 2 that of AVX2 too.

    Raises:
        ValueError: the shapes do not belong together.
    """
    check_shapes(q, k, v)
    run = _Run(pairs, dropout, seed, without)
    result: Tensor = _Attend.apply(q, k, v, alpha, run)
    return result


def support(q: Tensor, k: Tensor, pairs: Pairs, alpha: Tensor, without: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of positive probability that `attend` multiplies with ``v``, as lists in order of queries and then of keys.

    Arguments as those of `attend`. Returns how many pairs each query has, ``(B, H, N_q)`` int64; their keys, ``(P,)`` int64; and
    their probabilities, ``(P,)`` in the dtype of ``q``. A query that meets a NaN has none.
    """
    q, k = q.detach().contiguous(), k.detach().to(q.dtype).contiguous()
    counts = torch.zeros(q.shape[:3], dtype=torch.int64)
    found, kind = POINTER(), DTYPES[q.dtype]
    _Run(pairs, 0.0, 0, without)("support", q, k, alpha, counts, also=ctypes.byref(found))
    try:
        total = int(counts.sum())
        keys, probabilities = torch.empty(total, dtype=torch.int64), q.new_empty(total)
        _LIBRARY.call(f"list_{kind}", found, *pointers(keys, probabilities))
    finally:
        _LIBRARY.call(f"release_{kind}", found)
    return counts, keys, probabilities


@dataclass(frozen=True)
class _Run:
    """One call of a function of the library."""

    pairs: Pairs
    dropout: float
    seed: int
    without: int

    def __call__(self, function: str, q: Tensor, k: Tensor, alpha: Tensor, *tensors: Tensor, also: Any = None) -> None:
        """``tensors``: contiguous, what the function reads behind ``q`` and ``k``, then what it writes; ``also``: behind them."""
        (batch, heads, queries, size), (key_heads, keys) = q.shape, k.shape[1:3]
        pairs, everything = self.pairs, max(queries, keys)
        valid = pairs.query_valid.contiguous(), pairs.key_valid.contiguous()
        alphas = alpha.detach().to("cpu", torch.float64).expand(heads).contiguous()
        mask = pairs.mask
        steps = [0, 0, 0]
        if mask is not None:
            mask = mask if mask.stride(-1) == 1 else mask.contiguous()
            steps = [0 if side == 1 else mask.stride(dimension) for dimension, side in enumerate(mask.shape[:3])]
        problem = _Problem(
            *(batch, heads, key_heads, queries, keys, size),
            *(everything if pairs.back is None else pairs.back, everything if pairs.ahead is None else pairs.ahead),
            *(*steps, torch.get_num_threads(), self.seed, self.without),
            *(*(x.data_ptr() for x in valid), None if mask is None else mask.data_ptr(), alphas.data_ptr()),
            *(1.0 / math.sqrt(size), self.dropout),
        )
        last = () if also is None else (also,)
        _LIBRARY.call(f"{function}_{DTYPES[q.dtype]}", ctypes.byref(problem), *pointers(q, k, *tensors), *last)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, run: _Run) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.zeros_like(q)
        peaks, thresholds = (q.new_empty(q.shape[:3], dtype=torch.float64) for _ in range(2))
        run("forward", q, k, alpha, v, out, peaks, thresholds)
        ctx.save_for_backward(q, k, v, alpha, peaks, thresholds)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        q, k, v, alpha, peaks, thresholds = ctx.saved_tensors
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
        of_alpha = torch.zeros(q.shape[:2], dtype=torch.float64)
        gradient = gradient.to(q.dtype).contiguous()
        ctx.run("backward", q, k, alpha, v, gradient, peaks, thresholds, of_q, of_k, of_v, of_alpha)
        return of_q, of_k, of_v, of_alpha.sum(0).to(alpha) if ctx.needs_input_grad[3] else None, None
