"""What a pattern and the attention on its graph cost together, so that patterns can be compared at equal cost."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Pattern, has_tail
from sparsefinder.metrics import Counts
from sparsefinder.patterns.combine import layout_of
from sparsefinder.patterns.support.cost import cost_of


def costs(pattern: Pattern, counts: Counts, size: int, crosses: bool = False) -> dict[str, Tensor]:
    """What a pattern costs on these samples, in multiplications for each query.

    Args:
        pattern: As it is run.
        counts: Of the samples, ``(samples, H)``.
        size: ``D``; attention multiplies ``2 · D`` numbers for each pair.
        crosses: Whether keys are of another text than queries, and as many as there are pairs for each query.

    Returns:
        Means over the samples, ``(H,)`` float64: ``prediction_cost``, that of a tail included (``3 · D`` for each of its
        entries: mean and variance of scores, value), ``attention_cost``, and ``prediction_share``, the first one as a share of
        what attention over all allowed pairs takes. So density + prediction share is the whole cost as a share.
    """
    heads = counts.queries.shape[1]
    keys = counts.allowed // counts.queries if crosses else counts.queries
    both = torch.stack([keys, counts.queries], -1)
    different = both.flatten(0, 1).unique(dim=0).tolist()
    known = {
        (n, queries): cost_of(pattern, n, size, queries) + 3 * size * _entries(pattern, n, heads, size)
        for n, queries in different
    }
    predicting = torch.tensor([[known[tuple(one)] for one in sample] for sample in both.tolist()], dtype=torch.float64)
    attending, dense = (2 * size * pairs / counts.queries for pairs in (counts.predicted, counts.allowed))
    found = {"prediction_cost": predicting, "attention_cost": attending, "prediction_share": predicting / dense}
    return {name: values.double().nanmean(0) for name, values in found.items()}


def _entries(pattern: Pattern, tokens: int, heads: int, size: int) -> int:
    """Entries of a query in a text of so many tokens: the buckets of any text of that length."""
    if not has_tail(pattern):
        return 0
    vectors = torch.zeros(1, heads, tokens, size)
    return layout_of(pattern, QK(vectors, vectors, torch.ones(1, tokens, dtype=torch.bool)), 0).entries
