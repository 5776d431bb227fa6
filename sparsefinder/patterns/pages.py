"""Contiguous pages of keys with a mean and a spread: a query takes those that may reach its estimated threshold (2026)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Layout
from sparsefinder.numerics.normal_scores_threshold import check_alpha, threshold
from sparsefinder.patterns.support.key_blocks import TokenBlocks
from sparsefinder.patterns.support.ranking import as_ids, check_counts, vectors


@dataclass(frozen=True)
class Pages:
    """Edge iff the key's page has ``(α − 1)(m_iJ + z_J s_iJ) ≥ τ̂_i − level``.

    ``m_iJ = q_i·μ_J/√D`` and ``s²_iJ = Σ_d q²_id σ²_Jd/D``, where ``μ_J`` and ``σ²_J`` are the mean and variance of the ``n_J``
    keys of a page, whose scores are taken to be normal. ``τ̂_i`` is the threshold at which entmax of that mixture sums to one,
    ``Σ_J n_J E[((α−1)z − τ̂_i)₊^{1/(α−1)}] = 1`` with ``z ~ N(m_iJ, s²_iJ)``, and ``z_J = Φ⁻¹(quantile^{1/n_J})`` says how far
    above its mean the best of ``n_J`` scores may lie. Where attention is causal, of its own page a query reads what it sees,
    and of later pages nothing.

    Source:
        EntmaxKV (deep-spin, 2026), https://arxiv.org/abs/2605.21649: the Gaussian selector. Where we differ:

        1. For every query of a sentence, not for the one that is being generated; no page is always taken.
        2. The threshold of the mixture of pages; the authors' code takes it for heads with ALiBi, and one normal distribution
           for all scores elsewhere.
        3. Pages of 4 keys by default, not 16, since sentences are a hundred times shorter.
        4. One margin ``level`` where their code has a quantile, a margin in deviations and a share of the excess. Their other
           selector, the bound by the range of the keys of a page, is `quest`.
    """

    level: float = 0.0  # how far below the estimated threshold
    size: int = 4  # keys in a page
    quantile: float = 0.5  # of the largest of a page's scores; larger forgives more, as a larger level does
    alpha: float = 1.5  # of the entmax whose threshold is estimated
    # whether each page that a query does not take is one entry among its scores: see `Layout`
    tail: bool = field(default=False, kw_only=True)

    sparsity_parameter: ClassVar[str | None] = "level"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_counts(size=self.size)
        if not 0 < self.quantile < 1:
            raise UserError(f"quantile must lie between 0 and 1, got {self.quantile}")
        if not 1 < self.alpha <= 2:
            raise UserError(f"alpha must be greater than 1 and at most 2, got {self.alpha}: softmax has no threshold")
        check_alpha(self.alpha)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Pages as buckets: a query is in those that it takes, a key in its own."""
        pages = TokenBlocks.cut(qk, self.size)
        mean, variance, numbers = _estimates(qk, pages)
        best = mean + variance.sqrt() * self._deviations(qk)[numbers.long()]
        estimated = threshold(mean, variance, numbers, self.alpha)
        taken = ((self.alpha - 1) * best >= estimated - self.level) & (numbers > 0)
        return pages.layout(as_ids(taken), self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """``2 · D`` for each page: its mean and its spread."""
        return 2.0 * size * -(-tokens // self.size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _deviations(self, qk: QK) -> Tensor:
        """``z`` of a page by the number of its keys, ``(size + 1,)``."""
        of_numbers = (NormalDist().inv_cdf(self.quantile ** (1 / max(n, 1))) for n in range(self.size + 1))
        return torch.tensor(list(of_numbers), dtype=vectors(qk)[0].dtype, device=qk.q.device)


def _estimates(qk: QK, pages: TokenBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of the scores of each query and page, and the keys that it sees there, ``(B, H, N, pages)`` each."""
    q, k = vectors(qk)
    of_pages = pages.means(k)
    spread = pages.means((k - pages.spread(of_pages)).square())
    scale = math.sqrt(q.shape[-1])
    mean, variance = q @ of_pages.mT / scale, q.square() @ spread.mT / scale**2
    numbers = pages.filled.sum(-1)[:, None, None].to(q.dtype).expand(mean.shape)
    if not qk.causal:
        return mean, variance, numbers
    own = pages.block_of[:, None, :, None].expand(*mean.shape[:3], 1)
    seen = pages.running_means(k)
    seen_spread = (pages.running_means(k.square()) - seen.square()).clamp_min(0)
    later = torch.arange(pages.count, device=q.device) > own
    in_own = (pages.slot_of % pages.tokens.shape[2] + 1)[:, None, :, None].to(q.dtype).expand(own.shape)
    return (
        mean.scatter(3, own, (q * seen).sum(-1, keepdim=True) / scale),
        variance.scatter(3, own, (q.square() * seen_spread).sum(-1, keepdim=True) / scale**2),
        numbers.masked_fill(later, 0.0).scatter(3, own, in_own),
    )
