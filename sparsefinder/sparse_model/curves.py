"""From one target for a model to the sparsity parameter of each head, by curves that were measured once.

A curve says what each value of the sparsity parameter gave a head: the share of the pairs (density), what of the dense
attention lies on them (recall), and how far the head's output is from the dense one (error). For a density of the whole model
the values are those whose total error is least,

    ``min Σ_h w_h e_h(level_h)²``  where  ``mean_h d_h(level_h) ≤ density``,

with ``w_h`` the head's share of its layer's squared output: a price on density, the same for all heads, and each head takes what
is cheapest for it. So heads that look at many keys are given many.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.experiment.targets import Measured, spread

_BETWEEN = 8  # steps between two measured values, where a sparsity parameter is no whole number


@dataclass(frozen=True)
class Target:
    """What a model should have.

    Args:
        measure: ``density``: mean share of the pairs over all heads; ``recall``: of each head, at least;
            ``loss_tolerance``: the most that 1 − the cosine of the pooled output to that of the dense model may be.
        value: Its number.
    """

    measure: str
    value: float

    def __post_init__(self) -> None:
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not number or not 0 < self.value <= 1:
            raise UserError(f"{self.measure}={self.value}: give a number above 0 and at most 1")

    def __str__(self) -> str:
        return f"{self.measure}={self.value:g}"


@dataclass(frozen=True)
class Curves:
    """What values of the sparsity parameter gave, on texts that nothing was learned from.

    Args:
        levels: ``(V,)`` float64, ascending.
        density: ``(V, L, H)``, mean share of the allowed pairs.
        recall: The same for recall: of entmax the share of the gold edges, of softmax the share of the probability.
        error: The same for the relative L2 distance of the head's output to the dense one.
        weight: ``(L, H)``, the head's share of the squared output of its layer.
        whole: Whether the sparsity parameter is a whole number.
    """

    levels: Tensor
    density: Tensor
    recall: Tensor
    error: Tensor
    weight: Tensor
    whole: bool

    def choose(self, target: Target) -> tuple[tuple[float, ...], ...]:
        """The value of each layer and head for a density or a recall.

        Where a recall cannot be reached, the head takes the value of largest recall; where a density cannot, each head its
        sparsest.
        """
        fine = self._interpolated()
        if target.measure == "recall":
            enough = fine.recall >= target.value
            price = torch.where(enough, fine.density, torch.inf)
            index = torch.where(enough.any(0), price.argmin(0), fine.recall.argmax(0))
        else:
            index = fine._spread(target.value)
        return tuple(tuple(row) for row in fine._typed(fine.levels[index]))

    def _spread(self, density: float) -> Tensor:
        """Which value each head takes, ``(L, H)``, so that their mean density is that and their error least."""
        kept = -self.weight * self.error.square()
        heads = list(itertools.product(*map(range, self.weight.shape)))

        def curve(layer: int, head: int) -> dict[int, Measured]:
            columns = (x[:, layer, head].tolist() for x in (self.density, self.recall, kept))
            return {value: Measured(*each) for value, each in enumerate(zip(*columns, strict=True))}

        chosen = spread({head: curve(*head) for head in heads}, density)
        return torch.tensor([chosen[head] for head in heads]).view(self.weight.shape)

    def read(self, curve: str, values: Sequence[Sequence[float]]) -> Tensor:
        """What ``density``, ``recall`` or ``error`` of each head is at its value, ``(L, H)`` float64."""
        fine = self._interpolated()
        index = (fine.levels[:, None, None] - torch.tensor(values, dtype=torch.float64)).abs().argmin(0)
        return getattr(fine, curve).double().gather(0, index[None])[0]

    def _interpolated(self) -> Curves:
        """With values between the measured ones on straight lines; of a whole-numbered parameter as it is."""
        if self.whole or len(self.levels) < 2:
            return self
        shares = torch.arange(_BETWEEN, dtype=torch.float64) / _BETWEEN

        def finer(x: Tensor) -> Tensor:
            x = x.double()
            parts = [(a + (b - a) * s)[None] for a, b in itertools.pairwise(x) for s in shares]
            return torch.cat([*parts, x[-1:]])

        levels, density, recall, error = (finer(x) for x in (self.levels, self.density, self.recall, self.error))
        return Curves(levels, density, recall, error, self.weight.double(), self.whole)

    def _typed(self, values: Tensor) -> list[list[float]]:
        rows: list[list[float]] = values.tolist()
        return [[round(v) if self.whole else float(f"{v:.6g}") for v in row] for row in rows]
