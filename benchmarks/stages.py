"""What the stages score, extract and evaluate cost beside what cannot be left out.

    python benchmarks/stages.py                          # the whole frontier takes minutes
    python benchmarks/stages.py --samples 5 --rounds 1   # a tenth of it

``score``: a frontier of a hundred configurations on samples of RoBERTa-base shape (12 layers × 12 heads × 512 tokens), on the
made queries and keys of `learning.py`. ``extract`` and ``evaluate``: a RoBERTa of that width with random weights and 4 layers,
beside the same model merely reading the same batches with the same attention.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from learning import made
from measuring import machine, measure, peak_memory
from transformers import RobertaConfig, RobertaForMaskedLM

from sparsefinder.attention import Dense
from sparsefinder.corpora import TokenBlocks
from sparsefinder.corpora.masking import Batch
from sparsefinder.evaluate import quality_and_cost
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.extract import ExtractSettings, record
from sparsefinder.kmeans_centroids import ClusterSettings
from sparsefinder.models import plugged
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.lowrank import LowRank
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import Window
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.fit_centroids import fit_centroids
from sparsefinder.predictors.projections import LayerProjections, Linear, Projections
from sparsefinder.score import ScoreSettings, score

LAYERS, HEADS, TOKENS, SIZE = 12, 12, 512, 64


def frontier() -> tuple[Configuration, ...]:
    """A hundred configurations: five predictors, their sparsity parameters swept, without and with a window, and windows."""
    dialled: list[tuple[str, Any, list[Any]]] = [
        ("distance", Distance(), [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),
        ("quantize", Quantize(), [2, 4, 6, 8, 12, 16, 24, 32, 48, 64]),
        ("kmeans", KMeans(), [1, 2, 3, 4, 5, 6, 8, 10]),
        ("routed", Routed(), [-0.5, -0.25, 0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5]),
        ("lowrank", LowRank(), [-0.5, -0.25, 0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5]),
    ]
    found = [
        Configuration(name, replace(pattern, **{pattern.sparsity_parameter: value}), window=window)
        for name, pattern, values in dialled
        for value in values
        for window in (None, 11)
    ]
    return (*found, *(Configuration("window", Window(width)) for width in (11, 31, 61, 121)))


def scoring(samples: int) -> None:
    """Seconds of the frontier, and the memory it adds."""
    held_out, training = made(LAYERS, HEADS, TOKENS, samples, seed=1), made(LAYERS, HEADS, TOKENS, 4)
    torch.manual_seed(0)
    linear = [Linear(HEADS, SIZE, 4) for _ in range(LAYERS)]
    projections = Projections([LayerProjections(each, each) for each in linear])
    lowrank = fit_lowrank(training, 32)
    clusters = ClusterSettings(n_clusters=16)
    learned = Learned(
        {
            "projections": projections,
            "centroids": fit_centroids(training, projections, clusters),
            "lowrank": lowrank,
            "key_centroids": fit_centroids(training, lowrank, replace(clusters, n_clusters=64), sides=("k",)),
        }
    )
    settings = ScoreSettings(frontier())
    score(held_out.part(0, 1), settings, learned)  # warm-up
    start = time.perf_counter()
    peak = peak_memory(lambda: score(held_out, settings, learned))
    seconds = time.perf_counter() - start
    shape = f"{LAYERS} layers × {HEADS} heads × {TOKENS} tokens"
    print(
        f"\nscore: {len(settings.configurations)} configurations, {samples} samples of {shape}: {seconds:.0f} s", end=""
    )
    print("" if peak is None else f", {peak / 2**20:,.0f} MB more than before")


def recording(samples: int, rounds: int) -> None:
    """Tokens a second of extract and evaluate, beside the forward pass alone."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=8000, max_position_embeddings=TOKENS + 2, num_hidden_layers=4, attn_implementation="eager"
    )
    model = RobertaForMaskedLM(config).eval()
    attention = Dense(Normalizer(1.5))
    ids = torch.randint(5, config.vocab_size, (samples, TOKENS))
    blocks = TokenBlocks(ids.flatten(), torch.arange(0, samples * TOKENS + 1, TOKENS))
    settings = ExtractSettings(corpus=None)  # type: ignore[arg-type]
    folder = Path(tempfile.mkdtemp())
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    batches: list[Batch] = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": truth}
        for part, truth in zip(ids.split(settings.batch_size), labels.split(settings.batch_size), strict=True)
    ]

    def forward(whole: bool) -> None:
        with plugged(model, attention), torch.inference_mode():
            for batch in batches:
                (model if whole else model.base_model)(batch["input_ids"], attention_mask=batch["attention_mask"])

    def extract() -> None:
        record(model, blocks, range(samples), config.pad_token_id, settings, folder)

    def evaluate() -> None:
        quality_and_cost(model, attention, None, [*batches])

    try:
        times = measure(
            {
                "forward pass of the encoder": lambda: forward(whole=False),
                "extract": extract,
                "forward pass of the language model": lambda: forward(whole=True),
                "evaluate": evaluate,
            },
            rounds,
        )
    finally:
        shutil.rmtree(folder)
    print(
        f"\n| {samples} blocks of {TOKENS} tokens, 4 layers | ms | spread | throughput, of the forward pass's | peak MB |"
    )
    print("|---|---|---|---|---|")
    base = ""
    for name, measured in times.items():
        base = name if name.startswith("forward") else base
        print(f"| {name} | {measured.times} | {measured.faster_than(times[base]):.2f} | {measured.megabytes} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    recording(min(arguments.samples, 32), arguments.rounds)
    scoring(arguments.samples)
