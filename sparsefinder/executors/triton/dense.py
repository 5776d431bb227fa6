"""Exact dense α-entmax attention in Triton, forward and backward, without a matrix of N × N.

A program has a block of queries and goes over tiles of the keys that they may see: once for each row's largest score, a few times
for its threshold by Newton's method on the p-norm (`sparsefinder.numerics.entmax_newton`), once for the output. Scores are
computed again each time, and only a peak and a threshold of each row are kept. The backward pass has probabilities from
these: blocks of queries find ``δ_i = Σ_j s_ij (g_i·v_j) / Σ_j s_ij`` with ``s = p^{2−α}``, then ``ds_ij = s_ij (g_i·v_j − δ_i)``
gives ``dq``; blocks of keys, ``dk`` and ``dv`` (AdaSplash, https://arxiv.org/abs/2502.12082, has the same tiled form). Unlike
the C++ executor this one takes every product, in each of its passes.

Scores, sums, thresholds and probabilities are float32; products of half-precision vectors are accumulated in float32.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsefinder.executors.triton.executor import INTERPRET, UNMEASURED, check_block, why_not
from sparsefinder.executors.workload import Pairs, Work, check_shapes
from sparsefinder.numerics.normalizers import Normalizer, PerHead

# Newton's steps, each a pass over the keys: until no row of the block moves by more than rounding, which ordinary rows reach
# after STEPS of numerics/entmax_newton.py (more for α = 2) and one that does not move
MOST, STILL = 64, 2 * torch.finfo(torch.float32).eps
# bytes of a tile of vectors: several, loaded ahead, must fit the memory that a block of threads shares, some 100 KB on most
# cards; compiled for tiles of twice this in float32, `dkv_kernel` asks for 130
WIDEST = 1 << 13


@dataclass(frozen=True)
class TritonDenseExecutor:
    """Dense entmax attention on a GPU, whose scores are never in memory."""

    block: int = 64  # queries and keys of a tile at most: a power of two, 16 or more
    name = "triton"
    never_automatic = UNMEASURED

    def __post_init__(self) -> None:
        check_block(self.block)

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        if reason := why_not(work):
            return reason
        if work is None:
            able = torch.cuda.is_available() or os.environ.get(INTERPRET) == "1"
            return "" if able else "needs a GPU with CUDA, and torch sees none"
        if work.masked:
            return "has no masks but padding, causal and window"
        if work.dropout:
            return "has no dropout"
        return "has no gradient for alpha" if work.learns_alpha else ""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead, dropout: float
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k``, ``v (B, H_k, N_k, D)``, float32 or half → ``(B, H, N_q, D)`` in their dtype."""
        check_shapes(q, k, v)
        alpha = normalizer.alpha
        constant = 0.0 if isinstance(alpha, Tensor) else alpha
        alphas = torch.as_tensor(alpha, dtype=torch.float32, device=q.device).detach().expand(q.shape[1]).contiguous()
        result: Tensor = _Attend.apply(q, k, v, _Launch(pairs, alphas, constant, self.block))
        return result


@dataclass(frozen=True)
class _Launch:
    """What all kernels of one call are given besides vectors."""

    pairs: Pairs
    alphas: Tensor  # (H,) float32
    constant: float  # the one α of all heads; 0 where they differ
    block: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output in the dtype of ``v``, peaks and thresholds ``(B, H, N_q)`` float32."""
        from sparsefinder.executors.triton.dense_kernels import forward_kernel

        peaks, thresholds = (q.new_zeros(q.shape[:3], dtype=torch.float32) for _ in range(2))
        out = torch.zeros_like(q)
        self._run(forward_kernel, q, q, k, v, peaks, thresholds, out, STILL=STILL, MOST=MOST)
        return out, peaks, thresholds

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, peaks: Tensor, thresholds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``v``."""
        from sparsefinder.executors.triton.dense_kernels import dkv_kernel, dq_kernel

        of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
        rows = (peaks, thresholds, g, torch.zeros_like(peaks))
        self._run(dq_kernel, q, q, k, v, *rows, of_q)
        self._run(dkv_kernel, k, q, k, v, *rows, of_k, of_v)
        return of_q, of_k, of_v

    def _run(self, kernel: Any, over: Tensor, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor, **more: float) -> None:
        """A kernel with a program for each block of positions of ``over``."""
        if not over.numel():
            return
        (heads, queries, size), keys = q.shape[1:], k.shape[2]
        width, pairs, everything = max(16, 1 << (size - 1).bit_length()), self.pairs, max(queries, keys)
        block = max(16, min(self.block, WIDEST // (width * q.element_size())))
        kernel[(over.shape[0] * over.shape[1] * -(-over.shape[2] // block),)](
            *(q, k, v),
            *(valid.to(torch.int8).contiguous() for valid in (pairs.query_valid, pairs.key_valid)),
            *(self.alphas, queries, keys),
            *(everything if reach is None else min(reach, everything) for reach in (pairs.back, pairs.ahead)),
            *(1 / math.sqrt(size), *tensors),
            CONSTANT=self.constant,
            HEADS=heads,
            GROUP=heads // k.shape[1],
            SIZE=size,
            WIDTH=width,
            BLOCK=block,
            **more,
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, launch: _Launch) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, peaks, thresholds = launch.forward(q, k, v)
        ctx.save_for_backward(q, k, v, peaks, thresholds)
        ctx.launch = launch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, peaks, thresholds = ctx.saved_tensors
        return *ctx.launch.backward(q, k, v, gradient.to(q.dtype).contiguous(), peaks, thresholds), None
