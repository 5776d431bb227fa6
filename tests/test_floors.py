"""Which module may import what: imports point down, and libraries stay where the design puts them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "sparsefinder"
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
INTERNALS = PACKAGE / "transformers_internals.py"
REMEMBERING = PACKAGE / "remembering.py"  # replaces members of transformers' classes
KNOWS_TRANSFORMERS = (
    *("corpora", "lsg", "conversions", "checkpoints", "models", "starts", "training", "tasks", "finetune"),
    INTERNALS.stem,
)
# of other libraries: names that a leading underscore marks as private, on objects that are not our own
PRIVATE = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "_auto_class",
    "_name_or_path",
    "_tied_weights_keys",
)
STAGES = ("finetune", "extract", "score", "evaluate", "report", "pipeline")


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    used = list(imports(path))
    inside = path.relative_to(PACKAGE).parts[0].removesuffix(".py") if PACKAGE in path.parents else "scripts"
    if inside != "scripts":
        assert not [module for module in used if module.split(".")[0] in ("hydra", "omegaconf")], "hydra is at the door"
        assert not [module for module in used if module.startswith("sparsefinder.scripts")]
    if inside not in KNOWS_TRANSFORMERS:
        assert not [module for module in used if module.split(".")[0] == "transformers"]


@pytest.mark.parametrize("path", [path for path in MODULES if path not in (INTERNALS, REMEMBERING)], ids=name)
def test_internals_of_transformers_are_in_one_module(path: Path) -> None:
    """Only what `transformers` itself exports is imported from it, and no private name of it is used."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("transformers.")]
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("transformers.")
        elif isinstance(node, ast.Attribute):
            assert node.attr not in PRIVATE, f"line {node.lineno}: .{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.match(r"transformers\.\w", node.value), f"line {node.lineno}: {node.value}"


def test_the_check_finds_what_it_looks_for() -> None:
    assert "transformers.masking_utils" in REMEMBERING.read_text()
    private = {node.attr for node in ast.walk(ast.parse(INTERNALS.read_text())) if isinstance(node, ast.Attribute)}
    assert private & set(PRIVATE) >= {"_attn_implementation", "_auto_class"}


@pytest.mark.parametrize("module", ["graphs", "transforms", "store", "metrics", "projections", "attention", "models"])
def test_nothing_below_the_stages_imports_one(module: str) -> None:
    met: set[Path] = set()
    waiting = [PACKAGE / f"{module}.py"]
    while waiting:
        met.add(path := waiting.pop())
        waiting += [below for target in imports(path) if (below := file_of(target)) and below not in met]
    assert not {path.stem for path in met if path.parent == PACKAGE} & set(STAGES)


def file_of(target: str) -> Path | None:
    """The file of this package that an import reads, such as ``sparsefinder.graphs.QK``; None for other packages."""
    parts = target.split(".")
    for end in range(len(parts), 1, -1):
        for path in (ROOT.joinpath(*parts[:end]).with_suffix(".py"), ROOT.joinpath(*parts[:end], "__init__.py")):
            if path.exists():
                return path
    return None
