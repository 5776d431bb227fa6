"""What a pattern and the attention on its graph cost together, so that patterns can be compared at equal cost."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefinder.graphs import Pattern
from sparsefinder.metrics import Counts
from sparsefinder.patterns.support.cost import cost_of


def costs(pattern: Pattern, counts: Counts, size: int) -> dict[str, Tensor]:
    """What a pattern costs on these samples, in multiplications for each query.

    Args:
        pattern: As it is run.
        counts: Of the samples, ``(samples, H)``.
        size: ``D``; attention multiplies ``2 · D`` numbers for each pair.

    Returns:
        Means over the samples, ``(H,)`` float64: ``prediction_cost``, ``attention_cost``, and ``prediction_share``, the first one
        as a share of what attention over all allowed pairs takes. So density + prediction share is the whole cost as a share.
    """
    prediction = [[cost_of(pattern, int(tokens), size) for tokens in sample] for sample in counts.queries]
    predicting = torch.tensor(prediction, dtype=torch.float64)
    attending, dense = (2 * size * pairs / counts.queries for pairs in (counts.predicted, counts.allowed))
    found = {"prediction_cost": predicting, "attention_cost": attending, "prediction_share": predicting / dense}
    return {name: values.double().nanmean(0) for name, values in found.items()}
