"""How far apart two tokens lie, by the number of buckets they share: what quantization trades on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.graphs import QK
from sparsefinder.numerics.distances import PAIRWISE
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.storage import tables
from sparsefinder.storage.samples import Samples


@torch.no_grad()
def shared_buckets(
    samples: Samples,
    configurations: Sequence[Configuration],
    learned: Learned,
    alpha: float = 1.5,
    causal: bool = False,
    distance: str = "l2",
    most: int = 4,
) -> pd.DataFrame:
    """One row per quantization × layer × number of shared rounds: pairs counted over the first ``most`` samples, mean distance
    in the projected space (one of `PAIRWISE`), and the share of these pairs that are gold edges.
    """
    rows: list[dict[str, Any]] = []
    for row, configuration in _quantizations(configurations):
        projections = learned.get("projections", configuration.name)
        for layer in range(samples.shape[0]):
            rounds = projections.layers[layer].q.out_size or samples.shape[2]
            totals = torch.zeros(3, rounds + 1, dtype=torch.float64)
            for index in range(min(most, len(samples))):
                qk = samples.layer(index, layer, causal)
                projected = projections(qk, layer)
                totals += _by_shared(qk, projected, configuration.pattern, layer, alpha, rounds + 1, distance)
            for shared, (pairs, apart, edges) in enumerate(totals.T.tolist()):
                if pairs:
                    rows.append(
                        {"configuration": row, "bucket_size": configuration.pattern.bucket_size}
                        | {"same_size": configuration.pattern.same_size, "layer": layer, "shared": shared}
                        | {"pairs": int(pairs), "distance": apart / pairs, "gold_share": edges / pairs}
                    )
    columns = ["configuration", "bucket_size", "same_size", "layer", "shared", "pairs", "distance", "gold_share"]
    return tables.tidy(rows) if rows else pd.DataFrame(columns=columns)


@torch.no_grad()
def distance_histogram(
    samples: Samples,
    configurations: Sequence[Configuration],
    learned: Learned,
    bins: int,
    causal: bool = False,
    distance: str = "l2",
    most: int = 4,
) -> pd.DataFrame:
    """One row per quantization × number of shared rounds × bin of the distance, from ``low`` to ``high``: its pairs.

    Over all layers and heads of the first ``most`` samples; bins are equally wide, from zero to the largest distance.
    """
    rows: list[dict[str, Any]] = []
    for index_of_configuration, configuration in _quantizations(configurations):
        projections = learned.get("projections", configuration.name)
        measured = [
            _shared_and_apart(qk, projections(qk, layer), configuration.pattern, layer, distance)
            for index in range(min(most, len(samples)))
            for layer, qk in enumerate(samples.layers(index, causal))
        ]
        widest = max(float(apart.max()) for _, apart in measured) or 1.0
        numbers = 1 + max(int(shared.max()) for shared, _ in measured)
        counts = torch.zeros(numbers * bins, dtype=torch.int64)
        for shared, apart in measured:
            bin_of = (apart / widest * bins).long().clamp(0, bins - 1)
            counts += torch.bincount(shared * bins + bin_of, minlength=numbers * bins)
        edges = torch.linspace(0, widest, bins + 1, dtype=torch.float64).tolist()
        for number, of_bins in enumerate(counts.view(numbers, bins).tolist()):
            rows += [
                {"configuration": index_of_configuration, "bucket_size": configuration.pattern.bucket_size}
                | {"same_size": configuration.pattern.same_size, "shared": number}
                | {"low": edges[at], "high": edges[at + 1], "pairs": pairs}
                for at, pairs in enumerate(of_bins)
            ]
    columns = ["configuration", "bucket_size", "same_size", "shared", "low", "high", "pairs"]
    return tables.tidy(rows) if rows else pd.DataFrame(columns=columns)


def _quantizations(configurations: Sequence[Configuration]) -> Iterator[tuple[int, Configuration]]:
    """Those of the configurations that put single tokens into bins, plain, at one setting for all heads; with their indices."""
    for index, configuration in enumerate(configurations):
        plain = (
            not configuration.window
            and configuration.dials is None
            and configuration.chunk == 1
            and not configuration.shares
        )
        if isinstance(configuration.pattern, Quantize) and plain:
            yield index, configuration


def _shared_and_apart(qk: QK, projected: QK, pattern: Quantize, layer: int, distance: str) -> tuple[Tensor, Tensor]:
    """Of all allowed pairs, in one order: how many buckets they share, and how far they are apart."""
    buckets = pattern.layout(projected, layer).buckets
    assert buckets is not None
    shared = (buckets.q_ids[..., :, None, :] == buckets.k_ids[..., None, :, :]).sum(-1)
    allowed = qk.allowed.expand(shared.shape)
    return shared[allowed], PAIRWISE[distance](projected.q, projected.k, 2.0)[allowed]


def _by_shared(qk: QK, projected: QK, pattern: Quantize, layer: int, alpha: float, width: int, distance: str) -> Tensor:
    shared, apart = _shared_and_apart(qk, projected, pattern, layer, distance)
    gold = Normalizer(alpha)(qk.scores()) > 0
    values = (torch.ones(shared.shape), apart, gold[qk.allowed.expand(gold.shape)])
    return torch.stack([torch.bincount(shared, weights=value.double(), minlength=width) for value in values])
