"""Every allowed pair: dense attention as a pattern, the end of every frontier where nothing is missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.patterns.support.cost import Free


@dataclass(frozen=True)
class Full(Free):
    """Edge iff the pair is allowed."""

    sparsity_parameter: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    each_query_alone: ClassVar[bool] = True

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return qk.allowed.expand(-1, qk.q.shape[1], -1, -1)
