"""How well a predicted graph matches the gold graph: one definition of each number, here and nowhere else.

Counts are taken for each example and head, over **allowed pairs** only (both tokens real, no future where causal). Ratios
are formed for each example and then averaged over examples (macro); the counts are kept, so any other grouping is exact
later. An example whose denominator is zero (the precision of an empty prediction) is left out of that mean.

=============  ========================================================================================
sparsity       ``1 − |pred| / |allowed|``
gold_sparsity  ``1 − |gold| / |allowed|``
recall         ``|pred ∩ gold| / |gold|``
precision      ``|pred ∩ gold| / |pred|``
f1             harmonic mean of the two
exact          share of real queries all of whose gold keys are predicted: there entmax is exactly the dense one
kept_mass      share of the dense probability that lies on predicted keys
recall_far     recall on pairs outside the window and the global tokens, which otherwise flatter every method
=============  ========================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sparsefinder.executors.support_lists import support
from sparsefinder.graphs import QK, Buckets

RATIOS = ("sparsity", "recall", "precision", "exact", "f1", "kept_mass", "recall_far", "gold_sparsity")
COSTS = ("prediction_cost", "attention_cost", "prediction_share")  # see `sparsefinder.experiment.costs`
BALANCE = ("bucket_entropy", "bucket_largest", "bucket_empty")


@dataclass(frozen=True)
class Counts:
    """Raw counts of examples and heads, each ``(B, H)``: int64, and float64 for ``mass``.

    Args:
        allowed: Allowed pairs.
        predicted: Pairs of the predicted graph.
        gold: Pairs of the gold graph.
        hits: Gold pairs that are predicted.
        queries: Real queries.
        exact: Real queries all of whose gold keys are predicted.
        far_gold: Gold pairs that are not ``near`` (see `count`).
        far_hits: Those of them that are predicted.
        mass: The dense probability on predicted keys, summed over the queries.
    """

    allowed: Tensor
    predicted: Tensor
    gold: Tensor
    hits: Tensor
    queries: Tensor
    exact: Tensor
    far_gold: Tensor
    far_hits: Tensor
    mass: Tensor

    @classmethod
    def cat(cls, parts: list[Counts]) -> Counts:
        """Counts of several batches, one after the other along ``B``."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def ratios(self) -> dict[str, Tensor]:
        """Each metric of ``RATIOS`` for each example and head, ``(B, H)`` float64; NaN where it is undefined."""
        # a quotient of whole numbers is float32 in torch, too coarse for a share of exactly 10 %
        as_float64 = Counts(**{f.name: getattr(self, f.name).double() for f in fields(self)})
        return {
            "sparsity": 1 - as_float64.predicted / as_float64.allowed,
            "recall": as_float64.hits / as_float64.gold,
            "precision": as_float64.hits / as_float64.predicted,
            "exact": as_float64.exact / as_float64.queries,
            "f1": 2 * as_float64.hits / (as_float64.predicted + as_float64.gold),
            "kept_mass": as_float64.mass / as_float64.queries,
            "recall_far": as_float64.far_hits / as_float64.far_gold,
            "gold_sparsity": 1 - as_float64.gold / as_float64.allowed,
        }

    def macro(self) -> dict[str, Tensor]:
        """Each metric for each head, ``(H,)`` float64: the mean over the examples where it is defined."""
        return {name: ratio.nanmean(0) for name, ratio in self.ratios().items()}


@dataclass(frozen=True)
class Gold:
    """The support of the dense attention of a head: what every prediction is measured against.

    A list, since it is a few pairs in a hundred: computed once for a sample and layer and shared by all patterns.

    Args:
        rows: ``(P,)`` int64, the query of each pair, counted over examples and heads.
        keys: ``(P,)`` int64.
        mass: ``(P,)`` floating point, the probability of each pair.
        shape: ``(B, H, N, N)``.
    """

    rows: Tensor
    keys: Tensor
    mass: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, qk: QK, alpha: float) -> Gold:
        """That of queries and keys under α-entmax, without a matrix of N × N."""
        found = support(qk, alpha)
        return cls(found.rows, found.keys, found.probabilities, qk.graph_shape)

    @classmethod
    def of_matrix(cls, probabilities: Tensor) -> Gold:
        """That of probabilities ``(B, H, N, N)``, zero outside allowed pairs."""
        flat = probabilities.flatten(0, 2)
        rows, keys = flat.nonzero(as_tuple=True)
        return cls(rows, keys, flat[rows, keys], probabilities.shape)

    @cached_property
    def indices(self) -> Tensor:
        """Where the pairs lie in the flattened graph, ``(P,)`` int64: predictions are compared there."""
        return self.rows * self.shape[-1] + self.keys

    @cached_property
    def heads(self) -> Tensor:
        """The head of each pair, counted over examples: ``(P,)`` int64."""
        return self.rows // self.shape[-2]

    def sums(self, weights: Tensor | None = None) -> Tensor:
        """Pairs of each example and head, or the sum of their weights.

        Args:
            weights: ``(P,)``, a number for each pair; None counts them.

        Returns:
            ``(B, H)``: int64 counts, or sums in the dtype of the weights.
        """
        return torch.bincount(self.heads, weights, self.shape[:2].numel()).view(self.shape[:2])


def count(predicted: Tensor, gold: Gold, qk: QK, near: Tensor | None = None) -> Counts:
    """Compare a predicted graph with the gold graph.

    The whole graph is read once, to count what it predicts; all else is looked up at the gold pairs, a few in a hundred.

    Args:
        predicted: The graph, ``(B, H, N, N)`` bool, False on padding.
        gold: The dense attention of the same example and layer.
        qk: The queries and keys, which say what is allowed.
        near: Pairs that the local window and the global tokens name, bool, broadcastable to the graph; None means that no pair
            is near.

    Returns:
        The counts of each example and head.
    """
    real = qk.queries_valid[:, None, :].expand(predicted.shape[:3])
    hit = predicted.flatten()[gold.indices]
    missing = torch.zeros(real.numel(), dtype=torch.bool, device=hit.device).index_fill_(0, gold.rows[~hit], True)
    hits = gold.sums(hit.double())
    all_gold = gold.sums()
    far_gold, far_hits = all_gold, hits
    if near is not None:
        far = ~near.expand(predicted.shape).flatten()[gold.indices]
        far_gold, far_hits = gold.sums(far.double()), gold.sums((hit & far).double())
    return Counts(
        allowed=pairs(qk.allowed).expand(predicted.shape[:2]),
        predicted=pairs(predicted),
        gold=all_gold,
        hits=hits.long(),
        queries=real.sum(-1),
        exact=(real & ~missing.view(real.shape)).sum(-1),
        far_gold=far_gold.long(),
        far_hits=far_hits.long(),
        mass=gold.sums(gold.mass.double() * hit),
    )


def count_rows(
    predicted: Tensor, probabilities: Tensor, allowed: Tensor, real: Tensor, near: Tensor | None = None
) -> Counts:
    """`count` of the rows of some queries, from matrices: where these are few, and where most pairs are gold, as in softmax.

    Args:
        predicted: Their rows of the graph, ``(B, H, S, N)`` bool.
        probabilities: Their dense attention, ``(B, H, S, N)``, zero outside allowed pairs.
        allowed: ``(B, 1, S, N)`` bool.
        real: ``(B, S)`` bool, which of them are no padding.
        near: As in `count`, their rows.

    Returns:
        The counts of each example and head, of these queries alone.
    """
    gold, shape = probabilities > 0, predicted.shape
    hit = gold & predicted
    far = None if near is None else ~near.expand(shape)
    missing = (gold & ~predicted).any(-1)
    return Counts(
        allowed=pairs(allowed).expand(shape[:2]),
        predicted=pairs(predicted),
        gold=pairs(gold),
        hits=pairs(hit),
        queries=real[:, None].expand(shape[:3]).sum(-1),
        exact=(real[:, None] & ~missing).sum(-1),
        far_gold=pairs(gold if far is None else gold & far),
        far_hits=pairs(hit if far is None else hit & far),
        mass=(probabilities * predicted).sum(-1).double().sum(-1),
    )


def balance(buckets: Buckets, valid: Tensor) -> dict[str, Tensor]:
    """How evenly the keys fill the buckets.

    Args:
        buckets: Memberships ``(B, H, N, P)``.
        valid: ``(B, N)`` bool; keys on padding are not counted.

    Returns:
        For each example and head, ``(B, H)`` float64: ``bucket_entropy``, entropy of a key's bucket divided by its largest
        value, 1 when all are equally full; ``bucket_largest``, share of the memberships in the fullest one; ``bucket_empty``,
        share of buckets without a key.
    """
    batch, heads = buckets.k_ids.shape[:2]
    ones = (valid[:, None, :, None] & (buckets.k_ids >= 0)).double()
    sizes = torch.zeros(batch, heads, buckets.count, dtype=torch.float64, device=ones.device)
    sizes.scatter_add_(-1, buckets.k_ids.clamp_min(0).flatten(2), ones.flatten(2))
    fractions = sizes / sizes.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(fractions, fractions).sum(-1)
    return {
        "bucket_entropy": entropy / math.log(buckets.count) if buckets.count > 1 else torch.ones_like(entropy),
        "bucket_largest": fractions.amax(-1),
        "bucket_empty": (sizes == 0).double().mean(-1),
    }


def pairs(graph: Tensor) -> Tensor:
    """Edges of each example and head: ``(B, H, N, N)`` bool → ``(B, H)`` int64."""
    if graph.device.type != "cpu":
        return graph.sum((-2, -1))
    counted = [
        [np.count_nonzero(head) for head in example] for example in graph.numpy()
    ]  # ten times as fast as torch's sum
    return torch.tensor(counted, dtype=torch.int64).view(graph.shape[:2])
