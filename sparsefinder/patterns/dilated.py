"""A window with gaps: it reaches further and sees no more (Beltagy et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, odd


@dataclass(frozen=True)
class Dilated(Free):
    """Edge iff ``(i − j) mod d = 0`` and ``|i − j| ≤ d · (W // 2)``: ``W`` keys, each ``d`` after the one before.

    No more than every ``d``-th pair can be an edge. Distances are counted over real tokens.

    Source:
        Beltagy et al. 2020 (https://arxiv.org/abs/2004.05150), section 3.1, the same in every layer and head.
    """

    width: int = 11  # W, odd: the query's own position and W // 2 keys on each side
    dilation: int = 2  # d, tokens from one key to the next; 1 is a window without gaps

    sparsity_parameter: ClassVar[str | None] = "width"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        odd(width=self.width)
        at_least(1, dilation=self.dilation)

    def layout(self, qk: QK, layer: int) -> Layout:
        """A bucket for each query, see `dilated`; a plain window where there are no gaps."""
        qk.one_text(type(self).__name__)
        return dilated(qk, self.width, [self.dilation] * qk.q.shape[1])

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)


def dilated(qk: QK, width: int, dilations: list[int]) -> Layout:
    """Windows with a dilation of its own for each head.

    With gaps every query is by itself in a bucket with the keys it sees: linear in N, but a bucket is filled up to whole
    tiles, so that this only pays for texts much longer than a window.

    Args:
        qk: Queries and keys; only real tokens are counted.
        width: ``W``, odd: the query's own position and ``W // 2`` keys on each side.
        dilations: For each head, the tokens from one key to the next.

    Returns:
        A plain window where no head has gaps, else a bucket for each query.
    """
    if set(dilations) == {1}:
        return Layout(window=width)
    longest = max(int(qk.lengths.max()), 1)
    reach = min(width // 2, (longest - 1) // min(dilations))
    steps = torch.arange(-reach, reach + 1, device=qk.valid.device)
    positions = qk.positions[:, None, :, None].expand(-1, len(dilations), -1, -1)
    seen_by = positions + torch.tensor(dilations, device=steps.device)[:, None, None] * steps
    outside = (seen_by < 0) | (seen_by >= longest)
    return Layout(Buckets(positions, seen_by.masked_fill(outside, -1), longest))
