"""Locality-sensitive hashing: a query and a key meet where a random rotation sends both to one bucket (Kitaev et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import normal
from sparsefinder.patterns.support.ranking import check_counts, vectors


@dataclass(frozen=True)
class Reformer:
    """Edge iff ``h_r(q_i) = h_r(k_j)`` in **any** round ``r``, where ``h_r(x) = argmax([x R_r; −x R_r])``.

    ``R_r``, ``(D, n_buckets / 2)``, has standard normal entries, fixed by seed, layer, head and round: more rounds only add
    edges. A hash looks at directions only, so it makes no difference that the paper scales keys to unit length.

    Source:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, https://arxiv.org/abs/2001.04451, equation 4.
        Where we differ:

        1. Queries and keys are the model's own and hashed apart; in a model that shares them, the hashes are equal as in the
           paper.
        2. Rotations stay, instead of being drawn anew for each batch.
        3. No sorting into chunks: the paper attends to what shares a bucket *and* lies in the same or the previous chunk of
           the sorted tokens, which drops pairs of large buckets; here a bucket is whole.
        4. A token may attend to itself like to any other.
        5. A pair that several rounds name is one edge of one normalizer; the paper weighs rounds by their own sums.
    """

    n_rounds: int = 4  # independent hashes
    n_buckets: int = 64  # of each round; even
    seed: int = 0

    sparsity_parameter: ClassVar[str | None] = "n_rounds"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_counts(n_rounds=self.n_rounds, n_buckets=self.n_buckets)
        if self.n_buckets % 2:
            raise UserError(
                f"n_buckets must be even, a direction and its opposite, got {self.n_buckets}: try {self.n_buckets + 1}"
            )

    def layout(self, qk: QK, layer: int) -> Layout:
        """Hashes as buckets: round ``r`` uses the ids ``r · n_buckets … r · n_buckets + n_buckets − 1``."""
        rotations = self._rotations(qk, layer)
        first = torch.arange(self.n_rounds, device=qk.q.device) * self.n_buckets
        q_ids, k_ids = (self._hashes(x, rotations.to(x.dtype)) + first for x in vectors(qk))
        return Layout(Buckets(q_ids, k_ids, self.n_rounds * self.n_buckets))

    def cost(self, tokens: int, size: int) -> float:
        """``D`` for each bucket of all rounds: queries and keys are projected to half as many directions."""
        return float(size * self.n_rounds * self.n_buckets)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Half of it: each key is hashed as a query is."""
        return self.cost(tokens, size) / 2

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _rotations(self, qk: QK, layer: int) -> Tensor:
        """``(H, D, n_rounds · n_buckets / 2)`` float64."""
        rounds, head, size, column = (
            torch.arange(n, device=qk.q.device)
            for n in (self.n_rounds, qk.q.shape[1], qk.q.shape[-1], self.n_buckets // 2)
        )
        drawn = normal(self.seed, layer, rounds[:, None], head[:, None, None, None], size[:, None, None], column)
        return drawn.flatten(2)

    def _hashes(self, x: Tensor, rotations: Tensor) -> Tensor:
        """``(B, H, N, D)`` → the bucket in each round, ``(B, H, N, n_rounds)`` int64."""
        sides = (x @ rotations).unflatten(-1, (self.n_rounds, -1))
        return torch.cat([sides, -sides], dim=-1).argmax(-1)
