"""What `mkdocs.yml` leaves to be listed: the pages of a folder, and a page for each module, filled from its docstrings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
API = "reference/api/"


def modules() -> list[str]:
    """Full names of the public modules, packages before what is in them."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sparsefinder").rglob("*.py")]
    names = [path.parent if path.name == "__init__" else path for path in paths]
    return sorted(".".join(name.parts) for name in names if not any(part.startswith("_") for part in name.parts))


def expanded(nav: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``nav`` with a list of pages where it names a folder, which ends in a slash."""
    found = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = expanded(target)
        elif target == API:
            target = [{name.removeprefix("sparsefinder."): f"{API}{name}.md"} for name in modules()]
        elif target.endswith("/"):
            target = [{path.stem: f"{target}{path.name}"} for path in sorted((ROOT / "docs" / target).glob("*.md"))]
        found.append({title: target})
    return found


def on_config(config: Any) -> Any:
    """Called by mkdocs when it has read its settings."""
    config.nav = expanded(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has listed its files."""
    from mkdocs.structure.files import File  # no part of the environment of the tests, which read `expanded`

    for name in modules():
        files.append(File.generated(config, f"{API}{name}.md", content=f"::: {name}\n"))
    return files
