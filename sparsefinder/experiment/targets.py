"""What a pattern should be set to reach, and which value of its sparsity parameter each head takes for it.

A *curve* is what was measured of one head: by the value of the sparsity parameter its density, its recall and the share of the
dense probability that its graph keeps. A target is either one of every head (``density``, ``recall``) or one of all heads of
all layers together (``density_total``, ``loss``): there `spread` says which head should take more.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration


class Measured(NamedTuple):
    """What a head has at one value: shares of the pairs, of the gold edges and of the dense probability."""

    density: float
    recall: float
    mass: float


Curve = Mapping[Any, Measured]  # of one head: value of the sparsity parameter → what it has there
K = TypeVar("K", bound=Hashable)

OF_EACH_HEAD = ("density", "recall")
OF_ALL = ("density_total", "loss")


@dataclass(frozen=True)
class Swept:
    """A pattern with its local and global tokens, and the values of its sparsity parameter to begin with."""

    configuration: Configuration
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """A density or a recall that every head should have, or a density or a loss that all of them together should have."""

    measure: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """``density=0.1``, ``recall=0.95``, ``density_total=0.1`` or ``loss=0.01``; anything else is a `UserError`."""
        measure, _, number = text.partition("=")
        try:
            target = cls(measure.strip(), float(number))
        except ValueError:
            target = cls(measure, float("nan"))
        if target.measure not in (*OF_EACH_HEAD, *OF_ALL) or not 0 < target.value <= 1:
            raise UserError(
                f"target={text}: give density=D or recall=R (of every head), density_total=D (of all heads together) or loss=L "
                "(nats more than dense attention) with a number above 0 and at most 1, or null"
            )
        return target

    @property
    def of_all(self) -> bool:
        """Whether it is one of all heads together."""
        return self.measure in OF_ALL

    def choose(self, curve: Curve) -> Any:
        """The value of the sparsity parameter that a head takes where the target is one of every head."""
        if self.measure == "density":
            return min(curve, key=lambda value: abs(curve[value][0] - self.value))
        enough = [value for value in curve if curve[value][1] >= self.value]
        if enough:
            return min(enough, key=lambda value: curve[value][0])
        return max(curve, key=lambda value: curve[value][1])

    def reached(self, density: float, recall: float, tolerance: float) -> bool:
        """Whether a head is where it should be; a density may be away by the share ``tolerance`` of it."""
        if self.measure == "recall":
            return recall >= self.value
        return abs(density - self.value) <= tolerance * self.value

    def between(self, curve: Curve, whole: bool) -> Any | None:
        """A value to try next: between the two neighbours of the target, or where a curve is known least."""
        known = sorted(curve.items())
        if self.of_all:
            gaps = [
                ((high[0] - low[0]) * (high[2] - low[2]), a, b)  # by that much a straight line may be wrong
                for (a, low), (b, high) in itertools.pairwise(known)
                if not whole or b - a > 1
            ]
            width, a, b = max(gaps, default=(0.0, None, None))
            return _at(a, b, 0.5, whole) if width > 0 else None
        index = OF_EACH_HEAD.index(self.measure)
        for (a, low), (b, high) in itertools.pairwise(known):
            below, above = low[index] - self.value, high[index] - self.value
            if below * above < 0:
                return _at(
                    a, b, min(max(below / (below - above), 0.1), 0.9), whole
                )  # else a bent curve narrows nothing
        return None


def _at(low: Any, high: Any, share: float, whole: bool) -> Any | None:
    if not whole:
        return float(f"{low + (high - low) * share:.6g}")
    return min(max(round(low + (high - low) * share), low + 1), high - 1) if high - low > 1 else None


def spread(curves: Mapping[K, Curve], density: float) -> dict[K, Any]:
    """The value that each head takes so that all of them together keep the most dense probability at a mean density.

    The heads start at their sparsest values. Then whoever gains the most probability for each pair that it adds goes a step
    further, over the corners of the concave hull of its curve, until their mean density is reached: at the end all heads
    gain about as much by one more pair.

    Args:
        curves: Of each head; all stand for equally many pairs.
        density: Mean density to be reached, as nearly as the steps allow.

    Returns:
        A value of the sparsity parameter for each head.
    """
    hulls = {key: _hull(curve) for key, curve in curves.items()}
    steps = [
        (-_slope(low, high), order, index, key, high.density - low.density)
        for order, (key, hull) in enumerate(hulls.items())
        for index, ((_, low), (_, high)) in enumerate(itertools.pairwise(hull), start=1)
    ]
    left = density * len(curves) - sum(hull[0][1].density for hull in hulls.values())
    taken = dict.fromkeys(curves, 0)
    for *_, index, key, more in sorted(steps, key=lambda step: step[:3]):
        # where a step is too large the head stays where it is; another's may still be small enough
        if more / 2 <= left and taken[key] == index - 1:
            taken[key], left = index, left - more
    return {key: hulls[key][index][0] for key, index in taken.items()}


def _hull(curve: Curve) -> list[tuple[Any, Measured]]:
    """The corners of the smallest concave function above a curve, with rising density and probability."""
    corners: list[tuple[Any, Measured]] = []
    for value, here in sorted(curve.items(), key=lambda item: (item[1][0], -item[1][2])):
        if corners and here[2] <= corners[-1][1].mass:
            continue  # more pairs, no more probability
        point = Measured(*here)
        if corners and point.density <= corners[-1][1].density:
            continue
        while len(corners) > 1 and _slope(corners[-2][1], corners[-1][1]) <= _slope(corners[-1][1], point):
            corners.pop()
        corners.append((value, point))
    return corners


def _slope(low: Measured, high: Measured) -> float:
    return (high.mass - low.mass) / (high.density - low.density)


def whole_numbered(pattern: Any) -> bool:
    """Whether the sparsity parameter of a pattern is a whole number."""
    return typing.get_type_hints(type(pattern))[pattern.sparsity_parameter] is int
