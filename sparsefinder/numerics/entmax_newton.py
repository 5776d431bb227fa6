"""Kernels of α-entmax on rows ``(M, N)``, compiled where a C++ compiler is at hand.

The threshold is found by Newton's method from the left, not by sorting. With ``x = (α−1)(z − max z) ≤ 0`` and
``p = 1/(α−1)`` it is the root of

    h(τ) = ‖(x − τ)₊‖_p − 1 = 0,

the same root as that of ``f(τ) = Σ (x − τ)₊^p − 1``, which entmax is usually written with. Both are convex and decreasing with
``h(−1) ≥ 0``, so Newton's steps from ``τ = −1`` rise monotonically to the root. But ``h`` is the straighter one: where all scores
are equal it *is* a line, and one step is enough where ``f`` needs ½·log₂ n + 4. A step costs one pass over the row for either.

A whole solution, `solve`, is one function of a row, so that torch.compile makes one parallel loop of it in which a row stays
in the first cache for all of its passes. That holds only while no intermediate is of shape ``(M, 1)`` but the sums themselves
(inductor gives those a loop of their own): hence it is the row that is shifted from step to step, not a threshold that moves.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Newton steps between two looks at convergence: enough for ordinary rows, so that one look is the rule:
# docs/explanation/performance.md
STEPS, STEPS_OF_SPARSEMAX = 5, 8
# of `unrolled`: after 20 halvings τ is known to 1e-6, after four more steps to rounding; two of these are differentiated
HALVINGS, STEPS_AFTER_HALVING = 20, 4
CONSTANTS = (1.5, 2.0)  # values of α that make squares and comparisons of the powers
# scores; below this the eager kernels take a few milliseconds, and compiling takes some twenty seconds
WORTH_COMPILING = 1 << 18


def solve(scores: Tensor, height: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``STEPS`` Newton steps (``STEPS_OF_SPARSEMAX`` where α = 2), then the probabilities.

    Args:
        scores: ``(M, N)``, ``-inf`` where a key is absent.
        height: ``(M, 1)``, ``max x − τ`` to start from; 1 is the warm start from the row's maximum.
        alpha: One of ``CONSTANTS``, or a tensor ``(M, 1)`` for any other values.

    Returns:
        Probabilities ``(M, N)``, zeros for an empty row, their sum, the slope ``Σ (x − τ)₊^{p−1}`` and the new height, each
        ``(M, 1)``. The next step would be ``(sum − 1) / (p · slope)`` or less.
    """
    peak = scores.amax(-1, keepdim=True)
    # an empty row stays at -inf, and -inf - -inf would be NaN
    below_peak = (scores - torch.where(peak == -math.inf, 0.0, peak)) * (alpha - 1.0)
    x: Tensor = below_peak + height
    steps = STEPS_OF_SPARSEMAX if not isinstance(alpha, Tensor) and alpha == 2.0 else STEPS
    for _ in range(steps):
        total, slope = _sums(x.clamp_min(0.0), alpha)
        x = x - newton_step(total, slope, alpha)
    height = x.amax(-1, keepdim=True)
    # from the scores again: the rounding of each shift differs from entry to entry, that of their sum is the same for all
    excess = (below_peak + height).clamp_min(0.0)
    total, slope = _sums(excess, alpha)
    probabilities = _power(excess, alpha)
    if isinstance(alpha, Tensor):
        # near α = 1 the power is large and makes much of the last digit of τ; almost all of that is one common factor
        probabilities = probabilities / total.clamp_min(1e-30)
    return probabilities, total, slope, height


def jacobian_product(probabilities: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
    """``s ∘ (g − (s·g)/Σs)`` with ``s = p^{2−α}`` on the support; differentiable once more.

    Args:
        probabilities: ``p (M, N)``, of entmax.
        gradient: ``g (M, N)``, the gradient of a loss in ``p``.
        alpha: A number, or ``(M, 1)``.

    Returns:
        The gradient of the loss in the scores, ``(M, N)``; zeros outside the support.
    """
    s = _sharpness(probabilities, alpha)
    weighted = (s * gradient).sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp_min(1e-30)
    return s * (gradient - weighted)


def alpha_derivative_product(probabilities: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
    """``Σ_j g_j · ∂p_j/∂α`` of each row.

    With ``s = p^{2−α}`` on the support, ``p̃ = s/Σs`` and ``h_j = −p_j log p_j``, ``∂p/∂α = (p − p̃)/(α−1)² + (h −
    p̃·Σh)/(α−1)``.

    Args:
        probabilities: ``p (M, N)``, of entmax.
        gradient: ``g (M, N)``, the gradient of a loss in ``p``.
        alpha: ``(M, 1)``.

    Returns:
        The gradient of the loss in α, ``(M, 1)``.

    Source:
        Correia, Niculae and Martins 2019 (https://arxiv.org/abs/1909.00015), Proposition 1.
    """
    s = _sharpness(probabilities, alpha)
    entropies = -probabilities * torch.where(probabilities > 0, probabilities, 1.0).log()
    along_s = (s * gradient).sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp_min(1e-30)
    rescaled = (probabilities * gradient).sum(-1, keepdim=True) - along_s * probabilities.sum(-1, keepdim=True)
    spread = (entropies * gradient).sum(-1, keepdim=True) - along_s * entropies.sum(-1, keepdim=True)
    return rescaled / (alpha - 1.0) ** 2 + spread / (alpha - 1.0)


def _sharpness(probabilities: Tensor, alpha: float | Tensor) -> Tensor:
    """``p^{2−α}`` on the support, 0 outside, where the power of 0 itself would have an infinite derivative."""
    support = probabilities > 0
    constant = None if isinstance(alpha, Tensor) else alpha
    if constant == 2.0:
        return support.to(probabilities.dtype)
    inside = torch.where(support, probabilities, 1.0)
    return (inside.sqrt() if constant == 1.5 else inside.pow(2.0 - alpha)) * support


def _power(excess: Tensor, alpha: float | Tensor) -> Tensor:
    """``excess^p`` with ``p = 1/(α−1)``."""
    if isinstance(alpha, Tensor):
        return excess.pow(1.0 / (alpha - 1.0))
    return excess * excess if alpha == 1.5 else excess


def _sums(excess: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """``Σ excess^p`` and ``Σ excess^{p−1}`` over each row."""
    if isinstance(alpha, Tensor):
        root = excess.pow((2.0 - alpha) / (alpha - 1.0)) * (excess > 0)
        return (root * excess).sum(-1, keepdim=True), root.sum(-1, keepdim=True)
    one_less = excess if alpha == 1.5 else (excess > 0).to(excess.dtype)
    return _power(excess, alpha).sum(-1, keepdim=True), one_less.sum(-1, keepdim=True)


def newton_step(total: Tensor, slope: Tensor, alpha: float | Tensor) -> Tensor:
    """How far the threshold rises in a step for ``h``: ``(S − S^{1−1/p}) / Σ excess^{p−1}``, where ``1 − 1/p = 2 − α``.

    Args:
        total: ``S = Σ excess^p`` of each row.
        slope: ``Σ excess^{p−1}`` of each row, of the same shape; 0 in an empty row.
        alpha: a number, or a tensor that broadcasts to the rows.

    Returns:
        The step of each row, in the dtype of ``total``; of no meaning in an empty row where α = 2.
    """
    return (total - total ** (2.0 - alpha)) / slope.clamp_min(1e-30)


def unrolled(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """α-entmax without a look at the numbers, for graphs that are recorded once.

    Halves ``[−1, 0]``, in which τ lies, a fixed number of times, then takes Newton's steps from the left end, so that rows of
    any kind end at the same threshold as those of `solve`, to rounding. Differentiable twice: the halving is a start, and the
    derivative of Newton's steps at the root is that of the root.

    Args:
        scores: ``(..., N)``, ``-inf`` where a key is absent.
        alpha: A number, or a tensor ``(..., 1)``.

    Returns:
        Probabilities ``(..., N)``, zeros for an empty row.
    """
    absent = scores == -math.inf
    peak = scores.amax(-1, keepdim=True)
    below_peak = scores.masked_fill(absent, 0.0) - torch.where(peak == -math.inf, 0.0, peak)
    x = (below_peak * (alpha - 1.0)).masked_fill(absent, -1.0).clamp_min(-1.0)
    low, high = torch.full_like(peak, -1.0), torch.zeros_like(peak)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = _recorded_sums(x.detach() - middle, alpha)[1] >= 1.0
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    threshold = low
    for _ in range(STEPS_AFTER_HALVING):
        _, total, slope = _recorded_sums(x - threshold, alpha)
        total = torch.where(total > 0, total, 1.0)  # an empty row
        threshold = threshold + newton_step(total, slope, alpha)
    powers, total, _ = _recorded_sums(x - threshold, alpha)
    return (powers / total.clamp_min(1e-30)).masked_fill(absent, 0.0)


def _recorded_sums(excess: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``excess₊^p``, its sum and ``Σ excess₊^{p−1}``, with finite derivatives where the excess is not positive."""
    support = excess > 0
    root = torch.where(support, excess, 1.0) ** ((2.0 - alpha) / (alpha - 1.0)) * support
    powers = root * excess
    return powers, powers.sum(-1, keepdim=True), root.sum(-1, keepdim=True)


def kernel(function: Callable[..., Any], alpha: float | Tensor) -> Callable[..., Any]:
    """A function of rows for one α; one compiled form serves every α but 1.5 and 2, which have their own.

    Args:
        function: ``function(*rows, alpha)``, for instance `solve`.
        alpha: A number, or a tensor ``(M, 1)`` with an α for each row.

    Returns:
        ``function`` of the rows alone.
    """
    if not isinstance(alpha, Tensor) and alpha in CONSTANTS:
        return compiled(function, alpha)
    general = compiled(function, None)

    def run(rows: Tensor, *others: Tensor, together: int = 0) -> Any:
        column = alpha if isinstance(alpha, Tensor) else rows.new_full((rows.shape[0], 1), alpha)
        return general(rows, *others, column, together=together)

    return run


@functools.cache
def compiled(function: Callable[..., Any], constant: float | None) -> Callable[..., Any]:
    """A function, compiled where a C++ compiler is at hand (about 20 times faster on CPU), else eager.

    Args:
        function: What is compiled, a function of tensors and, unless ``constant`` is None, of that.
        constant: α as a number that is compiled in; None where it is a tensor among the inputs.

    Returns:
        The function. It takes ``together`` as well: how many scores there are in all, where these are some of several
        rectangles.
    """

    def bound(*inputs: Tensor) -> Any:
        return function(*inputs) if constant is None else function(*inputs, constant)

    # torch._dynamo keeps at most eight compiled forms of a *code* object, then runs it uncompiled for good: without a copy
    # of its own, each kernel would use up the forms of all others
    code = bound.__code__.replace(co_name=f"{function.__name__}_{constant}")
    own = types.FunctionType(code, bound.__globals__, code.co_name, None, bound.__closure__)
    state = {"kernel": torch.compile(own, dynamic=True)}

    def run(*inputs: Tensor, together: int = 0) -> Any:
        rows = inputs[0].shape[:-1].numel()  # a single one would be compiled again, by itself
        if max(inputs[0].numel(), together) < WORTH_COMPILING or rows < 2 or state["kernel"] is bound:
            return bound(*inputs)
        try:
            return state["kernel"](*inputs)
        except Exception as error:  # torch has no one exception for "no compiler here"
            log.warning("torch.compile does not work here (%s): entmax runs uncompiled, slower", type(error).__name__)
            state["kernel"] = bound
            return bound(*inputs)

    return run
