"""How well a predicted graph matches the gold graph: one definition of each number, in one place.

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

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets

RATIOS = ("sparsity", "recall", "precision", "exact", "f1", "kept_mass", "recall_far", "gold_sparsity")
BALANCE = ("bucket_entropy", "bucket_largest", "bucket_empty")


@dataclass(frozen=True)
class Counts:
    """Raw counts of examples and heads, each ``(B, H)``: int64, and float64 for ``mass``.

    ``far_*`` count pairs that are not ``near`` (see `count`); ``mass`` is the dense probability on predicted keys, summed
    over the queries.
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
        recall, precision = self.hits / self.gold, self.hits / self.predicted
        return {
            "sparsity": 1 - self.predicted / self.allowed,
            "recall": recall,
            "precision": precision,
            "exact": self.exact / self.queries,
            "f1": 2 * self.hits / (self.predicted + self.gold),
            "kept_mass": self.mass / self.queries,
            "recall_far": self.far_hits / self.far_gold,
            "gold_sparsity": 1 - self.gold / self.allowed,
        }

    def macro(self) -> dict[str, Tensor]:
        """Each metric for each head, ``(H,)`` float64: the mean over the examples where it is defined."""
        return {name: ratio.double().nanmean(0) for name, ratio in self.ratios().items()}


@dataclass(frozen=True)
class Gold:
    """The dense attention of a head and its support: what every prediction is measured against.

    ``probabilities``: ``(B, H, N, N)`` float32, zero outside allowed pairs; ``graph``: bool, probability > 0. Computed once
    for a sample and layer and shared by all patterns.
    """

    probabilities: Tensor
    graph: Tensor


def count(predicted: Tensor, gold: Gold, qk: QK, near: Tensor | None = None) -> Counts:
    """Compare a graph ``(B, H, N, N)`` bool with the gold graph.

    ``near``: pairs that the window and the global tokens name, broadcastable to the graph; None means that no pair is near.
    Nothing but bool graphs and one float product is made, all of the size of the graph.
    """
    missed = gold.graph & ~predicted
    real = qk.valid[:, None, :]
    rows = predicted.shape[:2]
    if near is None:
        far_gold, far_missed = gold.graph, missed
    else:
        far_gold, far_missed = gold.graph & ~near, missed & ~near
    return Counts(
        allowed=_pairs(qk.allowed).expand(rows),
        predicted=_pairs(predicted),
        gold=_pairs(gold.graph),
        hits=_pairs(gold.graph) - _pairs(missed),
        queries=real.sum(-1).expand(rows),
        exact=(real & ~missed.any(-1)).sum(-1),
        far_gold=_pairs(far_gold),
        far_hits=_pairs(far_gold) - _pairs(far_missed),
        mass=torch.where(predicted, gold.probabilities, 0.0).sum((-2, -1), dtype=torch.float64),
    )


def balance(buckets: Buckets, valid: Tensor) -> dict[str, Tensor]:
    """How evenly the keys fill the buckets, for each example and head, ``(B, H)`` float64.

    ``bucket_entropy``: entropy of a key's bucket divided by its largest value, 1 when all are equally full;
    ``bucket_largest``: share of the memberships in the fullest one; ``bucket_empty``: share of buckets without a key.
    """
    batch, heads = buckets.k_ids.shape[:2]
    ones = (valid[:, None, :, None] & (buckets.k_ids >= 0)).double()
    sizes = torch.zeros(batch, heads, buckets.count, dtype=torch.float64, device=ones.device)
    sizes.scatter_add_(-1, buckets.k_ids.clamp_min(0).flatten(2), ones.flatten(2))
    shares = sizes / sizes.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return {
        "bucket_entropy": entropy / max(torch.tensor(float(buckets.count)).log().item(), 1e-12),
        "bucket_largest": shares.amax(-1),
        "bucket_empty": (sizes == 0).double().mean(-1),
    }


def _pairs(graph: Tensor) -> Tensor:
    return graph.sum((-2, -1))
