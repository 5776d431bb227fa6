"""Two processes, started by torchrun: the tables of one, digit for digit; and an error in one is an error of all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.faults.conftest import Undisturbed
from tests.faults.tiny_runs import assert_finished_is_whole, assert_same_tables
from tests.nursery import given_once


def torchrun(*arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """The command line in ``count`` processes, on a free port."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run(
        [*start, str(ROOT / "scripts" / "run.py"), *given_once(arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=250,
    )


def test_the_same_tables_as_one_process(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Everything but training: the same samples, byte for byte, and so the same tables."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed.run_dir, run_dir)
    for name in ("qk_enc-attn.pt", "qk_validation_enc-attn.pt", "score", "evaluate"):
        (run_dir / f"{name}.json").unlink()
    command = [*undisturbed.command, f"run_dir={run_dir}", "stage=[extract,project,cluster,score,evaluate]"]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "skipped" in line or ": makes" in line]
    assert [line.partition(",")[0] for line in lines] == [
        *("extract: makes qk", "project: done and unchanged", "cluster: done and unchanged"),
        *("score: makes score", "evaluate: makes evaluate"),
    ]
    assert_same_tables(run_dir, undisturbed.run_dir)
    assert_finished_is_whole(run_dir)
    assert (run_dir / "qk_enc-attn.pt").read_bytes() == (undisturbed.run_dir / "qk_enc-attn.pt").read_bytes()


def test_training_together(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Two processes with half the batch take the steps of one with the whole; an error of one is said once."""
    halved = [setting.replace("finetune.batch_size=4", "finetune.batch_size=2") for setting in undisturbed.command]
    assert halved != undisturbed.command
    done = torchrun(*halved, "stage=finetune", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (undisturbed.run_dir, tmp_path / "run"))
    moved = max((one[name] - one[name].mean()).abs().max() for name in one)
    assert moved > 0.1
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4)
    many = [setting.replace("nsamples=6", "nsamples=100000") for setting in halved]
    refused = torchrun(*many, f"run_dir={tmp_path / 'run'}", "stage=extract")
    assert refused.returncode != 0
    assert refused.stderr.count("error: nsamples=100000") == 1
