"""Sparsefinder by distance: a query attends to the keys that lie near it in the projected space (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError, one_of
from sparsefinder.graphs import QK
from sparsefinder.numerics.counter_rng import uniform
from sparsefinder.numerics.distances import PAIRWISE


@dataclass(frozen=True)
class Distance:
    """Edge iff ``dist(q'_i, k'_j) < threshold``.

    ===========  ======================================================================
    cos          ``1 − cos(q', k')``
    euclidean    ``‖q' − k'‖₂``
    l2           ``‖q' − k'‖₂²``
    direction    norm-``p`` distance of the norm-``p`` unit vectors
    minkowski    ``‖q' − k'‖_p``
    min          smallest squared coordinate difference, ``min_r (q'_r − k'_r)²``
    min_norm     ``min`` on the norm-``p`` unit vectors
    random       a uniform number in [0, 1) for each pair, fixed by seed, layer and head
    ===========  ======================================================================

    Every pair is compared, so predicting is quadratic (in R, not D). ``random`` differs from the published one, which draws
    anew for each batch.
    """

    distance: str = "l2"
    threshold: float = 1.0  # an edge is shorter than this
    p: Annotated[float, "or infinite"] = 2.0  # of the norm in direction, minkowski and min_norm
    seed: int = 0  # of the random distance

    sparsity_parameter: ClassVar[str | None] = "threshold"

    def __post_init__(self) -> None:
        if self.distance not in (*PAIRWISE, "random"):
            raise UserError(f"distance={self.distance} is unknown; {one_of((*PAIRWISE, 'random'), self.distance)}")
        if self.p <= 0:
            raise UserError(f"p must be positive, got {self.p}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Chance needs no projections."""
        return () if self.distance == "random" else ("projections",)

    @property
    def each_query_alone(self) -> bool:
        """Whether no other query and no position matters: chance is drawn for positions."""
        return self.distance != "random"

    def cost(self, tokens: int, size: int) -> float:
        """``n · R``, whichever distance; nothing for ``random``."""
        return 0.0 if self.distance == "random" else float(tokens * size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        random = self.distance == "random"
        distances = self._random(qk, layer) if random else PAIRWISE[self.distance](qk.q, qk.k, self.p)
        return (distances < self.threshold) & qk.allowed

    def _random(self, qk: QK, layer: int) -> Tensor:
        heads = torch.arange(qk.q.shape[1], device=qk.q.device)
        query, key = qk.query_positions, qk.positions  # counted over real tokens, so that padding changes nothing
        return uniform(self.seed, layer, heads[:, None, None], query[:, None, :, None], key[:, None, None, :])
