"""The command line as its users meet it: a subprocess, its exit status and what it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from sparsefinder.pipeline import STAGES
from sparsefinder.storage import tables
from tests.conftest import GRAPH, ROOT
from tests.nursery import Nursery, Run

# even smaller than the experiment: a run in some ten seconds
SMOKE = ["experiment=smoke", "finetune.steps=6", "finetune.eval_steps=2", "attention=bucketed"]
GIVEN = [
    f"qk={GRAPH / 'golden_enc-attn.pt'}",
    f"qk_validation={GRAPH / 'golden_enc-attn.pt'}",
    f"projections={GRAPH / 'golden_projections.pickle'}",
    f"centroids={GRAPH / 'golden_centroids.pickle'}",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "run.py"), *arguments]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of every stage, in a process that imports for itself what it needs."""
    run_dir = tmp_path_factory.mktemp("smoke") / "run"
    done = subprocess.run(
        command(*SMOKE, f"run_dir={run_dir}"), capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert str(run_dir / "report" / "index.html") in done.stdout + done.stderr
    return run_dir


class TestWholeRun:
    def test_every_artefact_has_a_manifest(self, smoke: Path) -> None:
        made = ["model", "qk_enc-attn.pt", "qk_validation_enc-attn.pt", "projections.pickle", "centroids.pickle"]
        for name in [*made, "score", "evaluate", "report"]:
            assert (smoke / name).exists()
            assert (smoke / f"{name}.json").exists()
        assert not list(smoke.rglob("*.tmp"))

    def test_a_second_run_skips_everything(self, runs: Nursery, smoke: Path) -> None:
        again = runs.run(*SMOKE, f"run_dir={smoke}")
        assert again.status == 0
        assert [line for line in again.stderr.splitlines() if "skipped" in line] == [
            f"{stage}: done and unchanged, skipped"
            for stage in STAGES
            if stage not in ("calibrate", "compare")  # left out without a target, and without arms
        ]

    def test_the_files_are_of_the_published_form(self, smoke: Path) -> None:
        qk = torch.load(smoke / "qk_enc-attn.pt", weights_only=True)
        assert set(qk) == {"length_src", "q", "k"}
        assert [sample.shape[2] for sample in qk["q"]] == list(qk["length_src"])
        heads, size = qk["q"][0].shape[1], qk["q"][0].shape[3]
        projections = torch.load(smoke / "projections.pickle", weights_only=True)
        assert projections[0]["q"]["w"].shape == (heads, size, 4)
        assert projections[0]["k"]["b"].shape == (heads, 1, 4)
        centroids = torch.load(smoke / "centroids.pickle", weights_only=True)
        assert centroids[0].shape == (heads, 1, 4, 4)

    def test_the_score_table_has_its_columns(self, smoke: Path) -> None:
        table = pd.read_csv(smoke / "score" / "metrics.csv")
        needed = {"pattern", "layer", "head", "sparsity", "recall", "precision", "exact", "gold_sparsity"}
        assert needed | {"window", "global_tokens", "causal", "threshold", "bucket_size", "top_clusters"} <= set(table)
        oracle = table[table.pattern == "oracle"]
        assert (oracle.recall == 1).all()
        assert (oracle.sparsity == oracle.gold_sparsity).all()

    def test_variants_are_asked_about_the_same_positions(self, smoke: Path) -> None:
        results = pd.read_csv(smoke / "evaluate" / "results.csv")
        assert results.masked_tokens.nunique() == 1
        assert results.variant.is_unique
        assert list(results.variant[:2]) == ["dense full", "dense full (softmax)"]

    def test_a_task_with_labels(self, runs: Nursery, smoke: Path, tmp_path: Path) -> None:
        shutil.copytree(smoke, tmp_path / "run")
        task = ["evaluate.task=sequence_classification", "evaluate.head.steps=4", "stage=[evaluate,report]"]
        done = runs.run(*SMOKE, f"run_dir={tmp_path / 'run'}", "patterns=[window]", *task)
        assert done.status == 0, done.stderr
        assert "In the model, on the same examples of sequence classification" in done.stdout
        assert re.search(r"text evaluated on +held-out split", done.stdout)
        results = pd.read_csv(tmp_path / "run" / "evaluate" / "results.csv")
        assert list(results.variant[:3]) == ["dense full", "dense full (softmax)", "bucketed window width=11"]
        assert {"accuracy", "macro_f1", "macro_f1_minus_entmax"} <= set(results)
        page = (tmp_path / "run" / "report" / "index.html").read_text()
        assert "Loss of sequence classification" in page
        assert "masked positions" not in page

    def test_one_stage_again_with_another_setting(self, runs: Nursery, smoke: Path, tmp_path: Path) -> None:
        shutil.copytree(smoke, tmp_path / "run")
        done = runs.run(*SMOKE, f"run_dir={tmp_path / 'run'}", "stage=cluster", "n_clusters=5")
        assert done.status == 0, done.stderr
        assert "cluster: runs again, because n_clusters 4 → 5" in done.stderr
        assert torch.load(tmp_path / "run" / "centroids.pickle", weights_only=True)[0].shape[2] == 5

    def test_a_model_given_by_path(self, runs: Nursery, smoke: Path, tmp_path: Path) -> None:
        settings = ["stage=extract", "nsamples=2", "corpus.max_characters=300000", f"run_dir={tmp_path}"]
        done = runs.run(f"model={smoke / 'model'}", *settings)
        assert done.status == 0, done.stderr
        assert len(torch.load(tmp_path / "qk_enc-attn.pt", weights_only=True)["q"]) == 2


class TestSweep:
    def test_points_have_folders_and_join_into_one_table(self, runs: Nursery, tmp_path: Path) -> None:
        sweep = ["stage=score", *GIVEN, f"run_dir={tmp_path}", "-m", "pattern=kmeans,distance", "window=null,3,11"]
        done = runs.run(*sweep)
        assert done.status == 0, done.stderr
        table = tables.collect(tmp_path)
        assert len(table) == 2 * 3 * 2 * 3
        assert table.run.nunique() == 6
        assert set(table.window.dropna()) == {3, 11}
        again = runs.run(*sweep)
        assert again.stderr.count("score: done and unchanged, skipped") == 6

    def test_a_bad_point_does_not_stop_the_others(self, runs: Nursery, tmp_path: Path) -> None:
        done = runs.run("stage=score", *GIVEN, f"run_dir={tmp_path}", "-m", "pattern=window", "window=3,4")
        assert done.status == 2
        assert "error: window=4: a window must be an odd number" in done.stderr
        assert len(tables.collect(tmp_path)) == 6


def write(path: Path, value: object) -> str:
    torch.save(value, path)
    return str(path)


def qk(layers: int = 2, heads: int = 3, size: int = 16) -> dict:
    tensors = [torch.randn(layers, heads, n, size) for n in (5, 7)]
    return {"length_src": [5, 7], "q": tensors, "k": [t.clone() for t in tensors]}


WRONG = {
    "unknown stage": (["stage=scores"], "stage=scores is unknown; choose all or some of finetune"),
    "unknown pattern": (
        ["stage=score", *GIVEN, "pattern=kmean"],
        "pattern=kmean is unknown; choose one of all, bigbird",
    ),
    "unknown key": (["stage=score", *GIVEN, "windows=3"], "there is no setting windows"),
    "added key": (["stage=score", *GIVEN, "+windows=3"], "there is no setting windows"),
    "unknown field": (["stage=score", *GIVEN, "pattern=kmeans", "pattern.top=3"], "there is no setting pattern.top"),
    "even window": (["stage=score", *GIVEN, "window=4"], "odd number of tokens"),
    "word for a number": (["stage=score", *GIVEN, "window=wide"], "window must be int or null, got 'wide'"),
    "no samples": (["stage=extract", "nsamples=0"], "nsamples must be 1 or more, got 0"),
    "negative samples": (["stage=extract", "nsamples=-3"], "nsamples must be 1 or more, got -3"),
    "sweep without -m": (["stage=score", *GIVEN, "window=3,5"], "add --multirun"),
    "missing file": (
        ["stage=score", "qk=/does/not/exist.pt", "pattern=window"],
        "qk=/does/not/exist.pt does not exist",
    ),
    "nothing there": (["stage=score", "pattern=window"], "run stage=extract first"),
    "a need of a later stage": (["stage=[finetune,extract,score]", "pattern=kmeans"], "run stage=project first"),
    "unwritable folder": (["stage=score", *GIVEN, "run_dir=/proc/none/x"], "choose another run_dir"),
    "unknown model": (["stage=extract", "model=/does/not/exist"], "model=/does/not/exist"),
    "a number for a stage": (["stage=5"], "stage=5 is no stage: give one by its name"),
    "no such attention": (
        ["stage=evaluate", "attention=bucketed", "attention._target_=nothing"],
        "attention._target_=nothing cannot be used (No module named 'nothing')",
    ),
    "a threshold for other heads": (
        ["stage=score", *GIVEN, "pattern=distance", "pattern.threshold=[[1,2],[1,1]]"],
        "pattern.threshold has values for 2 layers of 2 heads, the model has 2 layers of 3",
    ),
    "queries of its own scaled": (["stage=score", "pattern=window", "query_scale=8"], "give qk=PATH"),
    "too many clusters": (["stage=score", *GIVEN, "pattern=kmeans", "pattern.top_clusters=9"], "has 6 clusters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(runs: Nursery, case: str, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    own = [] if any(a.startswith("run_dir=") for a in arguments) else [f"run_dir={tmp_path / 'run'}"]
    check_refused(runs.run(*arguments, *own), message)
    assert not list(tmp_path.rglob("*.json"))  # said before anything was made


FILES = {
    "truncated": (
        lambda p: (p.write_bytes((GRAPH / "golden_enc-attn.pt").read_bytes()[:5000]), str(p))[1],
        "cannot be read",
    ),
    "nan": (lambda p: write(p, qk() | {"q": [torch.full_like(t, torch.nan) for t in qk()["q"]]}), "contains NaN"),
    "shapes": (lambda p: write(p, qk() | {"k": [t[:, :, 1:] for t in qk()["k"]]}), "but k of shape"),
    "length_src": (lambda p: write(p, qk() | {"length_src": [5, 6]}), "length_src disagrees"),
    "heads": (lambda p: write(p, qk(heads=2)), "3 heads of size 16, the queries and keys have 2 heads"),
    "layers": (lambda p: write(p, qk(layers=3)), "projections of 2 layers, the queries and keys have 3"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_clear_line(runs: Nursery, case: str, tmp_path: Path) -> None:
    make, message = FILES[case]
    file = make(tmp_path / "wrong.pt")
    given = [*GIVEN[2:], f"qk={file}", f"qk_validation={file}", f"run_dir={tmp_path / 'run'}"]
    check_refused(runs.run("stage=score", "pattern=kmeans", *given), message)


@pytest.mark.parametrize("sweep", [[], ["-m", "window=null,3"]], ids=["once", "swept"])
def test_a_number_is_the_name_of_a_file_or_folder(runs: Nursery, sweep: list[str], tmp_path: Path) -> None:
    shutil.copy(GRAPH / "golden_enc-attn.pt", tmp_path / "2024")
    settings = ["stage=score", "pattern=window", "qk=2024", "qk_validation=2024", "run_dir=2024_01"]
    done = runs.run(*settings, *sweep, cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert len(list((tmp_path / "2024_01").rglob("metrics.csv"))) == (2 if sweep else 1)


def test_centroids_of_another_size(runs: Nursery, tmp_path: Path) -> None:
    file = write(tmp_path / "c.pickle", [torch.zeros(3, 1, 6, 5)] * 2)
    done = runs.run("stage=score", *GIVEN[:3], f"centroids={file}", "pattern=kmeans", f"run_dir={tmp_path / 'run'}")
    check_refused(done, "size R=5, the projected queries have 3 heads and size R=4")


def test_an_empty_text_file(runs: Nursery, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / name).write_text("")
    files = [f"corpus.{name}={tmp_path / name}" for name in ("train", "validation")]
    check_refused(runs.run("stage=finetune", "corpus=text", *files, f"run_dir={tmp_path / 'run'}"), "empty")


def check_refused(done: Run, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.status == 2, done.stderr
    assert len(errors) == 1, done.stderr
    assert message in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches(runs: Nursery, tmp_path: Path) -> None:
    done = runs.run("--help", cwd=tmp_path)
    assert done.status == 0
    for word in ("stage=", "experiment=", "pattern=", "run_dir=", "--cfg job"):
        assert word in done.stdout


def test_cfg_job_runs_nothing(runs: Nursery, tmp_path: Path) -> None:
    done = runs.run("--cfg", "job", cwd=tmp_path)
    assert done.status == 0
    assert "nsamples: 50" in done.stdout
    assert not list(tmp_path.iterdir())
