"""Prediction by an inner product of few numbers: the scores themselves, cheaper and a little wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.numerics.selection import check_rule, select
from sparsefinder.patterns.support.cost import EveryPair


@dataclass(frozen=True)
class LowRank(EveryPair):
    """Edge iff ``q'_i·k'_j / √R`` is selected among the row's keys by ``rule`` and ``level``.

    The rules are those of `sparsefinder.numerics.selection`. ``q'``, ``k'`` are the closed-form projections of the stage
    ``route``, whose inner product is nearest to ``q·k`` among all maps of rank R. Every pair is compared, so predicting is
    quadratic, in R instead of D. It is what routing to clusters would reach with a cluster for each key.
    """

    rule: str = "margin"  # margin or budget
    level: float = 0.2  # how far below the estimated threshold (margin), or which share of the keys (budget)
    alpha: float = 1.5  # of the entmax whose threshold is estimated

    sparsity_parameter: ClassVar[str | None] = "level"
    needs: ClassVar[tuple[str, ...]] = ("lowrank",)

    def __post_init__(self) -> None:
        check_rule(self.rule, self.level, self.alpha)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        scores = qk.scores()
        return select(scores, qk.allowed.expand(scores.shape).to(scores.dtype), self.rule, self.level, self.alpha)
