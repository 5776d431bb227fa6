"""The documentation: every page is in the navigation of `mkdocs.yml`, every module has a page, and every link leads somewhere."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

DOCS = ROOT / "docs"
SITE = runpy.run_path(str(DOCS / "site.py"))
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.md")])


def targets(nav: list[dict[str, Any]]) -> Iterator[str]:
    for entry in nav:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from targets(target)


def test_every_page_is_in_the_navigation_once() -> None:
    shown = sorted(target for target in targets(SITE["expanded"](NAV)) if not target.startswith(SITE["API"]))
    assert shown == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert "patterns/kmeans.md" in shown


def test_every_module_has_a_page() -> None:
    shown = [target for target in targets(SITE["expanded"](NAV)) if target.startswith(SITE["API"])]
    names = [target.removeprefix(SITE["API"]).removesuffix(".md") for target in shown]
    assert names == SITE["modules"]()
    for name in names:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
    files = [path for path in (ROOT / "sparsefinder").rglob("*.py") if path.name != "__main__.py"]  # a command
    assert len(names) == len(files)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = re.sub(
        r"`[^`]*`", lambda span: "" if "](" in span[0] else span[0], text
    )  # in pairs: links stand between two of them
    for link in re.findall(r"\]\(([^)\s]+)\)", spans):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{path.name}: {link}"
        assert DOCS not in path.parents or DOCS in page.parents, f"{path.name}: {link} is no part of the site"
        assert not anchor or anchor in anchors(page), f"{path.name}: {link}"


def public(
    node: ast.Module | ast.ClassDef, name: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """A module or class and what it shows: classes, functions and methods whose names have no leading underscore."""
    yield name, node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and not inner.name.startswith("_"):
            if isinstance(inner, ast.ClassDef):
                yield from public(inner, f"{name}.{inner.name}")
            else:
                yield f"{name}.{inner.name}", inner


def test_every_public_name_is_documented() -> None:
    silent = []
    for path in [*(ROOT / "sparsefinder").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        names = public(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix())
        silent += [name for name, node in names if not (ast.get_docstring(node) or "").strip()]
    assert not silent, "the page of a module would say nothing about these"
