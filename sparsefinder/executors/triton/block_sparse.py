"""α-entmax attention over a plan of blocks in Triton, forward and backward.

A row's keys lie in several blocks of several groups, so what concerns a whole row is done in *sweeps* over all blocks that
leave one number per position, summed per row in a fixed order (no atomics: the same result on every run). One sweep finds each
row's maximum; a few more find its threshold by Newton's method on the p-norm (`sparsefinder.numerics.entmax_newton`); the last
one accumulates the output. The backward pass recomputes probabilities from the threshold (Peters et al. 2019; AdaSplash,
https://arxiv.org/abs/2502.12082, has the tiled form): a sweep for ``δ_i = Σ_j s_ij (do_i·v_j) / Σ_j s_ij`` with ``s =
p^{2−α}``, then ``ds_ij = s_ij (do_i·v_j − δ_i)`` gives ``dq`` by query blocks, and ``dk``, ``dv`` by key blocks.

Scores, sums, thresholds and probabilities are float32; products of half-precision vectors are accumulated in float32. Unlike
AdaSplash a block is never skipped for being empty after the fact: the predicted graph has done that already.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sparsefinder.executors.blocks.gather import gather
from sparsefinder.executors.triton.kernels import (
    deltas_kernel,
    dkv_kernel,
    dq_kernel,
    output_kernel,
    peaks_kernel,
    sums_kernel,
)
from sparsefinder.executors.triton.plan import Plan, Side
from sparsefinder.numerics.entmax_newton import newton_step

FEWEST, MOST = 3, 64  # Newton sweeps before the first look at convergence, and in all


def block_sparse(q: Tensor, k: Tensor, v: Tensor, plan: Plan, alpha: float, block: int) -> Tensor:
    """α-entmax attention on the pairs of a plan: ``(B, H, N, D)`` in the dtype of ``v``.

    Args:
        q: ``(B, H, N, D)``, float32 or half precision, the same for all three.
        k: of the shape of ``q``.
        v: of the shape of ``q``.
        plan: the blocks.
        alpha: from 1 to 2.
        block: that of the plan, a power of two from 16.
    """
    result: Tensor = _BlockSparse.apply(q.contiguous(), k.contiguous(), v.contiguous(), plan, alpha, block)
    return result


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, alpha: float, block: int) -> Tensor:
        walk = Walk(plan, alpha, block, q.shape[-1])
        peaks, thresholds, _ = walk.thresholds(q, k)
        ctx.save_for_backward(q, k, v, peaks, thresholds)
        ctx.walk = walk
        return walk.output(q, k, v, peaks, thresholds).view(v.shape).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, peaks, thresholds = ctx.saved_tensors
        gradient_of = ctx.walk.gradients(q, k, v, gradients[0].to(v.dtype).contiguous(), peaks, thresholds)
        dq, dk, dv = (x.view(like.shape).to(like.dtype) for x, like in zip(gradient_of, (q, k, v), strict=True))
        return dq, dk, dv, None, None, None


class Walk:
    """The launches of one plan at one α."""

    def __init__(self, plan: Plan, alpha: float, block: int, size: int) -> None:
        self.plan, self.alpha, self.scale = plan, alpha, 1 / math.sqrt(size)
        self.by_query = (plan.q.order, plan.k.order, plan.q.blocks, plan.q_ids, plan.k_ids, self.scale)
        self.by_key = (plan.q.order, plan.k.order, plan.k.blocks, plan.q_ids, plan.k_ids, self.scale)
        self.shape = {
            "Q_SLOTS": plan.q_ids.shape[1],
            "K_SLOTS": plan.k_ids.shape[1],
            "CAUSAL": plan.causal,
            "SIZE": size,
            "WIDTH": max(16, triton.next_power_of_2(size)),
            "BLOCK": block,
        }
        self.power = {"ALPHA": alpha, "GAIN": 1.0 if alpha == 1.0 else alpha - 1.0, **self.shape}

    def thresholds(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
        """Largest score and threshold of each row, ``(M,)`` float32 twice, and the sweeps over all blocks that it took."""
        side = self.plan.q
        on_positions = self._empty(side, q).fill_(-math.inf)
        self._launch(peaks_kernel, side, q, k, *self.by_query, on_positions, **self.shape)
        if not len(side.order) or not side.positions.shape[1]:
            nothing = q.new_zeros(len(side.positions), dtype=torch.float32)
            return nothing, nothing, 0
        peaks = on_positions[side.positions.clamp_min(0)].masked_fill(side.positions < 0, -math.inf).amax(1)
        peaks = peaks.masked_fill(peaks == -math.inf, 0.0)
        if self.alpha == 1.0:
            total, _ = self._sums(q, k, peaks, torch.zeros_like(peaks))
            return peaks, torch.where(total > 0, total, 1.0).log(), 2
        thresholds, still = torch.full_like(peaks, -1.0), 2 * torch.finfo(torch.float32).eps
        sweeps = 1
        for taken in range(1, MOST + 1):
            total, slope = self._sums(q, k, peaks, thresholds)
            # an empty row has no slope and stays where it is
            step = torch.where(total > 0, newton_step(total, slope, self.alpha), 0.0)
            thresholds, sweeps = thresholds + step, sweeps + 1
            if taken >= FEWEST and not bool((step > still).any()):
                break
        return peaks, thresholds, sweeps

    def output(self, q: Tensor, k: Tensor, v: Tensor, peaks: Tensor, thresholds: Tensor) -> Tensor:
        """``(M, D)`` float32."""
        out = self._empty(self.plan.q, q, v.shape[-1])
        self._launch(output_kernel, self.plan.q, q, k, v, *self.by_query, peaks, thresholds, out, **self.power)
        return _by_token(out, self.plan.q)

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, peaks: Tensor, thresholds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``v``, each ``(M, D)`` float32."""
        plan, inputs = self.plan, (q, k, v, g)
        weighted, weights = self._empty(plan.q, q), self._empty(plan.q, q)
        self._launch(deltas_kernel, plan.q, *inputs, *self.by_query, peaks, thresholds, weighted, weights, **self.power)
        both = _by_token(torch.stack([weighted, weights], dim=1), plan.q)
        deltas = both[:, 0] / both[:, 1].clamp_min(1e-30)
        dq, dk, dv = (self._empty(side, q, q.shape[-1]) for side in (plan.q, plan.k, plan.k))
        rows = (peaks, thresholds, deltas)
        self._launch(dq_kernel, plan.q, *inputs, *self.by_query, *rows, dq, **self.power)
        self._launch(dkv_kernel, plan.k, *inputs, *self.by_key, *rows, dk, dv, **self.power)
        return _by_token(dq, plan.q), _by_token(dk, plan.k), _by_token(dv, plan.k)

    def _sums(self, q: Tensor, k: Tensor, peaks: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        total, slope = self._empty(self.plan.q, q), self._empty(self.plan.q, q)
        self._launch(sums_kernel, self.plan.q, q, k, *self.by_query, peaks, thresholds, total, slope, **self.power)
        both = _by_token(torch.stack([total, slope], dim=1), self.plan.q)
        return both[:, 0], both[:, 1]

    @staticmethod
    def _launch(kernel: Any, side: Side, *arguments: Any, **constants: Any) -> None:
        if len(side.blocks):
            kernel[(len(side.blocks),)](*arguments, **constants)

    @staticmethod
    def _empty(side: Side, like: Tensor, *size: int) -> Tensor:
        """Zeros for each position: positions in groups without a partner are in no block, and are never written."""
        return like.new_zeros(len(side.order), *size, dtype=torch.float32)


def _by_token(x: Tensor, side: Side) -> Tensor:
    """``(positions, …)`` → ``(M, …)``, the sum over each token's positions, always in the same order."""
    return gather(x, side.positions, side.order[:, None])
