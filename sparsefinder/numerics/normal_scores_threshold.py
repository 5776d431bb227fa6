"""The threshold of entmax over clusters of keys whose scores are normal.

``Σ_c n_c E[((α−1) z − τ)₊^p] = 1`` with ``z ~ N(m_c, s_c²)`` and ``p = 1/(α−1)``. With ``a = (α−1) m − τ``, ``b = (α−1) s`` the
expectation is ``I_p(a, b) = E[(a + b ε)₊^p]``, ``ε ~ N(0, 1)``: ``I_0 = Φ(a/b)``, ``I_1 = a Φ(a/b) + b φ(a/b)`` and ``I_p = a
I_{p−1} + (p−1) b² I_{p−2}``, where ``p`` is whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.numerics.entmax_newton import newton_step

_LIMIT = 60  # steps after which a row is given up
_LEAST = 1e-6  # standard deviation that stands for none


def threshold(mean: Tensor, variance: Tensor, numbers: Tensor, alpha: float) -> Tensor:
    """The threshold of α-entmax over clusters alone, in units of ``(α − 1) z``.

    Args:
        mean: ``(..., C)``, of the scores of each cluster.
        variance: ``(..., C)``, of these; 0 or more.
        numbers: ``(..., C)`` floating point, the keys in each cluster; 0 where it is absent.
        alpha: 1 < α ≤ 2, such that ``1/(α−1)`` is whole.

    Returns:
        ``(..., 1)``; ``-inf`` where there is no cluster.

    Raises:
        UserError: For an α that has no closed form.
    """
    check_alpha(alpha)
    power = round(1 / (alpha - 1))
    a, spread = (alpha - 1) * mean, (alpha - 1) * variance.clamp_min(_LEAST**2).sqrt()
    start = (a - numbers ** (-1 / power)).amax(-1, keepdim=True)
    empty = start == -math.inf
    a = (a - start.masked_fill(empty, 0.0)).masked_fill(numbers == 0, 0.0)
    rise = torch.zeros_like(start)
    still = 4 * torch.finfo(a.dtype).eps
    for _ in range(_LIMIT):
        now, before = mass(a - rise, spread, power)
        total, slope = ((numbers * x).sum(-1, keepdim=True) for x in (now, before))
        step = newton_step(total, slope, alpha).masked_fill(slope == 0, 0.0)  # an empty row stays
        rise = rise + step
        if not bool((step > still * (1 + rise)).any()):
            break
    return start + rise


def mass(a: Tensor, b: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """``I_p(a, b)`` and ``I_{p−1}(a, b)``, of any shape, for a whole ``p`` of 1 or more and ``b > 0``."""
    t = a / b
    before, now = torch.special.ndtr(t), torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    now = a * before + b * now
    for k in range(1, power):
        before, now = now, a * now + k * b.square() * before
    return now.clamp_min(0), before.clamp_min(0)


def check_alpha(alpha: float) -> None:
    """Refuse a normalizer whose clusters have no closed form.

    Args:
        alpha: Of the normalizer.

    Raises:
        UserError: Where ``1/(α−1)`` is not whole.
    """
    if alpha > 1.0 and not math.isclose(1 / (alpha - 1), round(1 / (alpha - 1)), rel_tol=1e-9):
        raise UserError(f"a mixture of normal scores has no closed form for alpha={alpha}: choose 1.5 or 2")
