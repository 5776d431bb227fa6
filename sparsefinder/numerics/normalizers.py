"""Normalizers: how the scores on a graph become probabilities.

All of them solve, with Tsallis' entropy ``H_α``,

    p = argmax_{p ≥ 0, Σp = 1}  p·z + H_α(p),      p_j = [(α−1) z_j − τ]₊^{1/(α−1)}

(Peters, Niculae and Martins 2019, https://arxiv.org/abs/1905.05702): softmax is α = 1, sparsemax α = 2, and 1.5-entmax
lies between. Three promises hold for each of them, and none of them in the ``entmax`` package:

1. a score of ``-inf`` means absent: it gets probability 0, and the others are what they would be without it;
2. a row with nothing but ``-inf`` gives zeros (the package raises, or returns NaN);
3. whatever the dtype of the scores, the threshold, the support and the probabilities are float32 (float64 stays), since
   half precision loses 2 % of a row's sum. Cast the result to the values' dtype where it is multiplied.

How the threshold is found, without sorting, is said in `sparsefinder.numerics.entmax_newton`; it is stopped when no row moves,
not after a fixed count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefinder.numerics.entmax_newton import (
    STEPS,
    alpha_derivative_product,
    jacobian_product,
    kernel,
    solve,
    unrolled,
)
from sparsefinder.numerics.tracing import exporting

_LIMIT = 160  # steps after which a row is given up; ordinary rows need 5, sparsemax of long and flat rows some 15


@dataclass(frozen=True)
class Normalizer:
    """α-entmax as a value that can be named in a configuration: ``Normalizer(1.5)(scores) → probabilities``.

    Args:
        alpha: 1 is softmax, 2 sparsemax; anything from 1 to 2.
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not 1.0 <= self.alpha <= 2.0:
            raise ValueError(f"alpha must lie between 1 (softmax) and 2 (sparsemax), got {self.alpha}")

    def __call__(self, scores: Tensor) -> Tensor:
        """``(..., N)`` scores, ``-inf`` where absent → ``(..., N)`` float32 probabilities, zeros for an empty row."""
        return softmax(scores) if self.alpha == 1.0 else entmax(scores, self.alpha)

    def each(self, rectangles: Sequence[Tensor]) -> list[Tensor]:
        """Rows of several lengths, each ``(M, N)``: as one by one, but what is worth compiling is decided for all together."""
        together = sum(rectangle.numel() for rectangle in rectangles)
        if self.alpha == 1.0:
            return [softmax(rectangle) for rectangle in rectangles]
        return [_entmax(_at_least_float32(rectangle), self.alpha, together) for rectangle in rectangles]

    @property
    def sparse(self) -> bool:
        """Whether probabilities can be exactly zero."""
        return self.alpha > 1.0


@dataclass(frozen=True, eq=False)
class PerHead:
    """α-entmax with an α for each head, given or learned: ``PerHead(alpha)(scores) → probabilities``.

    Needs scores with a dimension of heads: `Masked`, not `Bucketed`, whose rows are those of several heads.

    Args:
        alpha: ``(H,)`` floating point, each 1 < α ≤ 2; give it a gradient to learn it, for instance with ``alpha = 1 +
            torch.sigmoid(parameter)``, which stays in the range.

    Source:
        Correia, Niculae and Martins 2019, Adaptively Sparse Transformers, https://arxiv.org/abs/1909.00015.
    """

    alpha: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """``(..., H, N, M)`` scores, ``-inf`` where absent → float32 probabilities, zeros for an empty row."""
        heads = self.alpha.shape[0] if self.alpha.ndim == 1 else 0
        if scores.ndim < 3 or scores.shape[-3] != heads:
            raise ValueError(
                f"alpha must be (H,) and scores (..., H, N, M), got {tuple(self.alpha.shape)} and {tuple(scores.shape)}"
            )
        return entmax(scores, self.alpha[:, None, None])

    @property
    def sparse(self) -> bool:
        """Whether probabilities can be exactly zero."""
        return True


def softmax(scores: Tensor) -> Tensor:
    """``p_j ∝ exp z_j`` over the last dimension; an all ``-inf`` row gives zeros."""
    scores = _at_least_float32(scores)
    if not is_recorded():
        probabilities = torch.softmax(scores, dim=-1)
        # torch gives NaN for the whole of an empty row: one column tells, at a small part of the price of looking at all scores
        if scores.shape[-1] == 0 or not bool(probabilities[..., 0].isnan().any()):
            return probabilities
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of the scores onto the simplex (Martins and Astudillo 2016): α-entmax with α = 2."""
    return entmax(scores, 2.0)


def entmax15(scores: Tensor) -> Tensor:
    """α-entmax with α = 1.5, the normalizer of Sparsefinder's gold graphs."""
    return entmax(scores, 1.5)


def entmax(scores: Tensor, alpha: float | Tensor = 1.5) -> Tensor:
    """α-entmax over the last dimension; differentiable in the scores, and in α where that is a tensor.

    The gradient is ``s ∘ (g − (s·g)/Σs)`` with ``s = p^{2−α}`` on the support; that of α is
    `sparsefinder.numerics.entmax_newton.alpha_derivative_product`. Both can be differentiated again. While torch exports or
    traces a model, it records `sparsefinder.numerics.entmax_newton.unrolled`, which is right for any scores that come later.

    Args:
        scores: ``(..., N)``, ``-inf`` where a key is absent.
        alpha: A number, 1 < α ≤ 2, or a floating-point tensor that broadcasts to ``(..., 1)``, an α for each row.

    Returns:
        Probabilities ``(..., N)``, float32 (float64 for float64 scores); zeros for a row without any key.

    Raises:
        ValueError: If an α is not in the range.

    Source:
        Peters, Niculae and Martins 2019, Sparse Sequence-to-Sequence Models, https://arxiv.org/abs/1905.05702.
    """
    scores = _at_least_float32(scores)
    if isinstance(alpha, Tensor):
        if is_recorded():
            return unrolled(scores, alpha.to(scores))
        if not bool(((alpha > 1.0) & (alpha <= 2.0)).all()):
            raise ValueError(f"entmax needs 1 < alpha <= 2, got {alpha.detach().flatten().tolist()}")
        by_row: Tensor = _EntmaxByRow.apply(scores, alpha.to(scores).expand(*scores.shape[:-1], 1))
        return by_row
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"entmax needs 1 < alpha <= 2, got {alpha}; for alpha = 1 use softmax")
    return _entmax(scores, alpha)


def _entmax(scores: Tensor, alpha: float, together: int = 0) -> Tensor:
    if is_recorded():
        return unrolled(scores, alpha)
    result: Tensor = _Entmax.apply(scores, alpha, together)
    return result


def is_recorded() -> bool:
    """Whether torch is recording a graph for other numbers than these: nothing may be decided by looking at them."""
    return torch.jit.is_tracing() or exporting()


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float, together: int) -> Tensor:
        probabilities = _rows_to_probabilities(scores, alpha, together)
        ctx.save_for_backward(probabilities)
        ctx.alpha, ctx.together = alpha, together
        return probabilities

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (probabilities,) = ctx.saved_tensors
        return _product(jacobian_product, probabilities, gradients[0], ctx.alpha, together=ctx.together), None, None


class _EntmaxByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor) -> Tensor:
        probabilities = _rows_to_probabilities(scores, alpha.detach().reshape(-1, 1))
        ctx.save_for_backward(probabilities, alpha)
        return probabilities

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        probabilities, alpha = ctx.saved_tensors
        of_scores, of_alpha = ctx.needs_input_grad
        column = alpha.reshape(-1, 1)
        return (
            _product(jacobian_product, probabilities, gradients[0], column) if of_scores else None,
            _product(alpha_derivative_product, probabilities, gradients[0], column) if of_alpha else None,
        )


def _product(
    function: Any, probabilities: Tensor, gradient: Tensor, alpha: float | Tensor, together: int = 0
) -> Tensor:
    """``function`` of each row of ``(..., N)`` twice → ``(..., N)`` or ``(..., 1)``: compiled, or recorded by autograd."""
    shape = probabilities.shape
    rows, columns = shape[:-1].numel(), shape[-1]
    both = probabilities.reshape(rows, columns), gradient.reshape(rows, columns)
    if torch.is_grad_enabled():  # the derivative of this derivative is asked for
        product: Tensor = function(*both, alpha)
    else:
        constant = alpha.detach() if isinstance(alpha, Tensor) else alpha
        product = kernel(function, constant)(*(x.detach() for x in both), together=together)
    return product.view(*shape[:-1], product.shape[-1])


def _rows_to_probabilities(scores: Tensor, alpha: float | Tensor, together: int = 0) -> Tensor:
    """``(..., N)`` → the same shape: Newton's steps until no row's threshold moves. A tensor ``alpha`` is ``(M, 1)``."""
    if scores.numel() == 0:
        return scores.clone()
    rows = _rows(scores)
    step_by_step = kernel(solve, alpha)
    still = 2 * torch.finfo(rows.dtype).eps  # a step of τ, which lies in [−1, 0], that is rounding noise
    height = rows.new_ones(rows.shape[0], 1)
    for _ in range(0, _LIMIT, STEPS):
        probabilities, total, slope, height = step_by_step(rows, height, together=together)
        # an empty row has no slope: its sum stays 0
        if not bool(((total - 1.0) * (alpha - 1.0) > still * slope).any()):
            break
    return probabilities.view(scores.shape)


def _rows(x: Tensor) -> Tensor:
    """``(..., N)`` → ``(M, N)``, detached: a form compiled for tensors with gradients would be another one."""
    return x.detach().reshape(-1, x.shape[-1])


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()
