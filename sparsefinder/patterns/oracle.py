"""The gold graph itself as a pattern: what a perfect predictor would say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.executors.support_lists import support
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.support.cost import EveryPair


@dataclass(frozen=True)
class Oracle(EveryPair):
    """Edge iff ``p_ij > 0`` in the dense α-entmax attention of the same head. It needs every score, so it saves no work."""

    alpha: float = 1.5  # of the entmax whose support is meant; 1 (softmax) gives every allowed pair

    sparsity_parameter: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        Normalizer(self.alpha)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        found = support(
            qk, self.alpha
        )  # the list that metrics compare with: pairs at the threshold too are the same ones
        graph = torch.zeros(qk.graph_shape, dtype=torch.bool, device=qk.q.device)
        graph.flatten(0, 2)[found.rows, found.keys] = True
        return graph
