"""How far apart two tokens lie, by the number of buckets they share: what quantization trades on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sparsefinder import tables
from sparsefinder.distances import squared
from sparsefinder.graphs import QK
from sparsefinder.patterns.buckets import Quantize
from sparsefinder.patterns.configuration import Configuration, Learned
from sparsefinder.samples import Samples
from sparsefinder.transforms import Normalizer


@torch.no_grad()
def shared_buckets(
    samples: Samples,
    configurations: Sequence[Configuration],
    learned: Learned,
    alpha: float = 1.5,
    causal: bool = False,
    most: int = 4,
) -> pd.DataFrame:
    """One row per quantization × layer × number of shared rounds: pairs counted over the first ``most`` samples, mean squared
    distance in the projected space, and the share of these pairs that are gold edges.
    """
    rows: list[dict[str, Any]] = []
    for place, configuration in enumerate(configurations):
        if not isinstance(configuration.pattern, Quantize) or configuration.window or configuration.dials is not None:
            continue
        if configuration.chunk > 1:  # pairs here are pairs of tokens
            continue
        projections = learned.get("projections", configuration.name)
        for layer in range(samples.shape[0]):
            rounds = projections.layers[layer].q.out_size or samples.shape[2]
            totals = torch.zeros(3, rounds + 1, dtype=torch.float64)
            for index in range(min(most, len(samples))):
                qk = samples.layer(index, layer, causal)
                projected = projections(qk, layer)
                totals += _by_shared(qk, projected, configuration.pattern, layer, alpha, rounds + 1)
            for shared, (pairs, distance, edges) in enumerate(totals.T.tolist()):
                if pairs:
                    rows.append(
                        {"configuration": place, "bucket_size": configuration.pattern.bucket_size}
                        | {"same_size": configuration.pattern.same_size, "layer": layer, "shared": shared}
                        | {"pairs": int(pairs), "distance": distance / pairs, "gold_share": edges / pairs}
                    )
    columns = ["configuration", "bucket_size", "same_size", "layer", "shared", "pairs", "distance", "gold_share"]
    return tables.tidy(rows) if rows else pd.DataFrame(columns=columns)


def _by_shared(qk: QK, projected: QK, pattern: Quantize, layer: int, alpha: float, width: int) -> Tensor:
    buckets = pattern.layout(projected, layer).buckets
    assert buckets is not None
    shared = (buckets.q_ids[..., :, None, :] == buckets.k_ids[..., None, :, :]).sum(-1)
    gold = Normalizer(alpha)(qk.scores()) > 0
    allowed = qk.allowed.expand(shared.shape)
    places = shared[allowed]
    values = (torch.ones(places.shape), squared(projected.q, projected.k)[allowed], gold[allowed])
    return torch.stack([torch.bincount(places, weights=value.double(), minlength=width) for value in values])
