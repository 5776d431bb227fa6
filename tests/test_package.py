"""The package as it is installed: everything is in the wheel, and its commands work from any folder."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import sparsefinder
from tests.conftest import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HEAVY = ("torch", "transformers", "sklearn", "pandas", "hydra", "matplotlib", "datasets")
GRAPH = ROOT / "tests" / "data" / "graph"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a folder `build` behind and would pack what lies in it."""
    folder = tmp_path_factory.mktemp("wheel")
    parts = ["sparsefinder", "scripts", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / "source" / part)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(folder / "source"))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment that has the wheel, and everything else from the environment of this test."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin"


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def call(*arguments: str | Path, cwd: Path) -> str:
    """What a command prints, without this repository on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    kinds = (
        "sparsefinder/**/*.py",
        "sparsefinder/**/*.[ch]pp",
        "sparsefinder/**/*.html",
        "scripts/*.py",
        "conf/**/*.yaml",
    )
    files = [path.relative_to(ROOT) for kind in kinds for path in ROOT.glob(kind)]
    there = {str(f) if f.parts[0] == "sparsefinder" else str(Path("sparsefinder") / f) for f in files}
    assert packed == there | {"sparsefinder/py.typed"}


def test_the_commands_work_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = call(installed / "python", "-c", "import sparsefinder; print(sparsefinder.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where
    assert "stage=all" in call(installed / "sparsefinder", "--help", cwd=tmp_path)
    assert "nsamples: 50" in call(installed / "sparsefinder", "--cfg", "job", cwd=tmp_path)
    assert "--model_kwargs" in call(installed / "sparsefinder-convert", "--help", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    qk = GRAPH / "golden_enc-attn.pt"
    given = [f"qk={qk}", f"qk_validation={qk}", "pattern=window", "run_dir=here"]
    call(installed / "sparsefinder", "-m", "stage=score", *given, "window=3,5", cwd=tmp_path)
    assert "rows of 2 runs" in call(installed / "sparsefinder-collect", "here", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"here", "collected.csv", "collected.parquet"}


def test_a_launcher_finds_the_installed_package(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install '.[launchers]'")
    qk = GRAPH / "golden_enc-attn.pt"
    given = [f"qk={qk}", f"qk_validation={qk}", "pattern=window", "run_dir=here", "hydra/launcher=joblib"]
    call(installed / "sparsefinder", "-m", "stage=score", *given, "window=3,5", cwd=tmp_path)
    states = [json.loads(path.read_text())["state"] for path in tmp_path.rglob("point.json")]
    assert states == ["done", "done"]


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        (
            "sparsefinder, sparsefinder.storage.store, sparsefinder.storage.sweep_points, sparsefinder.experiment.instantiate",
            (),
        ),
        (
            "sparsefinder.pipeline, sparsefinder.attention, sparsefinder.metrics, sparsefinder.patterns.window",
            ("torch",),
        ),
        ("sparsefinder.score", ("torch", "pandas", "sklearn")),
    ],
)
def test_imports_are_light(modules: str, allowed: tuple[str, ...]) -> None:
    """`import sparsefinder` takes nothing with it; the science takes torch, and no model library."""
    code = f"import sys, {modules}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(allowed)


def test_what_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = declared["project"]
    assert project["version"] == sparsefinder.__version__
    versions = [name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3." in name]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert project["requires-python"] == ">=3.10"
    assert declared["tool"]["ruff"]["target-version"] == "py310"
    assert declared["tool"]["mypy"]["python_version"] == "3.10"
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text().split()
    assert licence[:2] == [project["license"], "License"]
