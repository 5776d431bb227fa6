"""Prediction by an inner product that was trained for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsefinder.patterns.lowrank import LowRank


@dataclass(frozen=True)
class Bilinear(LowRank):
    """As `LowRank`, ``q'_i·k'_j / √R`` selected among the row's keys, in the space that the stage ``bilinear`` trained.

    The closed form is nearest to all scores alike; the trained one is right where it matters, around each row's threshold.
    Every pair is compared, so predicting is quadratic, in R instead of D. See `sparsefinder.bilinear`.
    """

    needs: ClassVar[tuple[str, ...]] = ("bilinear_projections",)
