"""Which room may import which, followed through every import; and what libraries a room may know.

A room is a module of the package's top level, or a folder with one promise (docs/explanation/layout.md says which).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "sparsefinder"
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])

# from the ground up: a room may import those above it in this list that it names, and no others
FLOORS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "numerics": ("errors",),
    "graphs": ("numerics", "errors"),
    "storage": ("errors", "graphs", "numerics"),
    "executors/workload": (),
    "executors/choose_executor": ("executors/workload", "errors"),
    "executors/fastest_by_length": ("storage",),
    "executors/blocks": ("executors/workload", "graphs", "numerics", "errors"),
    "executors/native": ("executors/workload", "storage", "graphs", "numerics", "errors"),
    "executors/local_sparse_global": ("graphs", "numerics", "errors"),
    "executors/triton": ("executors/workload", "executors/blocks", "graphs", "numerics", "errors"),
    "executors/support_lists": (
        *(
            "executors/choose_executor",
            "executors/workload",
            "executors/blocks",
            "executors/native",
            "graphs",
            "numerics",
        ),
    ),
    "metrics": ("executors/support_lists", "graphs", "numerics", "errors"),
    "attention": ("executors", "numerics", "graphs", "errors"),
    "auto_attention": ("attention", "executors", "numerics", "graphs", "errors"),
    "predictors": ("storage", "executors", "numerics", "graphs", "metrics", "errors"),
    "patterns": ("graphs", "numerics", "predictors", "executors", "storage", "errors"),
    "experiment": ("patterns", "predictors", "metrics", "storage", "graphs", "numerics", "errors"),
    "corpora": ("storage", "numerics", "errors"),
    "models": ("corpora", "storage", "numerics", "graphs", "executors", "attention", "errors"),
    "conversions": ("models", "executors/local_sparse_global", "storage", "numerics", "errors"),
    "lsg": ("conversions", "models", "executors/local_sparse_global", "storage", "numerics", "graphs", "errors"),
    "analysis": ("metrics", "storage", "errors"),
    "evaluation/tasks": ("corpora", "models", "storage", "numerics", "errors"),
    "evaluation": (
        *(
            "evaluation/tasks",
            "experiment",
            "models",
            "conversions",
            "predictors",
            "patterns",
            "auto_attention",
            "attention",
        ),
        *("corpora", "metrics", "executors/fastest_by_length", "storage", "numerics", "graphs", "errors"),
    ),
    "sparse_model": (
        *(
            "quantization",
            "online_centroids",
            "bilinear",
            "models",
            "experiment",
            "predictors",
            "patterns",
            "attention",
            "auto_attention",
        ),
        *("conversions", "corpora", "executors", "metrics", "storage", "numerics", "graphs", "errors"),
    ),
    "reporting": ("analysis", "storage", "errors"),
    "testing": ("experiment", "predictors", "attention", "metrics", "numerics", "graphs", "errors"),
    "commandline": ("pipeline", "report", "evaluation", "experiment", "storage", "errors"),
}
STAGES = (
    *("finetune", "extract", "quantization", "kmeans_centroids", "online_centroids", "lowrank", "bilinear"),
    *("calibrate", "score", "evaluate", "compare", "export", "report"),
)
ABOVE_STAGES = ("commandline", "sparse_model")  # rooms that may call what a stage calls
# who may know the library
TRANSFORMERS = ("corpora", "models", "lsg", "conversions", "evaluation/tasks", "sparse_model", "finetune")
INTERNALS = PACKAGE / "models" / "transformers_internals.py"
ENTMAX_CONFIGURATION = PACKAGE / "models" / "entmax_configuration.py"  # replaces members of transformers' classes
# of other libraries: names that a leading underscore marks as private, on objects that are not our own
PRIVATE = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "_auto_class",
    "_name_or_path",
    "_tied_weights_keys",
)


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(target: str) -> Path | None:
    """The file of this package that an import reads, such as ``sparsefinder.graphs.QK``; None for other packages."""
    parts = target.split(".")
    for end in range(len(parts), 1, -1):
        for path in (ROOT.joinpath(*parts[:end]).with_suffix(".py"), ROOT.joinpath(*parts[:end], "__init__.py")):
            if path.exists():
                return path
    return None


def room(path: Path) -> str:
    """The room that a module is in."""
    if PACKAGE not in path.parents:
        return "scripts"
    inside = path.relative_to(PACKAGE).with_suffix("").as_posix()
    known = [name for name in FLOORS if inside == name or inside.startswith(f"{name}/")]
    return max(known, key=len) if known else inside.split("/")[0]


def arrows(path: Path) -> set[str]:
    """The rooms that a module imports from."""
    return {room(found) for target in imports(path) if (found := file_of(target))} - {room(path)}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_down(path: Path) -> None:
    here, used = room(path), arrows(path)
    if here in FLOORS:
        wrong = {each for each in used if each not in FLOORS[here] and each.split("/")[0] not in FLOORS[here]}
        assert not wrong, f"{here} may not import {wrong}"
    elif here in STAGES:
        assert not used & {*STAGES, "pipeline", "commandline", "scripts"}, "stages know of no other stage"
    elif here == "pipeline":
        assert used <= {"storage", "errors"}, "stages are imported by name when they are run"


def test_floors_are_in_order() -> None:
    """Whoever is named is above: no circle, however long."""
    met: set[str] = set()
    for here, allowed in FLOORS.items():
        below = {each.split("/")[0] for each in met} | ({*STAGES, "pipeline"} if here in ABOVE_STAGES else set())
        assert {each.split("/")[0] for each in allowed} <= below | {here.split("/")[0]}, here
        met.add(here)


def test_every_room_is_known() -> None:
    rooms = {room(path) for path in MODULES} - {"scripts", "__init__", "executors", "pipeline", *STAGES}
    assert rooms == set(FLOORS) - {"executors"}


def test_the_top_level_is_small_and_no_module_is_long() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 20
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES)
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] < 130


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    used = {module.split(".")[0] for module in imports(path)}
    if room(path) not in ("scripts", "commandline"):
        assert not used & {"hydra", "omegaconf"}, "hydra is at the door"
    if room(path) not in TRANSFORMERS:
        assert "transformers" not in used


LIGHT = (
    "sparsefinder",
    "sparsefinder.attention",
    "sparsefinder.metrics",
    "sparsefinder.score",
    "sparsefinder.predictors.projections",
    *(f"sparsefinder.patterns.{path.stem}" for path in sorted((PACKAGE / "patterns").glob("*.py"))),
)


def test_bare_tensors_load_neither_transformers_nor_hydra() -> None:
    """Followed by running it: whatever these import, and whatever that imports."""
    code = f"import sys\nfor name in {LIGHT}: __import__(name)\nprint([n for n in ('transformers', 'hydra') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


UNIX = ("fcntl", "resource", "pwd", "grp", "termios")  # of the standard library, not on Windows


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_that_windows_lacks_is_imported(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & {*UNIX}


@pytest.mark.parametrize("path", [path for path in MODULES if path not in (INTERNALS, ENTMAX_CONFIGURATION)], ids=name)
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
    assert "transformers.masking_utils" in ENTMAX_CONFIGURATION.read_text()
    private = {node.attr for node in ast.walk(ast.parse(INTERNALS.read_text())) if isinstance(node, ast.Attribute)}
    assert private & set(PRIVATE) >= {"_attn_implementation", "_auto_class"}
