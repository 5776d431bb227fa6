"""Disks that are full, folders that turn read-only, files replaced under a running stage, two processes, a clock that jumps."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsefinder.storage.store import Store
from tests.faults.conftest import Undisturbed
from tests.faults.tiny_runs import STAGES, assert_finished_is_whole, assert_same_tables
from tests.nursery import Nursery

FULL = "SPARSEFINDER_KILLS" in os.environ  # the full form, by `make test-faults`
FILE_SIZES = (3_000, 20_000, 60_000, 120_000) if FULL else (60_000,)
DISK_SIZES = (20_000, 100_000, 400_000, 900_000) if FULL else (400_000,)


def called(*command: str | Path) -> bool:
    """Whether a system command could be run."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of its own of ``size`` bytes."""
    place.mkdir()
    if not called("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place):
        pytest.skip("mounting a small disk needs more rights")
    try:
        yield place
    finally:
        called("umount", "-l", place)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody, root included, makes or removes a name in ``folder``."""
    if not called("chattr", "+i", folder):
        pytest.skip("making a folder immutable needs more rights")
    try:
        yield
    finally:
        called("chattr", "-i", folder)


@pytest.mark.parametrize("size", FILE_SIZES)
def test_files_that_cannot_grow(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path, size: int) -> None:
    """Whichever stage and library meets the limit: one line; and with more space the same command ends well."""
    command = [*undisturbed.command, f"run_dir={tmp_path / 'run'}"]
    assert "cannot write" in runs.run(*command, file_size=size).refused()
    assert_finished_is_whole(tmp_path / "run")
    again = runs.run(*command)
    assert again.status == 0, again.output
    assert_same_tables(tmp_path / "run", undisturbed.run_dir)


@pytest.mark.parametrize("size", DISK_SIZES)
def test_a_full_disk(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path, size: int) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        command = [*undisturbed.command, f"run_dir={disk / 'run'}"]
        assert "cannot write" in runs.run(*command).refused()
        assert_finished_is_whole(disk / "run")
        assert called("mount", "-o", "remount,size=100m", disk)
        again = runs.run(*command)
        assert again.status == 0, again.output
        assert_same_tables(disk / "run", undisturbed.run_dir)


def test_a_folder_that_turns_read_only(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed.run_dir, run_dir)
    again = [*undisturbed.command, f"run_dir={run_dir}", "stage=[score,report]", "window=5"]
    turns = f"""
from sparsefinder import score
import subprocess
whole = score.score
def then_read_only(*arguments):
    subprocess.run(["chattr", "+i", {str(run_dir)!r}], check=True)
    return whole(*arguments)
score.score = then_read_only
"""
    with read_only(run_dir):
        assert "cannot write" in runs.run(*again).refused()  # from the start
    try:
        assert "cannot write" in runs.run(*again, before=turns).refused()  # in the middle of a stage
    finally:
        called("chattr", "-i", run_dir)
    assert_finished_is_whole(run_dir)
    assert_same_tables(run_dir, undisturbed.run_dir)  # the old ones, still whole


REPLACE = """
from sparsefinder import score
import shutil
whole = score.score
def then_replaced(*arguments):
    {how}
    return whole(*arguments)
score.score = then_replaced
"""
HOW = {
    "renamed over": "import os; shutil.copy({other!r}, {file!r} + '2'); os.replace({file!r} + '2', {file!r})",
    "written over": "shutil.copyfile({other!r}, {file!r})",
    "cut": "import os; os.truncate({file!r}, 3000)",
    "removed": "import os; os.remove({file!r})",
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_a_parent_replaced_under_a_running_child(
    runs: Nursery, undisturbed: Undisturbed, tmp_path: Path, how: str, given: bool
) -> None:
    """What is computed from two files is not kept, whether the stage noticed it or not."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed.run_dir, run_dir)
    file, other = run_dir / "qk_validation_enc-attn.pt", run_dir / "qk_enc-attn.pt"
    command = [*undisturbed.command, f"run_dir={run_dir}", "stage=score", "window=5"]
    if given:
        file = shutil.copy(file, tmp_path / "given.pt")
        command.append(f"qk_validation={file}")
    replaced = REPLACE.format(how=HOW[how].format(file=str(file), other=str(other)))
    message = runs.run(*command, before=replaced).refused()
    assert "qk_validation" in message or file.name in message
    assert "while score was running" in message
    kept = Store(run_dir).manifest("score")  # the old one, or none
    assert kept is None or kept.settings["configurations"][0]["window"] == 3


def test_two_processes_on_one_run_dir(runs: Nursery, undisturbed: Undisturbed) -> None:
    """One works, the other says who."""
    with Store(undisturbed.run_dir).held():
        message = runs.run(*undisturbed.command, f"run_dir={undisturbed.run_dir}").refused()
    assert f"is in use by process {os.getpid()} on " in message


def test_a_clock_that_jumps(runs: Nursery, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Years back and forth while stages run, and files from the future: the same tables, and nothing is done twice."""
    run_dir = tmp_path / "run"
    jumps = """
import random, time
chance, real = random.Random(0), time.time
time.time = lambda: real() + chance.uniform(-3e8, 3e8)
"""
    command = [*undisturbed.command, f"run_dir={run_dir}"]
    done = runs.run(*command, before=jumps)
    assert done.status == 0, done.output
    assert_same_tables(run_dir, undisturbed.run_dir)
    for index, path in enumerate(sorted(run_dir.rglob("*"))):
        os.utime(path, (4e9 * (index % 2), 4e9 * (index % 2)))
    again = runs.run(*command)
    assert again.status == 0, again.output
    assert again.output.count("done and unchanged, skipped") == len(STAGES)
