"""Normalizers: how the scores on a graph become probabilities.

All of them solve, with Tsallis' entropy ``H_α``,

    p = argmax_{p ≥ 0, Σp = 1}  p·z + H_α(p),      p_j = [(α−1) z_j − τ]₊^{1/(α−1)}

(Peters, Niculae and Martins 2019, https://arxiv.org/abs/1905.05702): softmax is α = 1, sparsemax α = 2, and 1.5-entmax
lies between. Three promises hold for each of them, and none of them in the ``entmax`` package:

1. a score of ``-inf`` means absent: it gets probability 0, and the others are what they would be without it;
2. a row with nothing but ``-inf`` gives zeros (the package raises, or returns NaN);
3. whatever the dtype of the scores, the threshold, the support and the probabilities are float32 (float64 stays), since
   half precision loses 2 % of a row's sum. Cast the result to the values' dtype where it is multiplied.

The threshold is found by Newton's method from the left, not by sorting. With ``x = (α−1)(z − max z) ≤ 0`` the function
``f(τ) = Σ (x − τ)₊^{1/(α−1)} − 1`` is convex and decreasing for α ≤ 2 and ``f(−1) ≥ 0``, so the iteration rises
monotonically to the root from ``τ = −1``; it is stopped when no row moves, not after a fixed count.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_STEPS = 8  # Newton steps between two looks at convergence: enough for ordinary rows, so that one look is the rule
_LIMIT = 160  # steps after which a row is given up: flat rows need ½·log₂ n + 4; α near 1 needs about ln n + 10
_STILL = 3e-7  # a step of τ (which lies in [−1, 0]) that is rounding noise in float32


@dataclass(frozen=True)
class Normalizer:
    """α-entmax as a value that can be named in a configuration: ``Normalizer(1.5)(scores) → probabilities``.

    ``alpha``: 1 is softmax, 2 sparsemax; anything from 1 to 2.
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not 1.0 <= self.alpha <= 2.0:
            raise ValueError(f"alpha must lie between 1 (softmax) and 2 (sparsemax), got {self.alpha}")

    def __call__(self, scores: Tensor) -> Tensor:
        """``(..., N)`` scores, ``-inf`` where absent → ``(..., N)`` float32 probabilities, zeros for an empty row."""
        return softmax(scores) if self.alpha == 1.0 else entmax(scores, self.alpha)

    @property
    def sparse(self) -> bool:
        """Whether probabilities can be exactly zero."""
        return self.alpha > 1.0


def softmax(scores: Tensor) -> Tensor:
    """``p_j ∝ exp z_j`` over the last dimension; an all ``-inf`` row gives zeros."""
    scores = _at_least_float32(scores)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of the scores onto the simplex (Martins and Astudillo 2016): α-entmax with α = 2."""
    return entmax(scores, 2.0)


def entmax15(scores: Tensor) -> Tensor:
    """α-entmax with α = 1.5, the normalizer of Sparsefinder's gold graphs."""
    return entmax(scores, 1.5)


def entmax(scores: Tensor, alpha: float = 1.5) -> Tensor:
    """α-entmax over the last dimension, 1 < α ≤ 2; differentiable in the scores.

    ``scores``: ``(..., N)``, ``-inf`` where a key is absent. Returns ``(..., N)`` float32 (float64 for float64 scores).
    The gradient is ``s ∘ (g − (s·g)/Σs)`` with ``s = p^{2−α}`` on the support.
    """
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"entmax needs 1 < alpha <= 2, got {alpha}; for alpha = 1 use softmax")
    result: Tensor = _Entmax.apply(_at_least_float32(scores), alpha)
    return result


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> Tensor:
        # detached: a form compiled for scores with gradients would be another one
        rows = scores.detach().reshape(-1, scores.shape[-1])
        probabilities = _threshold_and_project(rows, alpha).view(scores.shape)
        ctx.save_for_backward(probabilities)
        ctx.alpha = alpha
        return probabilities

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (probabilities,) = ctx.saved_tensors
        shape = probabilities.shape
        rows = probabilities.reshape(-1, shape[-1])
        gradient = gradients[0].reshape(-1, shape[-1])
        return _kernel(_jacobian_product, ctx.alpha)(rows, gradient).view(shape), None


def _threshold_and_project(scores: Tensor, alpha: float) -> Tensor:
    """``(M, N)`` → ``(M, N)`` probabilities: Newton until no row's threshold moves."""
    if scores.numel() == 0:
        return scores.clone()
    peak, threshold, step = _kernel(_first_steps, alpha)(scores)
    taken = _STEPS
    while taken < _LIMIT and bool(step.max() > _STILL):
        threshold, step = _kernel(_more_steps, alpha)(scores, peak, threshold)
        taken += _STEPS
    result: Tensor = _kernel(_project, alpha)(scores, peak, threshold)
    return result


# ---- kernels on (M, N) float rows; `alpha` is one of _CONSTANTS, or a tensor () for any other value ----


def _first_steps(scores: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, torch.zeros_like(peak), peak)
    threshold, step = _newton(scores, peak, torch.full_like(peak, -1.0), alpha)
    return peak, threshold, step


def _more_steps(scores: Tensor, peak: Tensor, threshold: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    return _newton(scores, peak, threshold, alpha)


def _newton(scores: Tensor, peak: Tensor, threshold: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    x = (scores - peak) * (alpha - 1.0)
    step = threshold
    for _ in range(_STEPS):
        excess = (x - threshold).clamp_min(0.0)
        if isinstance(alpha, Tensor):
            root = excess.pow(1.0 / (alpha - 1.0) - 1.0)
            value, slope = (root * excess).sum(-1, keepdim=True), root.sum(-1, keepdim=True) / (alpha - 1.0)
        elif alpha == 1.5:
            value, slope = (excess * excess).sum(-1, keepdim=True), 2.0 * excess.sum(-1, keepdim=True)
        else:
            value, slope = excess.sum(-1, keepdim=True), (excess > 0).to(excess.dtype).sum(-1, keepdim=True)
        # an empty row has no slope: leave it where it is
        step = torch.where(slope > 0, (value - 1.0) / slope, torch.zeros_like(slope))
        threshold = threshold + step
    return threshold, step


def _project(scores: Tensor, peak: Tensor, threshold: Tensor, alpha: float | Tensor) -> Tensor:
    excess = ((scores - peak) * (alpha - 1.0) - threshold).clamp_min(0.0)
    if isinstance(alpha, Tensor):
        powers = excess.pow(1.0 / (alpha - 1.0))
        # near α = 1 the power is large and makes much of the last digit of τ; almost all of that is one common factor
        return powers / powers.sum(-1, keepdim=True).clamp_min(1e-30)
    return excess * excess if alpha == 1.5 else excess


def _jacobian_product(probabilities: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
    support = (probabilities > 0).to(probabilities.dtype)
    if isinstance(alpha, Tensor):
        s = probabilities.pow(2.0 - alpha) * support
    else:
        s = probabilities.sqrt() if alpha == 1.5 else support
    weighted = (s * gradient).sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp_min(1e-30)
    return s * (gradient - weighted)


def _kernel(function: Callable[..., Any], alpha: float) -> Callable[..., Any]:
    """``function(*rows, alpha)`` for one α; one compiled form serves every α but 1.5 and 2, which have their own."""
    if alpha in _CONSTANTS:
        return _compiled(function, alpha)
    kernel = _compiled(function, None)
    return lambda *rows: kernel(*rows, torch.tensor(alpha, dtype=rows[0].dtype, device=rows[0].device))


@functools.cache
def _compiled(function: Callable[..., Any], constant: float | None) -> Callable[..., Any]:
    """``function``, compiled where a C++ compiler is at hand (about 20 times faster on CPU), else eager."""

    def bound(*inputs: Tensor) -> Any:
        return function(*inputs) if constant is None else function(*inputs, constant)

    # torch._dynamo keeps at most eight compiled forms of a *code* object, then runs it uncompiled for good: without a copy
    # of its own, each kernel would use up the forms of all others
    code = bound.__code__.replace(co_name=f"{function.__name__}_{constant}")
    own = types.FunctionType(code, bound.__globals__, code.co_name, None, bound.__closure__)
    state = {"kernel": torch.compile(own, dynamic=True)}

    def run(*inputs: Tensor) -> Any:
        if inputs[0].numel() < _WORTH_COMPILING or state["kernel"] is bound:
            return bound(*inputs)
        try:
            return state["kernel"](*inputs)
        except Exception as error:  # torch has no one exception for "no compiler here"
            log.warning("torch.compile does not work here (%s): entmax runs uncompiled, slower", type(error).__name__)
            state["kernel"] = bound
            return bound(*inputs)

    return run


_CONSTANTS = (1.5, 2.0)  # values of α that make squares and comparisons of the powers
# scores; below this the eager kernels take a few milliseconds, and compiling takes some twenty seconds
_WORTH_COMPILING = 1 << 18


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()
