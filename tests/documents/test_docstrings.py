"""Every public name says what it is, and the sections of its docstring name what the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

FILES = sorted((ROOT / "sparsefinder").rglob("*.py"))
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Source")
# other spellings of the dialect's sections, which a documentation tool reads as prose or not at all
OTHER_SPELLINGS = re.compile(
    r"^(Arguments|Parameters|Params|Return|Raise|Sources|Reference|References)\s*:?\s*$", re.MULTILINE
)


def public(nodes: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Functions and classes that a reader is meant to use, methods and properties too, by their dotted names."""
    for node in nodes:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def documented(tree: ast.Module) -> Iterator[tuple[str, Documented, str]]:
    """All functions and classes with a docstring, whether they are public or not."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node.name, node, text


def section(text: str, name: str) -> list[str] | None:
    """The entries of a section, without the lines that go on below them; None where there is no such section."""
    match = re.search(rf"^{name}:\n((?:[ ]+.*\n|\n)*)", text + "\n", re.MULTILINE)
    if match is None:
        return None
    return [line.strip() for line in match[1].splitlines() if re.match(r" {4}\S", line)]


def parameters(node: Documented) -> list[str]:
    """What a function is called with, or a class is made with, in order and without stars."""
    if isinstance(node, ast.ClassDef):
        made = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}.get("__init__")
        if made is not None:
            return parameters(made)
        return [
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign)
            and isinstance(each.target, ast.Name)
            and "ClassVar" not in ast.unparse(each.annotation)
        ]
    of = node.args
    names = [each.arg for each in (*of.posonlyargs, *of.args)]
    names += [of.vararg.arg] if of.vararg else []
    names += [each.arg for each in of.kwonlyargs]
    names += [of.kwarg.arg] if of.kwarg else []
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def promised(trees: Iterable[ast.Module]) -> set[str]:
    """Methods that a protocol of the package documents: who keeps to it need not say the same again."""
    protocols = [
        each
        for tree in trees
        for each in tree.body
        if isinstance(each, ast.ClassDef) and "Protocol" in map(ast.unparse, each.bases)
    ]
    return {name for each in protocols for name, node in public(each.body) if ast.get_docstring(node)}


def undocumented(tree: ast.Module, promises: Collection[str] = ()) -> list[str]:
    """Public names without a docstring, but for methods with one of the names in ``promises``."""
    missing = [name for name, node in public(tree.body) if not ast.get_docstring(node)]
    return [name for name in missing if "." not in name or name.split(".")[-1] not in promises]


def misnamed(tree: ast.Module) -> list[str]:
    """Docstrings whose ``Args:`` are not the parameters, each as one line that tells both."""
    wrong = []
    for name, node, text in documented(tree):
        entries = section(text, "Args")
        if entries is None:
            continue
        named = [entry.split(":")[0].split(" (")[0].strip("`*") for entry in entries]
        if named != parameters(node):
            wrong.append(f"{name}: Args: {named}, parameters {parameters(node)}")
    return wrong


@pytest.fixture(scope="module")
def promises() -> set[str]:
    return promised(ast.parse(path.read_text(encoding="utf-8")) for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "sparsefinder").as_posix())
def test_a_module_says_what_it_has(path: Path, promises: set[str]) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), "a module without a docstring"
    assert undocumented(tree, promises) == []
    assert misnamed(tree) == []
    for name, _, text in documented(tree):
        assert not (other := OTHER_SPELLINGS.search(text)), (
            f"{name}: {other and other[0]}: sections are {', '.join(SECTIONS)}"
        )


def test_the_checks_can_fail() -> None:
    tree = ast.parse(
        '''
class Window:
    """A window.

    Args:
        width: Odd.
    """

    width: int
    dilation: int = 1

    def graph(self): ...

def band(tokens, *axes, window=3):
    """Pairs.

    Args:
        tokens: ``N``.
        *axes: More,
            on two lines.
        windows: Not its name.

    Returns:
        A graph.
    """

def _helper(x): ...
'''
    )
    assert undocumented(tree) == ["Window.graph"]
    assert undocumented(tree, ["graph"]) == []
    assert undocumented(tree, ["Window"]) == ["Window.graph"]
    assert [line.split(":")[0] for line in misnamed(tree)] == ["Window", "band"]
    assert "['tokens', 'axes', 'windows']" in misnamed(tree)[1]
