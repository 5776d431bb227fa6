"""Why recall is lost at the density of the gold graph: one cause after the other is let in.

    python benchmarks/gold_density.py --model FOLDER --train valid.txt --test test.txt --heads 4      # some minutes

Every line predicts as many pairs as the gold graph has, by one level for all heads: true scores and thresholds are exact, then
scores are those of R numbers, then thresholds are estimated from them, then clusters come in. Queries and keys as in
``benchmarks/budgets.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from budgets import encoder_arguments, of_encoder
from measuring import machine
from torch import Tensor

from sparsefinder.bilinear import BilinearSettings, row_thresholds, train_bilinear
from sparsefinder.graphs import QK
from sparsefinder.metrics import Gold, count
from sparsefinder.patterns.bilinear import Bilinear
from sparsefinder.patterns.routed_bilinear import RoutedBilinear
from sparsefinder.patterns.routed_reranked import RoutedReranked
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.fit_centroids import KeyClusterSettings, fit_tree
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.samples import Samples, load_samples

ALPHA = 1.5
STEPS = 12  # halvings of the interval in which the level lies
LEVELS = (-1.0, 1.0)

Method = Callable[[QK, int, float], Tensor]


def with_true_thresholds(space: Projections) -> Method:
    """Scores of few numbers, cut by what the true scores say."""

    def graph(qk: QK, layer: int, level: float) -> Tensor:
        true = row_thresholds(qk.scores(), ALPHA)
        return (ALPHA - 1) * space(qk, layer).scores() >= true - level

    return graph


def of_pattern(pattern: Any, space: Projections | None) -> Method:
    """A pattern at any level, in a space."""

    def graph(qk: QK, layer: int, level: float) -> Tensor:
        found: Tensor = replace(pattern, level=level)(qk if space is None else space(qk, layer), layer)
        return found

    return graph


def methods(training: Samples, rounds: int, clusters: int) -> dict[str, Method]:
    """From the gold graph to what is predicted."""
    closed = fit_lowrank(training, rounds)
    settings = BilinearSettings(rounds=rounds, eval_every=0, eval_samples=1)
    trained = train_bilinear(training, training, settings).projections
    centroids = fit_tree(training, trained, KeyClusterSettings(n_clusters=clusters, coarsest=clusters))
    routed, reranked = RoutedBilinear(bilinear_centroids=centroids), RoutedReranked(bilinear_centroids=centroids)
    return {
        "true scores": of_pattern(Bilinear(), None),
        f"{rounds} numbers in closed form, true thresholds": with_true_thresholds(closed),
        "the same, estimated thresholds (`lowrank`)": of_pattern(Bilinear(), closed),
        f"{rounds} trained numbers, true thresholds": with_true_thresholds(trained),
        "the same, estimated thresholds (`bilinear`)": of_pattern(Bilinear(), trained),
        f"the same, keys of the best of {clusters} clusters (`routed_reranked`)": of_pattern(reranked, trained),
        f"{clusters} whole clusters (`routed_bilinear`)": of_pattern(routed, trained),
    }


def measured(method: Method, level: float, samples: Samples, golds: list[Gold]) -> tuple[float, float]:
    """Density and recall, means over samples, layers and heads."""
    found = []
    for number, gold in enumerate(golds):
        layer = number % samples.shape[0]
        qk = samples.layer(number // samples.shape[0], layer)
        ratios = count(method(qk, layer, level), gold, qk).macro()
        found.append(torch.stack([1 - ratios["sparsity"].mean(), ratios["recall"].mean()]))
    density, recall = torch.stack(found).mean(0).tolist()
    return density, recall


def at_density(method: Method, wanted: float, samples: Samples, golds: list[Gold]) -> tuple[float, float]:
    """The recall at a density, found by halving."""
    low, high = LEVELS
    for _ in range(STEPS):
        middle = (low + high) / 2
        density, recall = measured(method, middle, samples, golds)
        low, high = (middle, high) if density < wanted else (low, middle)
    return density, recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    encoder_arguments(parser)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clusters", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        training, samples = (load_samples(path) for path in of_encoder(given, Path(folder)).values())
        golds = [Gold.of(qk, ALPHA) for each in samples for qk in each]
        density = float(torch.stack([(gold.sums() / gold.shape[-1] ** 2).mean() for gold in golds]).mean())
        print(f"{machine()}\n\n### Gold density: {given.model.name}, {given.tokens} tokens, {given.rounds} numbers\n")
        print(f"{len(samples)} texts, gold density {density:.4f}, {given.clusters} clusters.\n")
        print("| predicted by | density | recall |\n|---|---|---|")
        for name, method in methods(training, given.rounds, given.clusters).items():
            print("| {} | {:.4f} | {:.3f} |".format(name, *at_density(method, density, samples, golds)), flush=True)


if __name__ == "__main__":
    main()
