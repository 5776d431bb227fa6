"""Sweeps, by whatever launcher: every point has a record, a bad one does not lose the others, the same command goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_cli import GIVEN, command

from sparsefinder.storage import sweep_points, tables
from sparsefinder.storage.sweep_points import DONE, FAILED, STARTED, Point, point_of
from tests.conftest import ROOT
from tests.nursery import Nursery

LAUNCHERS = sorted((ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
}

# a pattern that takes its process down, and one that cannot be run
BAD_PATTERNS = """
import os, signal
from dataclasses import dataclass
from sparsefinder.patterns.window import Window

@dataclass(frozen=True)
class Kills(Window):
    def __call__(self, qk, layer):
        os.kill(os.getpid(), signal.SIGKILL)

@dataclass(frozen=True)
class Raises(Window):
    def __call__(self, qk, layer):
        raise ZeroDivisionError("of an unlucky pattern")
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which launchers start others from."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=280)


def installed(launcher: str) -> None:
    module = f"hydra_plugins.{PLUGINS[launcher]}"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install '.[launchers]'")


def states(run_dir: Path) -> dict[str, str]:
    statuses = [sweep_points.read(path.parent) for path in run_dir.rglob(sweep_points.RECORD)]
    return {status.point: status.state for status in statuses}


@pytest.fixture
def bad_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Their module, which processes started from here can import."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "bad_patterns.py").write_text(BAD_PATTERNS)
    paths = [str(ROOT), str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return "bad_patterns"


class TestPoints:
    def test_the_folder_depends_on_the_settings_alone(self, tmp_path: Path) -> None:
        one = point_of(tmp_path, ["window=3", "pattern=kmeans", "stage=score", "hydra/launcher=joblib"], ["window"])
        two = point_of(tmp_path, ["pattern=kmeans", "stage=evaluate", "hydra.launcher.n_jobs=2", "window=3"], [])
        assert one.folder == two.folder
        assert one.folder != point_of(tmp_path, ["window=5", "pattern=kmeans"], []).folder
        assert (one.name, two.name) == ("window=3", "pattern=kmeans window=3")

    def test_what_became_of_each(self, tmp_path: Path) -> None:
        todo = [Point(tmp_path, (f"seed={seed}",), ("seed",)) for seed in range(4)]
        assert sweep_points.count_finished(todo) == 0
        todo[0].note(DONE)
        todo[1].note(FAILED, "no such file", "Traceback …")
        todo[2].note(STARTED)
        assert sweep_points.count_finished(todo) == 2
        lines = sweep_points.report(todo)
        assert lines[0] == f"seed=1: no such file (traceback in {todo[1].folder / 'point.json'})"
        assert lines[1:3] == ["seed=2: is not finished: still running, or killed", "seed=3: was not started"]
        assert lines[3].startswith("3 of 4 points failed; the same command tries them again")
        sweep_points.mark_failed(todo)
        assert [point.status.state for point in todo] == [DONE, FAILED, FAILED, ""]
        assert sweep_points.not_done(tmp_path) == sorted(
            (f"{point.name} ({point.folder})" for point in todo[1:3]), key=lambda line: line.partition("(")[2]
        )
        todo[0].forget()
        todo[0].forget()
        assert todo[0].status == sweep_points.Status()
        assert sweep_points.report([]) == []

    @pytest.mark.parametrize("content", ["", "[]", '{"state": "done"}', "\0\1", '{"state": '])
    def test_an_unreadable_record_says_nothing(self, content: str, tmp_path: Path) -> None:
        point = Point(tmp_path, ("seed=1",))
        point.folder.mkdir(parents=True)
        (point.folder / sweep_points.RECORD).write_text(content)
        assert not point.status.finished


class TestLaunchers:
    def test_every_file_is_of_a_plugin_and_says_where_to_read(self) -> None:
        assert {path.stem for path in LAUNCHERS} == set(PLUGINS)
        for path in LAUNCHERS:
            assert OmegaConf.load(path)._target_.startswith("hydra_plugins.")
            assert "docs/how-to/cluster.md" in path.read_text().splitlines()[0]

    @pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
    def test_points_run_elsewhere_and_a_bad_one_is_named(self, launcher: str, tmp_path: Path) -> None:
        installed(launcher)
        sweep = ["stage=score", *GIVEN, f"run_dir={tmp_path}", "-m", "pattern=window", f"hydra/launcher={launcher}"]
        done = call(*sweep, "window=3,4")
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 2, done.stderr
        assert errors[0].startswith("error: window=4: a window must be an odd number")
        assert errors[1].startswith("error: 1 of 2 points failed; the same command tries them again")
        assert "Warning" not in done.stderr
        assert states(tmp_path) == {"window=3": DONE, "window=4": FAILED}
        assert set(tables.collect(tmp_path).window) == {3}
        if launcher == "joblib":  # the folder of a point does not depend on who runs it: nothing is done twice
            again = call(*sweep[:-1], "window=3,5")
            assert again.returncode == 0, again.stderr
            assert again.stderr.count("score: done and unchanged, skipped") == 1
            assert set(tables.collect(tmp_path).window) == {3, 5}

    def test_a_killed_process_does_not_lose_the_points_after_it(self, bad_patterns: str, tmp_path: Path) -> None:
        installed("joblib")
        good = "sparsefinder.patterns.window.Window"
        sweep = ["stage=score", *GIVEN, f"run_dir={tmp_path / 'run'}", "-m", "pattern=window"]
        targets = f"pattern._target_={bad_patterns}.Kills,{good}"
        done = call(*sweep, targets, "window=3,5", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("its process was killed, or one beside it") >= 1
        found = states(tmp_path / "run")
        assert len(found) == 4
        assert DONE in found.values()
        assert all(state == FAILED for name, state in found.items() if "Kills" in name)

    def test_slurm(self, tmp_path: Path) -> None:
        """No cluster here: a stand-in for `sbatch` runs the tasks of the array by the very script that it is handed."""
        installed("submitit_slurm")
        folder = stand_ins(tmp_path / "bin")
        sweep = ["stage=score", *GIVEN, f"run_dir={tmp_path / 'run'}", "-m", "pattern=window", "window=3,4"]
        slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=long", "hydra.launcher.mem_gb=8"]
        done = subprocess.run(
            command(*sweep, *slurm),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
            env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        )
        assert done.returncode == 2, done.stderr
        assert "error: window=4: a window must be an odd number" in done.stderr
        assert states(tmp_path / "run") == {"window=3": DONE, "window=4": FAILED}
        script = (folder / "submitted.sh").read_text()
        for line in ("--partition=long", "--mem=8GB", "--array=0-1%", "--cpus-per-task=4", "--time=240"):
            assert line in script

    def test_wrong_launchers_are_one_clear_line(self, runs: Nursery, tmp_path: Path) -> None:
        cases = {
            ("hydra/launcher=joblib",): "hydra/launcher=joblib is for sweeps: add -m",
            ("-m", "hydra/launcher=jobli"): "hydra/launcher=jobli is unknown; choose one of basic, joblib",
            ("-m", "hydra/launcher=joblib", "hydra.launcher.jobs=2"): "there is no setting hydra.launcher.jobs",
            ("-m", "stage=score,report"): "several stages are a list, stage=[score,evaluate]",
        }
        for arguments, message in cases.items():
            done = runs.run(*arguments, f"run_dir={tmp_path}")
            assert done.status == 2
            assert [line for line in done.stderr.splitlines() if message in line], done.stderr
            assert "Traceback" not in done.stderr

    def test_a_launcher_that_is_not_installed(self, tmp_path: Path) -> None:
        hide = (
            "import importlib.metadata as m, runpy, sys\n"
            "find = m.distribution\n"
            "def hidden(name):\n"
            "    if 'launcher' in name: raise m.PackageNotFoundError(name)\n"
            "    return find(name)\n"
            "m.distribution = hidden\n"
            f"sys.argv = ['run.py', '-m', 'hydra/launcher=submitit_slurm', 'run_dir={tmp_path}']\n"
            f"runpy.run_path({str(ROOT / 'scripts' / 'run.py')!r}, run_name='__main__')\n"
        )
        done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        expected = "error: hydra/launcher=submitit_slurm is not installed: pip install 'sparsefinder[launchers]'\n"
        assert done.stderr == expected


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(
    runs: Nursery, bad_patterns: str, tmp_path: Path
) -> None:
    targets = f"pattern._target_={bad_patterns}.Raises,sparsefinder.patterns.window.Window"
    done = runs.run("stage=score", *GIVEN, f"run_dir={tmp_path / 'run'}", "-m", "pattern=window", targets)
    assert done.status == 2
    assert f"error: pattern._target_={bad_patterns}.Raises: ZeroDivisionError: of an unlucky pattern" in done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads(
        next(p for p in (tmp_path / "run").rglob("point.json") if "unlucky" in p.read_text()).read_text()
    )
    assert "line 14, in __call__" in record["traceback"]
    assert sorted(states(tmp_path / "run").values()) == [DONE, FAILED]


def stand_ins(folder: Path) -> Path:
    """`sbatch`, `srun`, `sacct` and `scancel`: as much of them as submitit uses. Tasks begin at once."""
    folder.mkdir()
    scripts = {
        "sbatch": f"""
            import os, re, subprocess, sys
            script = open(sys.argv[-1]).read()
            open({str(folder / "submitted.sh")!r}, "w").write(script)
            first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
            for task in range(first, last + 1):
                slurm = {{"JOB_ID": str(100 + task), "ARRAY_JOB_ID": "99", "ARRAY_TASK_ID": str(task), "JOB_NUM_NODES": "1",
                          "NTASKS": "1", "NODEID": "0", "PROCID": "0", "LOCALID": "0", "JOB_NODELIST": "here"}}
                subprocess.Popen(["bash", sys.argv[-1]], env=os.environ | {{f"SLURM_{{k}}": v for k, v in slurm.items()}},
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            print("Submitted batch job 99")
            """,
        "srun": """
            import subprocess, sys
            task = sys.argv[sys.argv.index(sys.executable):]
            sys.exit(subprocess.run(task).returncode)
            """,
        "sacct": """
            print("JobID|State|NodeList")
            print("99_0|RUNNING|here")
            print("99_1|RUNNING|here")
            """,
        "scancel": "",
    }
    for name, text in scripts.items():
        lines = [line[12:] for line in text.splitlines()]
        (folder / name).write_text(f"#!{sys.executable}\n" + "\n".join(lines))
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IEXEC)
    return folder
