"""Locality-sensitive hashing: a query and a key meet where a random rotation sends both to one bucket (Kitaev et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.choosing import check_counts, vectors
from sparsefinder.randomness import normal
from sparsefinder.store import UserError


@dataclass(frozen=True)
class Reformer:
    """Edge iff ``h_r(q_i) = h_r(k_j)`` in **any** round ``r``, where ``h_r(x) = argmax([x R_r; −x R_r])``.

    ``R_r``, ``(D, n_buckets / 2)``, has standard normal entries, fixed by seed, layer, head and round: more rounds only add
    edges. A hash looks at directions only, so it makes no difference that the paper scales keys to unit length.

    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, https://arxiv.org/abs/2001.04451, equation 4. Where
    we differ: (1) queries and keys are the model's own and hashed apart; in a model that shares them, the hashes are equal as
    in the paper. (2) Rotations stay, instead of being drawn anew for each batch. (3) No sorting into chunks: the paper attends
    to what shares a bucket *and* lies in the same or the previous chunk of the sorted tokens, which drops pairs of large
    buckets; here a bucket is whole. (4) A token may attend to itself like to any other. (5) A pair that several rounds name
    is one edge of one normalizer; the paper weighs rounds by their own sums.
    """

    n_rounds: int = 4  # independent hashes
    n_buckets: int = 64  # of each round; even
    seed: int = 0

    dial: ClassVar[str | None] = "n_rounds"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_counts(n_rounds=self.n_rounds, n_buckets=self.n_buckets)
        if self.n_buckets % 2:
            raise UserError(
                f"n_buckets must be even, a direction and its opposite, got {self.n_buckets}: try {self.n_buckets + 1}"
            )

    def layout(self, qk: QK, layer: int) -> Layout:
        """Hashes as buckets: round ``r`` uses the ids ``r · n_buckets … r · n_buckets + n_buckets − 1``."""
        q, k = vectors(qk)
        rotations = [self._rotation(qk, layer, round).to(q.dtype) for round in range(self.n_rounds)]
        q_ids, k_ids = (
            torch.stack([_side(x @ rotation) + r * self.n_buckets for r, rotation in enumerate(rotations)], dim=-1)
            for x in (q, k)
        )
        return Layout(Buckets(q_ids, k_ids, self.n_rounds * self.n_buckets))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _rotation(self, qk: QK, layer: int, round: int) -> Tensor:
        """``(H, D, n_buckets / 2)``."""
        head, size, column = (
            torch.arange(n, device=qk.q.device) for n in (qk.q.shape[1], qk.q.shape[-1], self.n_buckets // 2)
        )
        which = torch.tensor(round, device=qk.q.device)
        return normal(self.seed, layer, which, head[:, None, None], size[:, None], column)


def _side(rotated: Tensor) -> Tensor:
    return torch.cat([rotated, -rotated], dim=-1).argmax(-1)
