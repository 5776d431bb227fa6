"""Sparsefinder by quantization: tokens whose projections fall into the same bin meet (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.cost import Free


@dataclass(frozen=True)
class Quantize(Free):
    """Each of the R coordinates is cut into ``ceil(n / bucket_size)`` bins; edge iff **any** of them has both in one bin.

    With ``same_size`` the bins of a coordinate hold equally many tokens, ``rank // bucket_size``, queries and keys ranked
    apart; otherwise they are of equal width over ``tanh(temperature · x)`` in [−1, 1]. ``n`` is the length of that sentence,
    not of the padded batch; in cross-attention that of the keys, and queries are spread evenly over as many bins.
    """

    bucket_size: int = 8  # tokens that a bin holds (same_size), or would hold if they were spread evenly
    same_size: bool = True
    temperature: float = 1.0  # of equal width: larger pushes values to the outer bins

    sparsity_parameter: ClassVar[str | None] = "bucket_size"
    needs: ClassVar[tuple[str, ...]] = ("projections",)
    # in causal attention
    reads_ahead: ClassVar[str] = "a token is ranked among all of its sentence, later ones too"

    def __post_init__(self) -> None:
        if self.bucket_size < 1:
            raise UserError(f"bucket_size must be 1 token or more, got {self.bucket_size}")
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")

    def layout(self, qk: QK, layer: int) -> Layout:
        """Bins as buckets: coordinate ``r`` uses the ids from ``r · (bins of the longest sentence)``."""
        bins = -(-qk.lengths // self.bucket_size)  # (B,)
        most = int(bins.max())
        first = torch.arange(qk.q.shape[-1], device=qk.q.device) * most
        if self.same_size:
            k_ids = self._ranks(qk.k, qk.valid) // self.bucket_size
            q_ids = self._ranks(qk.q, qk.queries_valid)
            if qk.crosses:  # as many queries in each bin, in as many bins as the keys have
                q_ids = q_ids * bins[:, None, None, None] // qk.swapped.lengths.clamp_min(1)[:, None, None, None]
            else:
                q_ids = q_ids // self.bucket_size
        else:
            q_ids, k_ids = self._equal_width(qk.q, qk.queries_valid, bins), self._equal_width(qk.k, qk.valid, bins)
        return Layout(Buckets(q_ids + first, k_ids + first, most * qk.q.shape[-1]))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)

    def _ranks(self, x: Tensor, valid: Tensor) -> Tensor:
        padded = ~valid[:, None, :, None]
        ranks = x.masked_fill(padded, torch.inf).argsort(dim=2, stable=True).argsort(dim=2, stable=True)
        return ranks.masked_fill(padded, 0)

    def _equal_width(self, x: Tensor, valid: Tensor, bins: Tensor) -> Tensor:
        squashed = torch.tanh(self.temperature * x)
        ids = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for example, intervals in enumerate(bins.tolist()):
            step = 2.0 / max(intervals, 1)
            inner = torch.linspace(-1 + step, 1 - step, max(intervals - 1, 0), device=x.device)
            ids[example] = torch.bucketize(squashed[example].contiguous(), inner)
        return ids.masked_fill(~valid[:, None, :, None], 0)
