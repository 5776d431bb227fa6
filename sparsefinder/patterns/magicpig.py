"""Sampling by hash tables: a key that collides with the query in two tables or more is attended (Chen et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.counter_rng import normal
from sparsefinder.patterns.support.ranking import check_counts, vectors


@dataclass(frozen=True)
class MagicPIG:
    """Edge iff the codes of ``q_i`` and ``k_j − k̄`` agree in ``collisions`` or more of ``n_tables`` hash tables.

    The code of table ``t`` is the ``bits`` signs of ``x P_t`` (SimHash), ``P_t (D, bits)`` standard normal and fixed by seed,
    layer, head and table: more tables only add edges. ``k̄`` is the mean key of the sentence; where attention is causal, of
    the keys up to ``k_j``, so that nothing reads the future. A shift of all keys changes no attention probability, but it lets
    hashes tell them apart. Two collisions are no set of buckets: there is no layout.

    Source:
        Chen et al. (2024), MagicPIG: LSH Sampling for Efficient LLM Generation, https://arxiv.org/abs/2410.16179. Where we
        differ:

        1. The paper takes the keys that collide for a *sample*, and divides the weight of each by the probability that it is
           drawn; a graph has no weights, so this part of the estimator is left out.
        2. For every query of a sentence, not for the one that is being generated.
        3. The paper always attends to the first 4 and the last 64 tokens, and keeps two layers dense: unite with a window and
           global tokens for that.
        4. Codes are compared pair by pair here, so predicting is quadratic (in the tables, not in D); the paper looks them up.
    """

    n_tables: int = 75  # hash tables
    bits: int = 8  # of the code in a table
    collisions: int = 2  # tables in which a query and a key must have the same code
    seed: int = 0

    sparsity_parameter: ClassVar[str | None] = "n_tables"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_counts(n_tables=self.n_tables, bits=self.bits, collisions=self.collisions)
        if self.bits > 62:
            raise UserError(f"bits must be at most 62, a code in one integer, got {self.bits}")

    def cost(self, tokens: int, size: int) -> float:
        """``2 · D`` for each bit of all tables: queries and keys are hashed. Comparing codes multiplies nothing."""
        return 2.0 * size * self.n_tables * self.bits

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Half of it: each key is hashed as a query is."""
        return self.cost(tokens, size) / 2

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        q, k = vectors(qk)
        planes = self._planes(qk, layer).to(q.dtype)
        q_codes, k_codes = (self._codes(x, planes) for x in (q, k - _mean_keys(k, qk)))
        shared = torch.zeros(qk.graph_shape, dtype=torch.int32, device=q.device)
        for q_code, k_code in zip(q_codes, k_codes, strict=True):
            shared += q_code[..., :, None] == k_code[..., None, :]
        return (shared >= self.collisions) & qk.allowed

    def _planes(self, qk: QK, layer: int) -> Tensor:
        """``(H, D, n_tables · bits)`` float64."""
        table, head, size, bit = (
            torch.arange(n, device=qk.q.device) for n in (self.n_tables, qk.q.shape[1], qk.q.shape[-1], self.bits)
        )
        return normal(self.seed, layer, table[:, None], head[:, None, None, None], size[:, None, None], bit).flatten(2)

    def _codes(self, x: Tensor, planes: Tensor) -> tuple[Tensor, ...]:
        """The signs of ``x (B, H, N, D)`` in each table as one integer, ``(B, H, N)`` for each."""
        signs = (x @ planes > 0).unflatten(-1, (-1, self.bits)).long()
        return (signs << torch.arange(self.bits, device=x.device)).sum(-1).unbind(-1)


def _mean_keys(k: Tensor, qk: QK) -> Tensor:
    """Means of keys ``(B, H, N, D)`` that are zero on padding: of the sentence ``(B, H, 1, D)``, or causal up to each key."""
    if qk.causal:
        return k.cumsum(2) / (qk.positions + 1)[:, None, :, None]
    return k.sum(2, keepdim=True) / qk.lengths.clamp_min(1)[:, None, None, None]
