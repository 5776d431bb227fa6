"""docs/how-to/adding_a_pattern.md, followed to the letter in a copy of the repository: files are written, commands run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "how-to" / "adding_a_pattern.md").read_text(encoding="utf-8")
# language, text, and what stands before it on the page; a fence of four marks holds blocks of three
FENCE = re.compile(r"^(`{3,4})(\w+)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
BLOCKS = [(found[2], found[3], PAGE[: found.start()]) for found in FENCE.finditer(PAGE)]
COPIED = ("conf", "docs", "scripts", "sparsefinder", "tests", "README.md", "pyproject.toml")


def test_the_page_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "repository"
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "test_cli.py"))
        else:
            shutil.copy(ROOT / name, copy / name)
    monkeypatch.setenv("PYTHONPATH", str(copy))
    ran = 0
    for kind, text, before in BLOCKS:
        if kind == "bash":
            for line in text.splitlines():
                run(line, copy)
                ran += 1
        elif text.startswith("| "):
            page = copy / "docs" / "reference" / "patterns.md"
            choices = page.read_text(encoding="utf-8")
            row = next(line for line in choices.splitlines() if line.startswith("| `window` |"))
            page.write_text(choices.replace(row, f"{row}\n{text.strip()}"), encoding="utf-8")
        elif text.startswith("def "):
            replace_call(copy / "sparsefinder" / "patterns" / "powers.py", text)
        elif "check_pattern" in text:
            (copy / "check.py").write_text(text, encoding="utf-8")
            run("python check.py", copy)
        else:
            named = re.findall(r"`((?:sparsefinder|conf|docs|tests)/[\w/]+\.(?:py|yaml|md))`", before)
            (copy / named[-1]).write_text(text, encoding="utf-8")
    assert ran == 6
    table = pd.read_csv(copy / "powers.csv")
    assert set(table.pattern) == {"powers"}
    swept = table[table.point.notna()].groupby("point").recall.mean()
    assert list(swept.index) == ["pattern.steps=1", "pattern.steps=3", "pattern.steps=7"]
    assert swept.is_monotonic_increasing


def run(line: str, cwd: Path) -> None:
    arguments = shlex.split(line)
    assert arguments[0] == "python"
    done = subprocess.run(
        [sys.executable, *arguments[1:]], cwd=cwd, env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    if "pytest" in arguments:
        assert re.search(r"\d+ passed", done.stdout)
        assert not re.search(r"failed|error", done.stdout)


def replace_call(path: Path, text: str) -> None:
    """The last step of the page: another `__call__`, and its import."""
    code = path.read_text(encoding="utf-8")
    code = code[: code.index("    def __call__")] + textwrap.indent(text, "    ")
    path.write_text(code.replace("import QK\n", "import QK, Buckets, Layout\n"), encoding="utf-8")
