"""Recall at equal total cost, every method at its best budget: projections of 4 to 32 numbers, 16 to 128 clusters.

    python benchmarks/budgets.py --run runs/tiny                    # queries and keys that a run has recorded; some minutes
    python benchmarks/budgets.py --run runs/tiny --samples 20       # fewer held-out samples
    python benchmarks/budgets.py --model FOLDER --train valid.txt --test test.txt --heads 4   # those of a real encoder

A table at equal density forgets what the prediction multiplies, and one at the published budget (4 numbers, 16 clusters)
makes any method look good that was given more. Here each learned method is trained at every budget, scored over its sparsity
parameter, and stands in the table with the best of them all; the others are scored as they are. Costs: `cost` of each pattern.
Of an encoder 16 texts are learned from and ``--samples`` (4) measured, ``--heads`` of every second layer; ``--skip`` leaves out
the first texts, those that something was chosen on. Five samples and more have intervals. ``--within 0.15`` saves half of the
time where only small costs matter: what predicts for more of dense attention than that is not scored.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import recorded
import torch
from measuring import machine
from omegaconf import OmegaConf

from sparsefinder import bilinear, kmeans_centroids, lowrank, quantization, score
from sparsefinder.analysis import frontiers
from sparsefinder.analysis.bootstrap import Replicas
from sparsefinder.analysis.method_families import ALL_OTHERS
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.experiment.instantiate import construct
from sparsefinder.patterns.bilinear import Bilinear
from sparsefinder.patterns.block_pool import BlockPool
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.hashattention import HashAttention
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.lowrank import LowRank
from sparsefinder.patterns.multipole import Multipole
from sparsefinder.patterns.pages import Pages
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.quest import Quest
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.routed_bilinear import RoutedBilinear
from sparsefinder.patterns.routed_reranked import RoutedReranked
from sparsefinder.patterns.support.cost import cost_of
from sparsefinder.patterns.xattention import XAttention
from sparsefinder.report import text_table
from sparsefinder.reporting import text_tables
from sparsefinder.storage.manifests import plain
from sparsefinder.storage.samples import Samples, load_samples
from sparsefinder.storage.store import Store

PATTERNS = Path(__file__).resolve().parent.parent / "conf" / "pattern"
TEXTS = 16  # of an encoder that are learned from
MARGINS = (-0.25, 0.0, 0.2, 0.5, 1.0)  # of patterns with a level
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3)
COSTS = (0.05, 0.1, 0.2, 0.3, 0.5)
UNLEARNED = (
    "oracle_topk",
    "window",
    "pages",
    "quest",
    "block_pool",
    "xattention",
    "twilight",
    "multipole",
    "clustered",
)
UNLEARNED += ("routing", "reformer", "magicpig")


def of_sizes() -> Iterator[Configuration]:
    """Larger pages, blocks and clusters of sentences than those of the files, which are cheaper to compare with."""
    for size in (8, 16, 32):
        for level in (-0.3, 0.0, 0.3, 0.75, 1.5):
            yield Configuration("pages", Pages(level, size))
        for share in (0.05, 0.1, 0.2, 0.4):
            yield Configuration("quest", Quest(share, size))
    for share in (0.05, 0.1, 0.2, 0.4):
        yield Configuration("multipole", Multipole(share, n_clusters=8, iterations=1, tail=False))
        yield Configuration("block_pool", BlockPool(share, size=8))
        yield Configuration("xattention", XAttention(2 * share, stride=8))


def of_projections(rounds: int) -> Iterator[Configuration]:
    """What is swept in a learned space; distances grow with the number of coordinates, and so do their thresholds."""
    for threshold in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 8.0):
        yield Configuration("distance", Distance("l2", threshold * rounds / 4))
    for size in (1, 2, 4, 8, 16) if rounds <= 8 else ():
        yield Configuration("quantize", Quantize(size))
    for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3):
        yield Configuration("hashattention", HashAttention(share))


def of_centroids(clusters: int) -> Iterator[Configuration]:
    """K-means with more clusters takes more of them; a window is free and helps it at small budgets."""
    for top in (1, 2, 3, 4, 6, 9, 14, 20):
        if top <= clusters // 2:
            yield Configuration("kmeans", KMeans(top))
            yield Configuration("kmeans", KMeans(top), window=5)


def of_key_centroids() -> Iterator[Configuration]:
    """Ours in closed form."""
    for level in (-0.5, -0.25, 0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5):
        yield Configuration("routed", Routed(level=level))


def of_trained_centroids() -> Iterator[Configuration]:
    """Ours in a trained space: whole clusters of a level of the tree, and the best keys of some."""
    for keys in (8.0, 16.0, 32.0):
        for level in (-0.4, -0.1, 0.2, 0.6):
            yield Configuration("routed_bilinear", RoutedBilinear(level=level, keys_per_cluster=keys))
        for share in (0.05, 0.1, 0.2, 0.35):
            for level in (-0.3, -0.1, 0.05, 0.25, 0.8):
                yield Configuration("routed_reranked", RoutedReranked(level, share, keys_per_cluster=keys))


def of_file(name: str) -> Iterator[Configuration]:
    """A pattern of conf/pattern at each value of its sweep."""
    node: Any = OmegaConf.create(
        {"alpha": 1.5, "seed": 0, "pattern": OmegaConf.load(PATTERNS / f"{name}.yaml")}
    ).pattern
    given = {key: value for key, value in node.items() if key not in ("_target_", "sweep")}
    module, _, kind = node["_target_"].rpartition(".")
    found = getattr(__import__(module, fromlist=[kind]), kind)
    for value in node.sweep:
        yield Configuration(name, construct(found, given | {found.sparsity_parameter: value}, "pattern"))


class Budgets:
    """Runs below one folder: a budget is trained, scored and put beside the others."""

    def __init__(
        self, folder: Path, qk: dict[str, Path], samples: int | None, only: Sequence[str] | None, within: float | None
    ):
        self.folder = folder
        self.only = only
        self.qk = qk
        self.within = within
        held_out = load_samples(qk["qk_validation"])
        self.held_out = held_out.part(0, samples or len(held_out))
        self.tables: list[tuple[pd.DataFrame, pd.DataFrame]] = []

    def store(self, name: str, **given: Path) -> Store:
        """A run of its own with the recorded queries and keys, and what other runs have learned."""
        (self.folder / name).mkdir(parents=True)
        return Store(self.folder / name, given={**self.qk, **given})

    def score(self, store: Store, configurations: list[Configuration]) -> None:
        """Score those that are wanted and keep the tables, configurations numbered on."""
        configurations = [each for each in configurations if self.only is None or each.name in self.only]
        learned = Learned.of(store, tuple(configurations), self.held_out.group)
        size, tokens = self.held_out.shape[-1], max(self.held_out.lengths)
        if self.within is not None:
            dearest = self.within * 2 * size * tokens
            configurations = [x for x in configurations if cost_of(x.build(learned), tokens, size) <= dearest]
        if not configurations:
            return
        settings = score.ScoreSettings(tuple(configurations))
        scores = score.score(self.held_out, settings, learned)
        first = sum(table["configuration"].nunique() for table, _ in self.tables)
        metrics = score.metrics_table(scores, settings, learned, size)
        counts = pd.concat(score.counts_tables(scores, first), ignore_index=True)
        self.tables.append((metrics.assign(configuration=metrics["configuration"] + first), counts))

    @property
    def points(self) -> tuple[pd.DataFrame, Replicas | None]:
        """All configurations of all budgets, and their replicas."""
        metrics, counts = (pd.concat(tables, ignore_index=True) for tables in zip(*self.tables, strict=True))
        points = frontiers.points(metrics)
        return points, Replicas.of(points, counts, replicas=300)


def train(stage: Any, settings: Any, store: Store, *made: str) -> dict[str, Path]:
    """Run a stage; where its artefacts lie."""
    stage.run(settings, store)
    for name in made:
        store.finish(name, made[0], plain(settings), {}, 0)
    return {name: store.path(name) for name in made}


def encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """What `of_encoder` reads."""
    parser.add_argument("--model", type=Path, help="an encoder")
    parser.add_argument("--train", type=Path, help="text to learn from")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=None, help="of each layer of the encoder; by default all")
    parser.add_argument("--samples", type=int, default=None, help="held-out samples; of an encoder 4 by default")
    parser.add_argument("--skip", type=int, default=0, help="texts of --test to leave out in front")


def of_encoder(given: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Queries and keys of some heads of an encoder, recorded to two files below a folder."""
    model, tokenizer = recorded.lengthened(given.model, given.tokens)
    files = {}
    sides = (("qk", given.train, 0, TEXTS), ("qk_validation", given.test, given.skip, given.samples or 4))
    for name, text, skipped, count in sides:
        whole = recorded.samples(model, recorded.texts(text, tokenizer, given.tokens, skipped + count)[skipped:])
        q, k = ([torch.stack([x[at] for at in range(1, len(x), 2)]) for x in side] for side in (whole.q, whole.k))
        files[name] = folder / f"{name}.pt"
        Samples(*([x[:, : given.heads].contiguous() for x in side] for side in (q, k))).save(files[name])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    encoder_arguments(parser)
    parser.add_argument("--only", nargs="+", default=None, help="methods to score; by default all")
    parser.add_argument("--within", type=float, default=None, help="the largest cost of a prediction; by default any")
    parser.add_argument("--rounds", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--epochs", type=int, default=None, help="of the projections; by default those of the stage")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Store(given.run)
        qk = of_encoder(given, Path(folder)) if given.model else {x: run.path(x) for x in ("qk", "qk_validation")}
        budgets = Budgets(Path(folder), qk, given.samples, given.only, given.within)
        budgets.score(budgets.store("unlearned"), [*(c for name in UNLEARNED for c in of_file(name)), *of_sizes()])
        project = quantization.ProjectSettings(eval_every=0)
        if given.epochs is not None:
            project = replace(project, epochs=given.epochs)
        for rounds in given.rounds:
            store = budgets.store(f"space-{rounds}")
            space = train(quantization, replace(project, rounds=rounds), store, "projections")
            budgets.score(store, list(of_projections(rounds)))
            for clusters in given.clusters:
                store = budgets.store(f"kmeans-{rounds}-{clusters}", **space)
                train(kmeans_centroids, kmeans_centroids.ClusterSettings(n_clusters=clusters), store, "centroids")
                budgets.score(store, list(of_centroids(clusters)))
                store = budgets.store(f"routed-{rounds}-{clusters}")
                route = lowrank.RouteSettings(rank=rounds, n_clusters=clusters)
                low = train(lowrank, route, store, "lowrank", "key_centroids")
                budgets.score(store, list(of_key_centroids()))
            budgets.score(
                budgets.store(f"lowrank-{rounds}", lowrank=low["lowrank"]),
                [Configuration("lowrank", LowRank(level=v)) for v in MARGINS],
            )
            store = budgets.store(f"bilinear-{rounds}")
            inner = bilinear.BilinearSettings(
                rounds=rounds,
                n_clusters=max(given.clusters),
                coarsest=min(given.clusters),
                eval_every=0,
                indexer_size=rounds,
            )
            train(bilinear, inner, store, "bilinear_projections", "bilinear_centroids", "indexer")
            every_pair = [Configuration("bilinear", Bilinear(level=v)) for v in MARGINS]
            budgets.score(store, [*every_pair, *of_trained_centroids(), *of_file("indexer")])
        print(report(budgets, given))


def report(budgets: Budgets, given: argparse.Namespace) -> str:
    """Two tables, and what the best of ours has more than the best of all others."""
    points, replicas = budgets.points
    by_cost = frontiers.by_cost(points)
    at_cost = None if replicas is None else replicas.by_cost(points["prediction_share"].to_numpy(float))
    tables = {
        "Recall at equal density, each method at its best budget": text_tables.recall_lines(
            points, LEVELS, replicas, far=False
        ),
        "Recall at equal total cost (prediction and attention, as a share of dense attention's multiplications)": (
            text_tables.recall_lines(by_cost, COSTS, at_cost, far=False)
        ),
        "The best of ours minus the best of all others at equal density": text_tables.advantage_lines(
            points, replicas, LEVELS, ALL_OTHERS
        ),
        "The best of ours minus the best of all others at equal total cost": text_tables.advantage_lines(
            by_cost, at_cost, COSTS, ALL_OTHERS, "cost"
        ),
    }
    of = f"{given.model.name}, {given.tokens} tokens" if given.model else given.run
    trained = f"R in {given.rounds}, C in {given.clusters}, {points['samples'].iloc[0]} held-out samples"
    bodies = "\n\n".join(f"{title}\n{text_table(lines)}" for title, lines in tables.items())
    return f"{machine()}\n\n### Equal cost: {of}, {trained}\n\n```\n{bodies}\n```"


if __name__ == "__main__":
    main()
