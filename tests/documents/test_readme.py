"""What the README and the pages that it leads to show is true: code runs, patterns and attentions exist, paths are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from omegaconf import OmegaConf

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "how-to" / "command_line.md").read_text(encoding="utf-8")
CHOICES = (ROOT / "docs" / "reference" / "patterns.md").read_text(encoding="utf-8")


def test_it_can_be_read_in_a_minute() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_the_ten_lines_run() -> None:
    code = re.search(r"## Ten lines that run\n\n```python\n(.*?)```", COMMANDS, re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert "tensor([" in done.stdout


def test_every_choice_has_a_row() -> None:
    for group in ("pattern", "attention"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            if not OmegaConf.load(path).get("every"):
                assert re.search(rf"^\| `{path.stem}` \|", CHOICES, re.MULTILINE), f"{group} {path.stem} has no row"


def test_every_file_they_name_exists() -> None:
    for name in set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|md|ipynb|yaml))`", TEXT + CHOICES + COMMANDS)):
        assert (ROOT / name).exists() or (ROOT / "sparsefinder" / name).exists(), name


def test_ci_runs_its_test_command() -> None:
    assert "make test" in TEXT
    assert "make test" in (ROOT / ".ci" / "run").read_text()
