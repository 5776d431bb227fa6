"""A run directory made in a second without a model: random queries and keys with some structure, and the real stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sparsefinder import kmeans_centroids, quantization, score
from sparsefinder.experiment.configuration import Configuration, needed
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.window import Window
from sparsefinder.storage import tables
from sparsefinder.storage.manifests import plain
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store

LEARNED = (
    *(Configuration("distance", Distance("l2", t)) for t in (0.3, 1.0, 3.0)),
    *(Configuration("quantize", Quantize(size)) for size in (2, 4, 8)),
    *(Configuration("kmeans", KMeans(top)) for top in (1, 2)),
)
CONFIGURATIONS = (
    Configuration("oracle", Oracle()),
    Configuration("full", Full()),
    *(Configuration("window", Window(width)) for width in (1, 5, 15)),
    *(Configuration("random", Distance("random", share)) for share in (0.1, 0.4)),
    *LEARNED,
    *(Configuration(c.name, c.pattern, window=3, global_tokens=1) for c in LEARNED),
)


def samples(count: int = 12, layers: int = 2, heads: int = 2, size: int = 8, seed: int = 0) -> Samples:
    """Tokens of four topics: queries and keys of one topic attract each other."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.6 * torch.randn(layers, heads, 4, size, generator=generator)
    q, k = [], []
    for index in range(count):
        topics = torch.randint(0, 4, (20 + index,), generator=generator)
        for side in (q, k):
            noise = torch.randn(layers, heads, len(topics), size, generator=generator)
            side.append(centres[:, :, topics] + noise)
    return Samples(q, k)


def text_files(folder: Path) -> tuple[str, ...]:
    """Writes a file of short lines for each split, and gives the settings that name them."""
    names = ("train", "validation", "test")
    for name in names:
        lines = [f"{name} {number} is a line of words. And line {number - 1} came before it." for number in range(400)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return ("corpus=text", *(f"corpus.{name}={folder / name}.txt" for name in names))


TRAINING, HELD_OUT = samples(16).part(0, 11), samples(16).part(11, 16)


def make_scored(run_dir: Path, configurations: tuple[Configuration, ...] = CONFIGURATIONS) -> Store:
    """A run directory in which everything up to ``score`` of these configurations is finished, but for the model."""
    store = make_learned(run_dir, learn=bool(needed(configurations)))
    settings = score.ScoreSettings(configurations, map_tokens=24)
    score.run(settings, store)
    parents = {name: store.content(name) for name in settings.needs}
    store.finish("score", "score", plain(settings), parents, 0)
    return store


def make_learned(run_dir: Path, learn: bool = True) -> Store:
    """A run directory with queries and keys and, where asked for, what is learned from them."""
    run_dir.mkdir(parents=True)
    store = Store(run_dir)
    for name, part in zip(("qk", "qk_validation"), (TRAINING, HELD_OUT), strict=True):
        with store.writing(name) as path:
            part.save(path)
        store.finish(name, "extract", {}, {}, 0)
    if learn:
        _learn(store)
    return store


def _learn(store: Store) -> None:
    project = quantization.ProjectSettings(epochs=3, rounds=3, eval_samples=1)
    quantization.run(project, store)
    store.finish("projections", "project", plain(project), {"qk": store.content("qk")}, 0)
    cluster = kmeans_centroids.ClusterSettings(n_clusters=6, jobs=1)
    kmeans_centroids.run(cluster, store)
    store.finish("centroids", "cluster", plain(cluster), {"projections": store.content("projections")}, 0)


def variant(name: str, attention: str, loss: float, **more: Any) -> dict[str, Any]:
    """A row of ``evaluate/results`` as the stage writes it, with invented figures."""
    row = {
        "variant": name,
        "attention": attention,
        "alpha": 1.5,
        "adapt_steps": 0,
        "finetune_part": None,
        "loss": loss,
        "perplexity": math.exp(loss),
        "accuracy": 0.4,
        "masked_tokens": 321,
        "latency_ms": 20.0,
        "predictor_share": 0.25,
        "peak_memory_mb": 64.0,
        "computed_density": 1.0,
    }
    return row | more


RESULTS = (
    variant("dense full", "dense", 4.0, pattern="full", sparsity=0.0, recall=1.0),
    variant("dense full (softmax)", "dense", 4.3, pattern="full", alpha=1.0, sparsity=0.0, recall=1.0),
    variant("masked kmeans", "masked", 4.2, pattern="kmeans", sparsity=0.7, recall=0.8, latency_ms=25.0),
    variant("bucketed kmeans", "bucketed", 4.2, pattern="kmeans", sparsity=0.7, recall=0.8, computed_density=0.4),
    variant("masked quantize", "masked", 4.1, pattern="quantize", window=3, global_tokens=1, sparsity=0.5, recall=0.9),
    variant("pooled", "lsg", 4.4, predictor_share=None),  # pooled keys: no token graph
)


def make_evaluated(store: Store, rows: tuple[dict[str, Any], ...] = RESULTS) -> Store:
    """A finished ``evaluate`` with these rows."""
    table = tables.tidy(rows)
    for name in ("loss", "perplexity", "accuracy"):
        table[f"{name}_minus_entmax"] = table[name] - table[name].iloc[0]
        table[f"{name}_minus_softmax"] = table[name] - table[name].iloc[1]
    for end, away in (("low", -0.02), ("high", 0.02)):
        table[f"loss_minus_entmax_{end}"] = table["loss_minus_entmax"] + away
    table["speed_against_dense"] = table["latency_ms"].iloc[0] / table["latency_ms"]
    table["speed_against_softmax"] = table["latency_ms"].iloc[1] / table["latency_ms"]
    with store.writing("evaluate") as folder:
        folder.mkdir()
        tables.write(table, folder, "results")
        tables.write(pd.DataFrame({"variant": table["variant"], "layer": 0, "head": 0}), folder, "layers")
    store.note("evaluate", split="test", blocks=7, masked_tokens=321)
    store.finish("evaluate", "evaluate", {"measured": 4}, {}, 0)
    return store
