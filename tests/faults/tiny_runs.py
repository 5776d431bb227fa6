"""A run of every stage that takes a few seconds, on a text of our own; and what two runs of it must have in common."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd

from sparsefinder.pipeline import STAGES as PIPELINE
from sparsefinder.storage.manifests import content_hash, read_manifest
from sparsefinder.storage.store import ARTEFACTS

STAGES = tuple(
    stage for stage in PIPELINE if stage != "compare"
)  # by name, in their order; there are no arms to compare
_WORDS = (
    "the",
    "a",
    "that",
    "river",
    "city",
    "house",
    "tree",
    "bird",
    "stone",
    "moves",
    "sees",
    "holds",
    "near",
    "under",
    "with",
)
_MEASURED = ["latency_ms", "latency_spread_ms", "predictor_share", "peak_memory_mb"]
_MEASURED += ["speed_against_dense", "speed_against_softmax"]


def write_text(folder: Path, documents: int = 120) -> list[str]:
    """Files of sentences made by a seed, and the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for name, count in (("train", documents), ("validation", documents // 4), ("test", documents // 4)):
        lines = [" ".join(chance.choices(_WORDS, k=chance.randint(12, 40))) + "." for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return ["corpus=text", *(f"corpus.{name}={folder / name}.txt" for name in ("train", "validation", "test"))]


def settings(folder: Path, documents: int = 120) -> list[str]:
    """The command line without its ``run_dir``: every stage on the text in ``folder``."""
    return [
        *write_text(folder, documents),
        *("name=fault", "nsamples=6", "n_clusters=4", "rounds=3", "seed=3", "corpus.max_characters=null"),
        *("model.vocabulary_size=300", "model.max_length=32", "model.layers=2", "model.heads=2"),
        *("model.hidden_size=32", "model.intermediate_size=32", "model.start=random", "model.initializer_range=0.5"),
        *("finetune.steps=6", "finetune.batch_size=4", "finetune.eval_steps=2", "finetune.eval_blocks=8"),
        *("finetune.warmup=1", "project.epochs=2", "evaluate.samples=8", "evaluate.measured=4"),
        *("pattern=kmeans", "window=3", "attention=bucketed", "target=density=0.5"),
    ]


def numbers(run_dir: Path) -> dict[str, pd.DataFrame]:
    """The tables of a run without what differs from run to run: time and memory."""
    names = ("score/metrics", "score/counts", "evaluate/results", "evaluate/layers")
    return {
        name: pd.read_parquet(run_dir / f"{name}.parquet").drop(columns=_MEASURED, errors="ignore") for name in names
    }


def assert_same_tables(one: Path, other: Path) -> None:
    """Every number of the tables of two runs, to the last digit."""
    expected = numbers(other)
    for name, table in numbers(one).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True, obj=name)


def assert_finished_is_whole(run_dir: Path) -> None:
    """Whatever has a manifest is, byte for byte, what the manifest was written for."""
    for artefact in ARTEFACTS.values():
        manifest = read_manifest(run_dir / artefact.path)
        if manifest is not None:
            assert content_hash(run_dir / artefact.path) == manifest.content, artefact.name
