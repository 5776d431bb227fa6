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
    not of the padded batch.
    """

    bucket_size: int = 8  # tokens that a bin holds (same_size), or would hold if they were spread evenly
    same_size: bool = True
    temperature: float = 1.0  # of equal width: larger pushes values to the outer bins

    sparsity_parameter: ClassVar[str | None] = "bucket_size"
    needs: ClassVar[tuple[str, ...]] = ("projections",)

    def __post_init__(self) -> None:
        if self.bucket_size < 1:
            raise UserError(f"bucket_size must be 1 token or more, got {self.bucket_size}")
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")

    def layout(self, qk: QK, layer: int) -> Layout:
        """Bins as buckets: coordinate ``r`` uses the ids from ``r · (bins of the longest sentence)``."""
        bins = -(-int(qk.lengths.max()) // self.bucket_size)
        first = torch.arange(qk.q.shape[-1], device=qk.q.device) * bins
        cut = self._ranked if self.same_size else self._equal_width
        return Layout(Buckets(cut(qk.q, qk.valid) + first, cut(qk.k, qk.valid) + first, bins * qk.q.shape[-1]))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)

    def _ranked(self, x: Tensor, valid: Tensor) -> Tensor:
        padded = ~valid[:, None, :, None]
        ranks = x.masked_fill(padded, torch.inf).argsort(dim=2, stable=True).argsort(dim=2, stable=True)
        return (ranks // self.bucket_size).masked_fill(padded, 0)

    def _equal_width(self, x: Tensor, valid: Tensor) -> Tensor:
        squashed = torch.tanh(self.temperature * x)
        bins = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for example, length in enumerate(valid.sum(-1).tolist()):
            intervals = -(-length // self.bucket_size)
            step = 2.0 / max(intervals, 1)
            inner = torch.linspace(-1 + step, 1 - step, max(intervals - 1, 0), device=x.device)
            bins[example] = torch.bucketize(squashed[example].contiguous(), inner)
        return bins.masked_fill(~valid[:, None, :, None], 0)
