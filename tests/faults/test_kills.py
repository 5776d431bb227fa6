"""SIGKILL at random moments over all stages, then the same command again: the same tables, every time.

A few kills are in the suite; ``make test-faults`` makes a hundred (``SPARSEFINDER_KILLS``).
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.tiny_runs import STAGES, assert_finished_is_whole, assert_same_tables
from tests.nursery import Nursery

KILLS = int(os.environ.get("SPARSEFINDER_KILLS", "3"))


@pytest.mark.timeout(60 + 60 * KILLS)
def test_killed_at_random_moments(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A chain of kills on one run directory until the run gets through, then another chain."""
    chance, run_dir = random.Random(0), tmp_path / "run"
    command = [*undisturbed.command, f"run_dir={run_dir}"]
    kills, chains, working_on = 0, 0, dict.fromkeys(STAGES, 0)
    while kills < KILLS:
        run = runs.run(*command, kill_after=chance.uniform(0.0, 1.2 * undisturbed.seconds))
        if run.status != 0:
            assert run.status == -9, run.output
            kills += 1
            started = [
                line.partition(":")[0] for line in run.output.splitlines() if ": makes" in line or ": runs" in line
            ]
            if started:
                working_on[started[-1]] += 1
            if run_dir.exists():
                assert_finished_is_whole(run_dir)
            if kills < KILLS:
                continue
        done = runs.run(*command)
        assert done.status == 0, done.output
        assert not list(run_dir.glob(".*.tmp"))
        assert_same_tables(run_dir, undisturbed.run_dir)
        shutil.rmtree(run_dir)
        chains += 1
    print(f"\n{kills} kills, {chains} runs brought to their end; killed while working on: {working_on}")


def test_rubbish_of_a_killed_process_is_removed(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed.run_dir, run_dir)
    (run_dir / ".score.1.tmp").mkdir()
    (run_dir / ".score.1.tmp" / "metrics.csv").write_text("half")
    (run_dir / ".qk_enc-attn.pt.2.tmp").write_text("half")
    done = runs.run(*undisturbed.command, f"run_dir={run_dir}")
    assert done.status == 0
    assert [line for line in done.output.splitlines() if "skipped" in line] == [
        f"{stage}: done and unchanged, skipped" for stage in STAGES
    ]
    assert not list(run_dir.glob(".*.tmp"))


def test_the_same_seed_twice(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Not only the tables: every artefact that holds no time is the same, byte for byte; another seed gives others."""
    run_dir = tmp_path / "run"
    done = runs.run(*undisturbed.command, f"run_dir={run_dir}")
    assert done.status == 0, done.output
    assert_same_tables(run_dir, undisturbed.run_dir)
    for name in (
        "model/model.safetensors",
        "qk_enc-attn.pt",
        "projections.pickle",
        "centroids.pickle",
        "score/metrics.csv",
    ):
        assert (run_dir / name).read_bytes() == (undisturbed.run_dir / name).read_bytes(), name
    other = runs.run(*undisturbed.command, f"run_dir={run_dir}", "seed=4", "stage=[finetune,extract]")
    assert other.status == 0, other.output
    for name in ("model/model.safetensors", "qk_enc-attn.pt"):
        assert (run_dir / name).read_bytes() != (undisturbed.run_dir / name).read_bytes(), name
