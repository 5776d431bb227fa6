"""Every pattern has a page, and what the page shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT
from tests.pages import PAGES, page, sketches, table
from tests.patterns.test_patterns import FILES, settings


def without(node: Any, key: str) -> Any:
    """A copy of a configuration without one of its keys, its interpolations intact."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    copy.pop(key, None)
    return copy


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@each_file
def test_there_is_a_page(path: Path) -> None:
    text = page(path).read_text(encoding="utf-8")
    assert text.startswith(f"# {path.stem}\n")
    assert f"python scripts/run.py stage=score pattern={path.stem}" in text
    pattern = settings(path)[0]
    module = type(pattern).__module__.replace(".", "/")
    assert f"`{module}.py`" in text
    parameter = f"`{pattern.sparsity_parameter}`" if pattern.sparsity_parameter else "none"
    assert f"**Sparsity parameter:** {parameter}" in text


@each_file
def test_sketches_are_what_the_code_draws(path: Path) -> None:
    found = sketches(path, page(path).read_text(encoding="utf-8"))
    assert found
    for shown, drawn in found:
        assert shown == drawn, f"python -m tests.pages draws\n{drawn}"


@each_file
def test_settings_are_those_of_the_file(path: Path) -> None:
    pattern = settings(path)[0]
    names = [name for name in OmegaConf.load(path) if name not in ("_target_", "sweep")]
    shown = table(page(path).read_text(encoding="utf-8"))
    assert shown == {name: str(getattr(pattern, name)).lower() for name in names}


@each_file
def test_its_commands_can_be_typed(path: Path) -> None:
    lines = re.findall(r"^python scripts/run.py (.*?)(?: +#.*)?$", page(path).read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for line in lines:
            cfg = hydra.compose("config", overrides=line.split())
            chosen = without(cfg.pattern, "sweep")
            hydra.utils.instantiate(OmegaConf.merge(without(cfg, "pattern"), {"pattern": chosen}).pattern)


def test_no_page_without_a_pattern() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {path.stem for path in FILES}


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_files_that_a_page_names_exist(path: Path) -> None:
    for name in set(re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|md|yaml))`", path.read_text(encoding="utf-8"))):
        assert (ROOT / name).exists(), name
