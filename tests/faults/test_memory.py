"""Memory does not grow with the number of samples: each stage reads and writes them as they come."""

from __future__ import annotations

import os
from pathlib import Path

from sparsefinder.storage.samples import load_samples
from tests.faults.tiny_runs import settings
from tests.nursery import Nursery

FEW, MANY = (200, 2000) if "SPARSEFINDER_KILLS" in os.environ else (40, 240)
STAGES = ("extract", "project", "cluster", "calibrate", "score", "evaluate")


def test_memory_is_bounded(runs: Nursery, tmp_path: Path) -> None:
    """A sample has 0.5 MB of queries and keys; within 10 % is less than a hundred of them."""
    command = [
        *settings(tmp_path / "text", documents=2 * MANY),
        *("model.layers=4", "model.hidden_size=256", "model.heads=4", "model.max_length=64", "finetune.steps=0"),
        *("extract.file_size=0", "extract.shard_size=4", "project.epochs=1", "cluster.max_points=2000"),
    ]
    peaks: dict[str, list[int]] = {stage: [] for stage in STAGES}
    for count in (FEW, MANY):
        run_dir = tmp_path / str(count)
        own = [f"nsamples={count}", f"evaluate.samples={count // 5}", f"run_dir={run_dir}"]
        done = runs.run(*command, "stage=finetune", *own)
        assert done.status == 0, done.output
        for stage in STAGES:
            done = runs.run(*command, f"stage={stage}", *own)
            assert done.status == 0, done.output
            peaks[stage].append(done.peak)
        assert (run_dir / "qk_enc-attn.pt").is_dir()
        assert len(load_samples(run_dir / "qk_enc-attn.pt")) == count
    shown = {stage: [f"{peak / 1e6:.0f} MB" for peak in each] for stage, each in peaks.items()}
    print(f"\npeak memory with {FEW} and {MANY} samples: {shown}")
    for stage, (few, many) in peaks.items():
        assert many < 1.1 * few, (stage, shown)
