"""What the tests of faults damage: one undisturbed run, and a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.tiny_runs import settings
from tests.nursery import Nursery
from tests.tiny_models import save_tiny


@dataclass(frozen=True)
class Undisturbed:
    """A finished run of every stage: what is typed (but for ``run_dir``), where it lies, and the seconds it took."""

    command: list[str]
    run_dir: Path
    seconds: float


@pytest.fixture(scope="session")
def undisturbed(runs: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Every stage, nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = settings(folder / "text")
    done = runs.run(*command, f"run_dir={folder / 'run'}")
    assert done.status == 0, done.output
    return Undisturbed(command, folder / "run", done.seconds)


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody has touched."""
    return save_tiny(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def folder(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "model"))
