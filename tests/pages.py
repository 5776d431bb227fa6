"""The pages of docs/patterns: sketches that the code draws, and tables of settings that are those of the YAML files.

``python -m tests.pages`` draws every sketch again, where a pattern was changed on purpose.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sparsefinder.testing import random_qk
from sparsefinder.testing.by_name import HEADS, SIZE, built
from tests.conftest import ROOT
from tests.patterns.test_patterns import FILES, settings

PAGES = ROOT / "docs" / "patterns"
TOKENS = 12
# <!-- sketch: block=4, causal=true --> and then a code block: settings of the pattern, of Configuration, and causal
_SKETCH = re.compile(r"(<!-- sketch:(.*?)-->\n```text\n)(.*?)(\n```)", re.DOTALL)
_AROUND = ("block_size",)


def page(path: Path) -> Path:
    """The page of a file of conf/pattern."""
    return PAGES / f"{path.stem}.md"


def sketches(path: Path, text: str) -> list[tuple[str, str]]:
    """What the page of a file shows, and what the code draws, sketch by sketch."""
    return [(found[3], sketch(path, found[2])) for found in _SKETCH.finditer(text)]


def redrawn(path: Path, text: str) -> str:
    """The page with its sketches as the code draws them."""
    return _SKETCH.sub(lambda found: found[1] + sketch(path, found[2]) + found[4], text)


def sketch(path: Path, changes: str) -> str:
    """Head 0 of layer 0 for twelve tokens: a line for each query, ``#`` for a key that it attends to."""
    given = yaml.safe_load("{" + changes.replace("=", ": ") + "}")
    causal = given.pop("causal", False)
    around = {name: given.pop(name) for name in _AROUND if name in given}
    pattern: Any = replace(settings(path)[0], **given)
    graph = built(pattern, **around)(random_qk([TOKENS], HEADS, SIZE, causal), 0)[0, 0]
    return "\n".join(" ".join("#" if edge else "." for edge in row) for row in graph.tolist())


def table(text: str) -> dict[str, str]:
    """The defaults in a page's table of settings: rows ``| `name` | default | meaning |``."""
    return dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.MULTILINE))


if __name__ == "__main__":
    for file in FILES:
        page(file).write_text(redrawn(file, page(file).read_text(encoding="utf-8")), encoding="utf-8")
