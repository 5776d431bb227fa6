"""Keys one by one and whole clusters of keys under one normalizer: what a tail adds to the scores of a query.

A cluster of ``n`` keys is not looked at key by key: its scores are taken to be normal, ``z ~ N(m, s²)``. What such a cluster is
worth beside keys with the scores ``z_j`` is what it would be worth under the same normalizer if its scores were drawn so:

- softmax: ``p_j ∝ exp z_j`` and ``P_c ∝ n_c E[exp z] = n_c exp(m_c + s_c²/2)``: one more score, ``m_c + s_c²/2 + log n_c``;
- α-entmax, with ``p = 1/(α−1)``, ``a = (α−1) m`` and ``b = (α−1) s``: ``p_j = [(α−1) z_j − τ]₊^p`` and

      ``P_c = n_c E[((α−1) z − τ)₊^p] = n_c I_p(a_c − τ, b_c)``,     ``I_p(a, b) = E[(a + b ε)₊^p]``, ``ε ~ N(0, 1)``,

  with the one ``τ`` at which all probabilities, of keys and clusters, sum to one. With ``Φ`` and ``φ`` the distribution and
  density of ``ε``, ``I_0 = Φ(a/b)``, ``I_1 = a Φ(a/b) + b φ(a/b)`` and ``I_p = a I_{p−1} + (p−1) b² I_{p−2}``: sparsemax is
  ``I_1``, and 1.5-entmax ``I_2 = (a² + b²) Φ(a/b) + a b φ(a/b)``. For other α the same where ``p`` is whole.

Without spread (``s = 0``) a cluster is ``n`` equal keys, and one of a single key is that key. The threshold is found as in
`sparsefinder.numerics.entmax_newton`: keys and clusters together are a measure, in whose norm the same equation is convex.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.numerics.entmax_newton import newton_step
from sparsefinder.numerics.normalizers import softmax

_LIMIT = 60  # steps after which a row is given up
_LEAST = 1e-6  # standard deviation that stands for none


def with_clusters(
    scores: Tensor, mean: Tensor, variance: Tensor, numbers: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Probabilities of keys, and of clusters of them whose scores are normal; differentiable in all but the numbers.

    Args:
        scores: ``(..., K)`` float32 or float64, ``-inf`` where a key is absent; ``K`` may be 0.
        mean: ``(..., C)``, of the scores of each cluster.
        variance: ``(..., C)``, of these.
        numbers: ``(..., C)`` floating point, the keys in each cluster; 0 where it is absent.
        alpha: Of the normalizer, from 1 to 2.

    Returns:
        ``(..., K)`` and ``(..., C)``, which sum to one together; zeros where there is neither key nor cluster.

    Raises:
        UserError: For an α that has no closed form.
    """
    check_alpha(alpha)
    keys = scores.shape[-1]
    if alpha == 1.0:
        both = softmax(torch.cat([scores, mean + variance / 2 + numbers.log()], dim=-1))
        return both[..., :keys], both[..., keys:]
    power = round(1 / (alpha - 1))
    x, a = (alpha - 1) * scores, (alpha - 1) * mean
    spread = (alpha - 1) * variance.clamp_min(_LEAST**2).sqrt()
    # where τ lies to the right of: a key at the threshold, and by Jensen's inequality as many equal keys
    bounds = torch.cat([x.detach() - 1, a.detach() - numbers ** (-1 / power)], dim=-1)
    start = bounds.amax(-1, keepdim=True) if bounds.shape[-1] else bounds.sum(-1, keepdim=True)
    empty = start == -math.inf
    start = start.masked_fill(empty, 0.0)
    x, a = x - start, (a - start).masked_fill(numbers == 0, 0.0)
    threshold = _threshold(x.detach(), a.detach(), spread.detach(), numbers, power)
    # a last step, of f instead of its norm: its derivative in all scores is that of the root
    total, slope = _sums(x - threshold, a - threshold, spread, numbers, power)
    threshold = threshold + ((total - 1) / (power * slope.detach()).clamp_min(1e-30)).masked_fill(empty, 0.0)
    return (x - threshold).clamp_min(0) ** power, numbers * mass(a - threshold, spread, power)[0]


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
    return start + _threshold(a[..., :0], a, spread, numbers, power)


def mass(a: Tensor, b: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """``I_p(a, b)`` and ``I_{p−1}(a, b)``, of any shape, for a whole ``p`` of 1 or more and ``b > 0``."""
    t = a / b
    before, now = torch.special.ndtr(t), torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    now = a * before + b * now
    for k in range(1, power):
        before, now = now, a * now + k * b.square() * before
    return now.clamp_min(0), before.clamp_min(0)


def _threshold(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor, power: int) -> Tensor:
    """``τ (..., 1)``, from the left: at ``τ = 0`` the probabilities sum to one or more, or there are none."""
    threshold = x.new_zeros(*x.shape[:-1], 1)
    still = 4 * torch.finfo(x.dtype).eps
    for _ in range(_LIMIT):
        total, slope = _sums(x - threshold, a - threshold, b, numbers, power)
        step = newton_step(total, slope, 1 + 1 / power).masked_fill(slope == 0, 0.0)  # an empty row stays
        threshold = threshold + step
        if not bool((step > still * (1 + threshold)).any()):
            break
    return threshold


def _sums(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """The sum of all probabilities, and that of the powers ``p − 1``, each ``(..., 1)``."""
    above = x.clamp_min(0)
    one_less = above ** (power - 1) * (above > 0)
    now, before = mass(a, b, power)
    total, slope = (one_less * above).sum(-1, keepdim=True), one_less.sum(-1, keepdim=True)
    return total + (numbers * now).sum(-1, keepdim=True), slope + (numbers * before).sum(-1, keepdim=True)


def check_alpha(alpha: float) -> None:
    """Refuse a normalizer whose clusters have no closed form.

    Args:
        alpha: Of the normalizer.

    Raises:
        UserError: Where ``1/(α−1)`` is not whole.
    """
    if alpha > 1.0 and not math.isclose(1 / (alpha - 1), round(1 / (alpha - 1)), rel_tol=1e-9):
        raise UserError(f"a tail has no closed form for alpha={alpha}: choose 1 (softmax), 1.5 or 2, or set tail=false")
