"""Why recall is lost at the density of the gold graph: one cause after the other is let in.

    python benchmarks/gold_density.py --run runs/tiny --samples 6 --clusters 16
    python benchmarks/gold_density.py --model FOLDER --train valid.txt --test test.txt --heads 4      # some minutes

Every line predicts as many pairs as the gold graph has, by one level for all heads: true scores and thresholds are exact, then
scores are those of R numbers, then thresholds are estimated from them, then clusters come in; the true number of keys of each
query and a level for each head of its own say what is lost by counts. The cost is that of the prediction
and of attention on what it predicts, as a share of dense attention's multiplications. Queries and keys as in
``benchmarks/budgets.py``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from budgets import encoder_arguments, of_encoder
from measuring import machine
from torch import Tensor

from sparsefinder.bilinear import BilinearSettings, row_thresholds, train_bilinear
from sparsefinder.experiment.costs import costs
from sparsefinder.graphs import QK, Pattern
from sparsefinder.metrics import Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.bilinear import Bilinear
from sparsefinder.patterns.combine import Projected
from sparsefinder.patterns.per_head import PerHead
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.routed_bilinear import RoutedBilinear
from sparsefinder.patterns.routed_reranked import RoutedReranked
from sparsefinder.patterns.support.ranking import best
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.fit_centroids import KeyClusterSettings, fit_tree
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.samples import Samples, load_samples
from sparsefinder.storage.store import Store

ALPHA = 1.5
STEPS = 12  # halvings of the interval in which the level lies
LEVELS = (-1.0, 1.0)


@dataclass(frozen=True)
class TrueThresholds:
    """Scores of few numbers, cut by what the true scores say."""

    level: float = 0.0
    space: Projections | None = None

    def __call__(self, qk: QK, layer: int) -> Tensor:
        true = row_thresholds(qk.scores(), ALPHA)
        return (ALPHA - 1) * _scores(self, qk, layer) >= true - self.level


@dataclass(frozen=True)
class TrueNumbers:
    """Of each query as many keys as it has in truth, those of largest estimates."""

    level: float = 0.0  # has no say
    space: Projections | None = None

    def __call__(self, qk: QK, layer: int) -> Tensor:
        numbers = (Normalizer(ALPHA)(qk.scores()) > 0).sum(-1, keepdim=True)
        return best(_scores(self, qk, layer), numbers)


def _scores(pattern: TrueThresholds | TrueNumbers, qk: QK, layer: int) -> Tensor:
    return (qk if pattern.space is None else pattern.space(qk, layer)).scores()


@dataclass(frozen=True)
class Method:
    """A line of the table: a pattern with a level, in a space."""

    name: str
    pattern: Any
    space: Projections | None = None
    of_heads: bool = False  # whether each head has a level of its own, at which it predicts as many pairs as it has

    def at(self, levels: Tensor) -> Pattern:
        """The pattern at a level for each layer and head, ``(L, H)``."""
        pattern = replace(self.pattern, level=levels[0, 0].item())
        if self.of_heads:
            pattern = PerHead(pattern, tuple(map(tuple, levels.tolist())))
        return pattern if self.space is None else Projected(pattern, self.space)


def methods(training: Samples, rounds: int, clusters: int) -> list[Method]:
    """From the gold graph to what is predicted."""
    closed = fit_lowrank(training, rounds)
    settings = BilinearSettings(rounds=rounds, eval_every=0, eval_samples=1)
    trained = train_bilinear(training, training, settings).projections
    centroids = fit_tree(training, trained, KeyClusterSettings(n_clusters=clusters, coarsest=clusters))
    whole = fit_lowrank(training, training.shape[2])
    of_whole = fit_tree(training, whole, KeyClusterSettings(n_clusters=64, coarsest=64))
    reranked = RoutedReranked(bilinear_centroids=centroids)
    return [
        Method("true scores", Bilinear()),
        Method(f"{rounds} numbers in closed form, true thresholds", TrueThresholds(space=closed)),
        Method("the same, estimated thresholds (`lowrank`)", Bilinear(), closed),
        Method(f"{rounds} trained numbers, true thresholds", TrueThresholds(space=trained)),
        Method("the same, the true number of keys of each query", TrueNumbers(space=trained)),
        Method("the same, estimated thresholds, a level for each head", Bilinear(), trained, of_heads=True),
        Method("the same, estimated thresholds (`bilinear`)", Bilinear(), trained),
        Method(f"the same, keys of the best of {clusters} clusters (`routed_reranked`)", reranked, trained),
        Method(f"{clusters} whole clusters (`routed_bilinear`)", RoutedBilinear(bilinear_centroids=centroids), trained),
        Method(f"64 whole clusters by {training.shape[2]} numbers (`routed`)", Routed(key_centroids=of_whole), whole),
    ]


def measured(pattern: Pattern, samples: Samples, golds: list[Gold]) -> tuple[Tensor, float, float]:
    """Density ``(L, H)``, and the means of recall and of the total cost as a share of dense attention's."""
    layers, heads, size = samples.shape
    found = []
    for number, gold in enumerate(golds):
        layer = number % layers
        qk = samples.layer(number // layers, layer)
        counts = count(pattern(qk, layer), gold, qk)
        ratios, predicting = counts.macro(), costs(pattern, counts, size)["prediction_share"]
        density = 1 - ratios["sparsity"]
        found.append(torch.stack([density, ratios["recall"], density + predicting]))
    density, recall, cost = torch.stack(found).view(-1, layers, 3, heads).mean(0).unbind(1)
    return density, recall.mean().item(), cost.mean().item()


def at_density(method: Method, wanted: Tensor, samples: Samples, golds: list[Gold]) -> tuple[float, float, float]:
    """Density, recall and cost at the densities ``wanted (L, H)``, or at their mean, found by halving."""
    low, high = (torch.full(wanted.shape, level, dtype=torch.float64) for level in LEVELS)
    for _ in range(STEPS):
        middle = (low + high) / 2
        density, recall, cost = measured(method.at(middle), samples, golds)
        fewer = density < wanted if method.of_heads else (density.mean() < wanted.mean()).expand_as(wanted)
        low, high = torch.where(fewer, middle, low), torch.where(fewer, high, middle)
    return density.mean().item(), recall, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="where there is no --model")
    encoder_arguments(parser)
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 16], help="a table for each")
    parser.add_argument("--clusters", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Store(given.run)
        files = of_encoder(given, Path(folder)) if given.model else {x: run.path(x) for x in ("qk", "qk_validation")}
        training, held_out = load_samples(files["qk"]), load_samples(files["qk_validation"])
        samples = held_out.part(0, given.samples or len(held_out))
        golds = [Gold.of(qk, ALPHA) for each in samples for qk in each]
        shares = torch.stack([(gold.sums() / gold.shape[-1] ** 2)[0] for gold in golds])
        wanted = shares.view(len(samples), *samples.shape[:2]).double().mean(0)
        of = f"{given.model.name}, {given.tokens} tokens" if given.model else given.run
        print(machine())
        for rounds in given.rounds:
            print(f"\n### Gold density: {of}, {rounds} numbers\n")
            print(f"{len(samples)} texts, gold density {wanted.mean():.4f}, {given.clusters} clusters.\n")
            print("| predicted by | density | recall | cost |\n|---|---|---|---|")
            for method in methods(training, rounds, given.clusters):
                density, recall, cost = at_density(method, wanted, samples, golds)
                of_whole = "–" if math.isnan(cost) else f"{cost:.3f}"
                print(f"| {method.name} | {density:.4f} | {recall:.3f} | {of_whole} |", flush=True)


if __name__ == "__main__":
    main()
