"""The command sparsefinder-sparsify: a folder with its certificate, or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_index import sentences
from tiny_models import save_tiny, tiny_model

import sparsefinder
from scripts import sparsify as script
from sparsefinder.sparse_model import sparsifying


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a model without a head; times are invented, since those of a tiny model are noise."""
    monkeypatch.setattr(sparsifying, "_seconds", lambda *calls: [call() and 1.0 for call in calls])
    save_tiny(tmp_path / "base", tiny_model().base_model)
    (tmp_path / "texts.txt").write_text("\n".join(sentences(30)), encoding="utf-8")
    return [str(tmp_path / "base"), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "sparse")]


def test_a_folder_and_its_certificate(given: list[str], tmp_path: Path, capsys) -> None:
    assert script.main([*given, "--density", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "difference of the pooled output at 38 tokens" in printed
    certificate = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert certificate["passed"]
    lengths = [check["name"] for check in certificate["checks"] if check["name"].startswith("difference of the pooled")]
    assert [name.split()[-2] for name in lengths] == ["9", "19", "38"]
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "## Sparse attention" in card
    assert "## Conversion certificate" in card
    assert re.search(
        r"\| 38 \| [\d.e-]+ \| 1\.000 \| 1\.000 \|", card
    )  # difference, seconds, seconds of the dense model
    model = sparsefinder.load(tmp_path / "sparse")
    with torch.inference_mode():
        assert model(torch.ones(1, 5, dtype=torch.int64))[0].isfinite().all()


def test_a_failed_certificate_saves_nothing_unless_asked(given: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sparsifying, "CLOSEST", -1.0)
    assert script.main([*given, "--density", "0.2"]) == 2
    assert "failed its certificate: difference of the pooled output" in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()
    assert script.main([*given, "--even_if_it_fails"]) == 0
    assert "FAILED: difference" in capsys.readouterr().out
    assert not json.loads((tmp_path / "sparse" / "conversion.json").read_text())["passed"]
    assert script.main(given) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--length", "99"], "this model reads up to 38 tokens"),
        (["--pattern", "rooted"], "did you mean routed"),
        (["--density", "0.1", "--recall", "0.5"], "choose one"),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_input_is_one_line(change: list[str], message: str, given: list[str], tmp_path: Path, capsys) -> None:
    assert script.main([*given, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sparse").exists()
