"""Oracle with a share of the probability for each query: the fewest keys that hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.support.cost import EveryPair
from sparsefinder.patterns.support.ranking import fewest


@dataclass(frozen=True)
class OracleTopP(EveryPair):
    """Edge iff ``j ∈ S_i``, the smallest set with ``Σ_{j∈S_i} p_ij ≥ p``, where ``p_i = α-entmax(K q_i / √D)`` is dense.

    The bound of every method with a share of the probability as its goal. With ``alpha = 1`` the probabilities are those of
    softmax, as elsewhere in the field, and ``p = 1`` gives every key whose probability is more than 0 in float32; with ``alpha
    = 1.5`` it gives the gold graph. It needs every score, so it saves no work.

    Source:
        Top-p, after Holtzman et al. 2020 (https://arxiv.org/abs/1904.09751).
    """

    p: float = 0.9  # share of each query's probability
    alpha: float = 1.0  # of the entmax that gives the probabilities; 1 is softmax

    sparsity_parameter: ClassVar[str | None] = "p"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        Normalizer(self.alpha)
        if not 0 <= self.p <= 1:
            raise UserError(f"p must lie between 0 and 1, got {self.p}")

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return fewest(Normalizer(self.alpha)(qk.scores()), self.p) & qk.allowed
