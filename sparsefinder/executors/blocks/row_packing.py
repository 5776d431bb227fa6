"""One contiguous row of scores per query, from scores that several products left apart.

A normalizer needs all scores of a query together. Flat scores are cut into segments of ``STEP`` scores, and the segments of a
query are gathered side by side; queries with equally long rows form one rectangle, so that any normalizer of
`sparsefinder.numerics.normalizers` works on them as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.executors.blocks.bucket_tiles import STEP, round_up
from sparsefinder.executors.blocks.gather import gather


@dataclass(frozen=True)
class PackedRows:
    """Which segments of the flat scores lie side by side in each query's row.

    Args:
        sources: ``(row segments, 1)`` int64, the segment of the flat scores at each segment of the rows, -1 on filling.
        copies: ``(segments of the flat scores, 1)``, the way back, -1 for scores that nobody needs.
        shapes: ``(rows, width)`` of each rectangle.
        order: the query of each row, rectangle after rectangle; those without scores are in none.
    """

    sources: Tensor
    copies: Tensor
    shapes: tuple[tuple[int, int], ...]
    order: Tensor

    def pack(self, scores: Tensor) -> list[Tensor]:
        """Flat scores → rectangles, ``-inf`` on filling."""
        packed = gather(scores.view(-1, STEP), self.sources, self.copies, missing=-math.inf)
        parts = packed.split([rows * width // STEP for rows, width in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpack(self, rectangles: list[Tensor]) -> Tensor:
        """Rectangles → flat scores, zeros for scores that were in no row."""
        if not rectangles:
            return torch.zeros(len(self.copies) * STEP, device=self.copies.device)
        packed = torch.cat([rectangle.reshape(-1, STEP) for rectangle in rectangles])
        return gather(packed, self.copies, self.sources).view(-1)


def lay_out_rows(starts: Tensor, counts: Tensor, segments: int) -> PackedRows:
    """Rows from stretches of segments.

    Args:
        starts: ``(M, S)`` int64, the first segment of each stretch of each row.
        counts: ``(M, S)`` int64, how many segments it has.
        segments: how many there are in all.
    """
    lengths = counts.sum(-1)
    widths = round_up(lengths, 1)
    order = widths.argsort(stable=True)
    order = order[int((widths == 0).sum()) :]
    # the filling at the end of a row is a stretch that starts so far below zero that it stays there
    starts = torch.cat([starts, torch.full_like(widths, -(2**48))[:, None]], dim=1)[order].view(-1)
    counts = torch.cat([counts, (widths - lengths)[:, None]], dim=1)[order].view(-1)
    ends = counts.cumsum(0)
    sources = (starts - ends + counts).repeat_interleave(counts)
    sources = (sources + torch.arange(len(sources), device=sources.device)).clamp_min_(-1)
    real = (sources >= 0).nonzero().squeeze(-1)
    copies = torch.full((segments,), -1, device=sources.device)
    copies[sources[real]] = real
    width, rows = widths[order].unique_consecutive(return_counts=True)
    shapes = tuple((n, w * STEP) for n, w in zip(rows.tolist(), width.tolist(), strict=True))
    return PackedRows(sources[:, None], copies[:, None], shapes, order)
