"""Every notebook runs from start to end on a run directory as the stages leave it, and is stored with what it showed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from small_runs import make_evaluated, make_scored

from sparsefinder import lowrank
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.patterns.window import Window
from tests.conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and below it one point of a sweep."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    store = make_evaluated(make_scored(folder))
    lowrank.run(lowrank.RouteSettings(rank=4, n_clusters=6), store)
    for name in ("lowrank", "key_centroids"):
        store.finish(name, "route", {}, {"qk": store.content("qk")}, 0)
    make_scored(folder / "sweep" / "window=5", (Configuration("window", Window(3), window=5),))
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFINDER_RUN", str(run_dir))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6
    assert any("sweep/window=5" in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_what_it_showed(path: Path) -> None:
    """Of one run from start to end, without faults, and without a word about the machine."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 6
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/tmp/|/root/|/Users/", text)
    assert len(text) < 1_500_000


def test_readme_has_a_line_for_each_notebook() -> None:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    for path in NOTEBOOKS:
        assert [line for line in lines if line.startswith(f"| [{path.name}]({path.name}) |")]
