"""Every benchmark can be imported: nothing else runs them, and what they call goes on changing."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_every_benchmark_can_be_imported() -> None:
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    names -= {"transformers_cases"}  # what `transformers_tests` runs, with settings in the environment
    assert "gpu" in names
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n" + "\n".join(
        f"import {name}" for name in sorted(names)
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_vectors_are_recorded_for_benchmarks() -> None:
    """`recorded.samples` calls what the front door learns by."""
    code = (
        "import torch, recorded; from tiny_models import tiny_model; "
        "found = recorded.samples(tiny_model(), [torch.randint(5, 12, (1, 9))]); assert len(found) == 1"
    )
    paths = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
