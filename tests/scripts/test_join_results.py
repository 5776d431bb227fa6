"""A result is made from a run, checked, and shown; what cannot be shown says why in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import make_evaluated, make_scored

from scripts import join_results
from sparsefinder import report
from sparsefinder.report import ReportSettings
from sparsefinder.reporting import submitted
from tests.conftest import ROOT

GIVEN = ("--title", "A model, a corpus", "--command", "make run", "--machine", "two cores")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = make_evaluated(make_scored(tmp_path_factory.mktemp("runs") / "run"))
    report.run(ReportSettings(dpi=30), store)
    return store.run_dir


def test_a_result_is_added_and_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Page\n\n{join_results.BEGIN}old{join_results.END}\nafter\n")
    where = ("--results", str(tmp_path / "results"), "--page", str(page))
    assert join_results.main([*where, "--add", str(run), "--name", "mine-1", *GIVEN, "--note", "A note."]) == 0
    folder = tmp_path / "results" / "mine-1"
    assert {path.name for path in folder.iterdir()} == {
        "configuration.json",
        "environment.json",
        "recall.csv",
        "model.csv",
    }
    text = page.read_text()
    assert "old" not in text
    assert text.endswith(f"{join_results.END}\nafter\n")
    assert "| A model, a corpus | 5% |" in text
    assert "A note." in text
    before = text
    assert join_results.main([*where]) == 0
    assert page.read_text() == before, "the same results make the same page"
    assert join_results.main([*where, "--add", str(run), "--name", "mine-1", *GIVEN]) == 2
    assert "is there already" in capsys.readouterr().err
    assert join_results.main([*where, "--add", str(run), "--name", "other"]) == 2
    assert "--add needs --title, --command, --machine" in capsys.readouterr().err
    assert join_results.main([*where, "--add", str(run), "--name", "mine-2", *GIVEN]) == 2
    assert "error: mine-2: is mine-1 once more, of the same tables" in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--add", "RUN", "--name", "My Result", *GIVEN], "small letters, digits and dashes"),
        (["--add", "RUN", "--name", "../mine", *GIVEN], "small letters, digits and dashes"),
        (["--add", "nowhere", "--name", "mine", *GIVEN], "nowhere has no score or no report"),
        (["--add", "RUN", "--name", "mine", "--check", *GIVEN], "leave out one of the two"),
        (["--results", "nowhere"], "there is no folder nowhere"),
        (["--page", "nowhere.md"], "nowhere.md cannot be read"),
        (["--page", "page.md"], "page.md has no place for the results"),
    ],
)
def test_wrong_input_is_one_line_and_makes_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("# Page\n")
    page = tmp_path / "good.md"
    page.write_text(f"{join_results.BEGIN}{join_results.END}")
    common = [] if "--results" in arguments else ["--results", "results"]
    common += [] if "--page" in arguments else ["--page", str(page)]
    (tmp_path / "results").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert join_results.main([*common, *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("environment.json", '"command": "make run"', '"command": ""', "environment.json lacks command"),
        ("environment.json", '"two cores"', '"/home/me/machine"', "names a path of your machine: /home/me/machine"),
        ("environment.json", "{", "", "environment.json cannot be read"),
        ("recall.csv", "recall_low", "lowest", "recall.csv lacks the columns recall_low"),
        ("recall.csv", ",1.0,", ",1.5,", "must be a share between 0 and 1"),
        ("recall.csv", ",1.0,", ",all,", "must be a share between 0 and 1"),
        ("recall.csv", "False", "perhaps", "quadratic must be True or False"),
        ("recall.csv", "\nwindow,", "\n,", "pattern is missing in a row"),
        ("model.csv", "\ndense full,4.0", "\ndense full,low", "loss must be a number"),
        ("environment.json", '"torch": "', '"torch": "version ', "is no version, which begins with a number"),
        ("environment.json", '"torch"', '"tensors"', "versions must name sparsefinder and torch"),
        ("environment.json", '"date": "2', '"date": "the 2', "date must be written as 2026-11-29"),
        ("environment.json", '"score"', '"scores"', "content must name the table of score"),
    ],
)
def test_what_cannot_be_shown(run: Path, tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    folder = tmp_path / "mine"
    submitted.taken_from(run, folder, "A", "make run", "two cores")
    assert submitted.faults(folder) == []
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    (fault,) = submitted.faults(folder)
    assert fault.startswith("mine: ")
    assert said in fault


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("environment.json", b"[1]", "must be names with values"),
        ("environment.json", b"\xff\xfe", "environment.json cannot be read"),
        ("recall.csv", b"", "recall.csv cannot be read"),
        ("recall.csv", b"\xff\xfe", "recall.csv cannot be read"),
        ("recall.csv", ",".join(submitted.OF_RECALL).encode(), "recall.csv has no rows"),
    ],
)
def test_files_that_are_none(run: Path, tmp_path: Path, file: str, content: bytes, said: str) -> None:
    submitted.taken_from(run, tmp_path / "mine", "A", "make run", "two cores")
    (tmp_path / "mine" / file).write_bytes(content)
    (fault,) = submitted.faults(tmp_path / "mine")
    assert said in fault


def test_a_row_twice(run: Path, tmp_path: Path) -> None:
    submitted.taken_from(run, tmp_path / "mine", "A", "make run", "two cores")
    rows = (tmp_path / "mine" / "recall.csv").read_text().splitlines()
    (tmp_path / "mine" / "recall.csv").write_text("\n".join([*rows, rows[1]]))
    (fault,) = submitted.faults(tmp_path / "mine")
    assert "has two rows of one density" in fault


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "My result").mkdir()
    name, files = submitted.faults(tmp_path / "My result")
    assert "small letters" in name
    assert "recall.csv missing" in files


def test_what_is_here_can_be_shown_and_is() -> None:
    folders = sorted(path for path in (ROOT / "results").iterdir() if path.is_dir())
    assert folders
    assert [fault for folder in folders for fault in submitted.faults(folder)] == []
    text = (ROOT / "docs" / "reference" / "results.md").read_text(encoding="utf-8")
    assert f"{join_results.BEGIN}\n{submitted.page(folders)}\n{join_results.END}" in text
    for folder in folders:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        assert {*submitted.NEEDED} <= {*environment}
