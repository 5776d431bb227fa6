"""One contiguous row of scores per query, from scores that several products left in pieces.

A normalizer needs all scores of a query together. The pieces are cut into segments of ``STEP`` scores, and the segments of a
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
class Rows:
    """``sources``: ``(row segments, 1)`` int64, the segment of the pieces at each segment of the rows, -1 on filling.

    ``copies``: ``(segments of the pieces, 1)``, the way back, -1 for scores that nobody needs. ``shapes``: ``(rows, width)`` of
    each rectangle.
    """

    sources: Tensor
    copies: Tensor
    shapes: tuple[tuple[int, int], ...]

    def pack(self, pieces: Tensor) -> list[Tensor]:
        """Flat scores → rectangles, ``-inf`` on filling."""
        packed = gather(pieces.view(-1, STEP), self.sources, self.copies, missing=-math.inf)
        parts = packed.split([rows * width // STEP for rows, width in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpack(self, rectangles: list[Tensor]) -> Tensor:
        """Rectangles → flat pieces, zeros for scores that were in no row."""
        if not rectangles:
            return torch.zeros(len(self.copies) * STEP, device=self.copies.device)
        packed = torch.cat([rectangle.view(-1, STEP) for rectangle in rectangles])
        return gather(packed, self.copies, self.sources).view(-1)


def lay_out_rows(starts: Tensor, counts: Tensor, segments: int) -> Rows:
    """Rows of ``(M, S)`` int64 stretches of segments: from each of ``starts``, ``counts`` many; ``segments`` in all pieces."""
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
    return Rows(sources[:, None], copies[:, None], shapes)
