"""``corpus.pack=apart`` on the command line: what is trained, recorded and measured sees each document alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from sparsefinder.corpora import TextFiles, token_blocks
from sparsefinder.corpora.packing import boundary_of, document_of
from sparsefinder.models import load_masked_lm
from sparsefinder.storage.manifests import read_manifest
from tests.faults.tiny_runs import settings
from tests.nursery import Nursery

APART = ["corpus.pack=apart", "model.max_length=64", "finetune.steps=2"]
WITH_A_WINDOW = ["pattern=window", "target=null", "evaluate.measured=8", "compare.lengths=[32,64]", "compare.rounds=1"]
WITH_A_WINDOW += ["arms=[{pattern: window, attention: bucketed}, {reading: chunks, tokens: 32}]", "compare.samples=2"]
WITH_A_WINDOW += ["compare.measured_queries=4", "compare.step_rounds=1"]


@pytest.fixture(scope="module")
def run_dir(runs: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    done = runs.run(
        *settings(folder / "text"),
        *APART,
        *WITH_A_WINDOW,
        f"run_dir={folder / 'run'}",
        "stage=[finetune,extract,evaluate,compare]",
    )
    assert done.status == 0, done.output
    return folder / "run"


def test_every_document_is_a_sample_of_its_own(run_dir: Path) -> None:
    """The same as the plain count of documents in the drawn blocks, and each as long as its document."""
    _, tokenizer = load_masked_lm(run_dir / "model")
    samples = torch.load(run_dir / "qk_enc-attn.pt", weights_only=True)
    manifest = read_manifest(run_dir / "qk_enc-attn.pt")
    assert manifest is not None
    assert manifest.facts["samples"] == len(samples["q"])
    lengths = sorted(sample.shape[-2] for sample in samples["q"])
    text = run_dir.parent / "text"
    corpus = TextFiles(*(str(text / f"{split}.txt") for split in ("train", "validation", "test")), pack="apart")
    blocks = token_blocks(corpus, tokenizer, "train", 64)
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(3))[:6].tolist()
    of = [document_of(blocks[index], boundary_of(tokenizer)).bincount().tolist() for index in chosen]
    assert lengths == sorted(length for each in of for length in each)
    assert len(lengths) > 6


def test_quality_is_measured(run_dir: Path) -> None:
    results = pd.read_parquet(run_dir / "evaluate" / "results.parquet")
    assert results["loss"].notna().all()
    compared = pd.read_parquet(run_dir / "compare" / "results.parquet")
    assert compared["loss"].notna().all()
    assert compared[compared["arm"] == "window"][["output_error", "computed_density", "recall"]].notna().all().all()


def test_another_packing_is_one_line(runs: Nursery, tmp_path: Path) -> None:
    refused = runs.run(
        *settings(tmp_path / "text"), "corpus.pack=sideways", f"run_dir={tmp_path}", "stage=finetune"
    ).refused()
    assert "corpus.pack=sideways is unknown; choose one of false, true, apart" in refused


def test_a_decoder_is_refused_in_one_line(runs: Nursery, tmp_path: Path) -> None:
    given = [*settings(tmp_path / "text"), *APART, "model.family=gpt2", "causal=true", "which=dec", "target=null"]
    refused = runs.run(*given, f"run_dir={tmp_path / 'run'}", "stage=finetune").refused()
    assert "corpus.pack=apart is for masked language models, and this is a gpt2: give corpus.pack=true" in refused


def test_a_conversion_is_refused_in_one_line(runs: Nursery, run_dir: Path) -> None:
    given = [*settings(run_dir.parent / "text"), *APART, *WITH_A_WINDOW, "conversion=longformer"]
    refused = runs.run(*given, f"run_dir={run_dir}", "stage=evaluate").refused()
    assert "does not see documents apart: leave it out, or give corpus.pack=false or true" in refused
