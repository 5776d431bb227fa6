"""Keys one by one and whole clusters of keys under one normalizer: what a tail adds to the scores of a query.

A cluster is not looked at key by key. Of the scores of its ``n`` keys the mean ``m`` and the variance ``s²`` are known, and it
stands among the scores as two halves, ``n/2`` keys with the score ``m + s`` and ``n/2`` with ``m − s``, which have this mean and
this variance:

- softmax: ``p_j ∝ exp z_j`` and ``P_c ∝ n_c exp(m_c) cosh(s_c)``;
- α-entmax, with ``p = 1/(α−1)``: ``p_j = [(α−1) z_j − τ]₊^p``, ``P_c = n_c/2 · Σ_± [(α−1)(m_c ± s_c) − τ]₊^p``, with the one
  ``τ`` at which all probabilities, of keys and clusters, sum to one.

So a cluster of one or two keys weighs exactly what its keys do, one of equal keys too. A normal distribution of the same mean
and variance, ``P_c ∝ n_c exp(m_c + s_c²/2)``, has a tail that a few keys never have, and makes too much of wide clusters:
``docs/explanation/tail.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsefinder.numerics.normalizers import softmax
from sparsefinder.numerics.selection import thresholds

_LEAST = 1e-4  # standard deviation that stands for none: below, that of the sum is lost in the rounding of its halves


def with_clusters(
    scores: Tensor, mean: Tensor, variance: Tensor, numbers: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Probabilities of keys, and of clusters of them; differentiable in all but the numbers.

    Args:
        scores: ``(..., K)`` float32 or float64, ``-inf`` where a key is absent; ``K`` may be 0.
        mean: ``(..., C)``, of the scores of each cluster.
        variance: ``(..., C)``, of these.
        numbers: ``(..., C)`` floating point, the keys in each cluster, 1 or more; 0 where it is absent.
        alpha: Of the normalizer, from 1 to 2.

    Returns:
        ``(..., K)`` and ``(..., C)``, which sum to one together; zeros where there is neither key nor cluster.
    """
    spread = variance.clamp_min(_LEAST**2).sqrt()
    together = torch.cat([scores, mean + spread, mean - spread], dim=-1)
    halves = numbers / 2
    copies = torch.cat([torch.ones_like(scores), halves, halves], dim=-1)
    p = softmax(together + copies.log()) if alpha == 1.0 else _entmax(together, copies, alpha)
    keys, upper, lower = p.split([scores.shape[-1], mean.shape[-1], mean.shape[-1]], dim=-1)
    return keys, upper + lower


def _entmax(scores: Tensor, copies: Tensor, alpha: float) -> Tensor:
    """Probabilities of so many copies of each score, ``(..., M)``; of half a copy or more, or none."""
    power = 1 / (alpha - 1)
    x = ((alpha - 1) * scores).masked_fill(copies == 0, -math.inf)
    with torch.no_grad():
        threshold = thresholds(x, copies, alpha, least=0.5)
        empty = threshold == -math.inf
        threshold = threshold.masked_fill(empty, 0.0)
    # one more step of Newton's: at the root its derivative in all scores is that of the root
    above = (x - threshold).clamp_min(0)
    slope = (copies * above ** (power - 1) * (above > 0)).sum(-1, keepdim=True).detach()
    step = ((copies * above**power).sum(-1, keepdim=True) - 1) / (power * slope).clamp_min(1e-30)
    return copies * (x - threshold - step.masked_fill(empty, 0.0)).clamp_min(0) ** power
