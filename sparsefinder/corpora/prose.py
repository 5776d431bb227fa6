"""The prose inside Python documentation: what remains of a docstring without code, tables, formulas and markup."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

_SHORTEST = 30  # characters of a paragraph
_PLAIN = 0.91  # share of a paragraph's characters that are letters, spaces or ordinary punctuation

_FENCE = re.compile(r"\s*(```|~~~)")
_DOCTEST = re.compile(r"\s*(>>>|\.\.\. |In \[\d+\]|Out\[\d+\]|[$%] )")
_DIRECTIVE = re.compile(r"\s*\.\. *(?:([\w-]+)::|\S)")
_SPOKEN = {"note", "warning", "tip", "hint", "important", "caution", "attention", "deprecated", "versionadded"}
_SPOKEN |= {"versionchanged", "admonition", "topic", "rubric"}
_UNDERLINE = re.compile(r"\s*([-=~^*#_\"'`+.])\1{2,}\s*$")
_TABLE = re.compile(r"\s*([|+]|[-=]{3,} +[-=]{3,})")
_BULLET = re.compile(r"\s*(?:[-*+•]|\(?\d{1,2}[.)]) +")
_ARGUMENT = re.compile(r"\s*[-*]{0,3}`{0,2}\*{0,2}[\w.]+`{0,2}(?: ?\([^)]*\)[^:]{0,60})? ?: +(?=\S)")
_TYPED = re.compile(r"\s*[*\w][\w*.,` ]{0,60} : \S")  # `name : type` of numpydoc; the description follows, indented
_FIELD = re.compile(r"\s*[:@](?:param|arg|return|raise|type|rtype|key|ivar|var|cvar)s?\b[^:]*: *")

_MARKUP = (
    (re.compile(r"!?\[([^\]]{1,80})\]\((?:[^()]|\([^)]*\))*\)"), r"\1"),  # Markdown links
    (re.compile(r"`{1,2}([^`<]+?) *<[^>]*>`{1,2}__?"), r"\1"),  # RST links
    (re.compile(r":[\w:+-]+:`~?\.?([^`<]*?)(?: *<[^>]*>)?`"), lambda m: m[1].rsplit(".", 1)[-1]),  # RST roles
    (re.compile(r" ?\[[\d, ]+\]_?|\|[\w.-]+\||\[\w+\]_"), ""),  # footnotes and substitutions
    (re.compile(r"\[?(`{1,3})([^`]+?)\1\]?_{0,2}"), lambda m: m[2].lstrip("~").strip()),  # literals
    (re.compile(r"(?<!\w)(\*\*|\*|__)(?=\S)([^*]+?)(?<=\S)\1(?!\w)"), r"\2"),  # emphasis
    (re.compile(r"</?\w[^>]{0,60}>"), ""),  # HTML
    (re.compile(r"\s+"), " "),
)
_PROSE = re.compile(r"[A-Z\"'(].*[a-z)\"'][.!?:)\"']$", re.DOTALL)
_NOT_ENGLISH = re.compile(r"[^A-Za-z ,.;:'\"()!?-]")
_CODE = re.compile(r"\\|https?:|www\.|::|==|->|>>|[{}<>|$]|(?:^| )=|\w=\w")


def docstrings(source: str) -> Iterator[str]:
    """The documentation strings in the source of one module, in order.

    Docstrings of modules, classes and functions; the texts handed to functions that attach documentation
    (``add_docstr(torch.abs, r'...')``, ``add_newdoc(...)``); and the values of dictionaries of texts (``pydoc_data.topics``).
    The source is parsed, never executed. Raises what `ast.parse` raises.
    """
    pending: list[ast.stmt] = list(reversed(_with_docstring(ast.parse(source))))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Expr):
            yield from _attached(node.value)
        elif isinstance(node, ast.Assign):
            if isinstance(node.value, ast.Dict):
                yield from (text for value in node.value.values if (text := _string(value)) and len(text) > 200)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(reversed(_with_docstring(node)))
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            pending.extend(reversed([*node.body, *getattr(node, "orelse", [])]))


def _with_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """The statements that may hold more documentation: its docstring, and what is inside."""
    first = node.body[:1]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        inner: list[ast.stmt] = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.ClassDef))]
        return [*(child for child in first if isinstance(child, ast.Expr)), *inner]
    return node.body


def _attached(value: ast.expr) -> Iterator[str]:
    if (text := _string(value)) is not None:
        yield text
    elif isinstance(value, ast.Call) and "doc" in ast.unparse(value.func).lower():
        yield from (text for argument in value.args if (text := _string(argument)))


def _string(value: ast.expr) -> str | None:
    """A literal string, also with ``.format(…)`` applied to it (the holes stay, and cost their paragraph)."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "format":
        value = value.func.value
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of running English in one docstring, each on one line, without markup."""
    for lines in _blocks(inspect.cleandoc(docstring).splitlines()):
        text = " ".join(lines)
        if len(text) < _SHORTEST or " " not in text:
            continue
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if is_prose(text):
            yield text


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as English sentences rather than as code, names, or a formula."""
    return (
        len(text) >= _SHORTEST
        and _PROSE.match(text) is not None
        and _CODE.search(text) is None
        and len(_NOT_ENGLISH.findall(text)) <= (1.0 - _PLAIN) * len(text)
        and text.count(" ") * 9 >= len(text)  # a word of prose is not longer than nine letters on the average
    )


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Lines that belong together: by blank lines, indentation, bullets and names of arguments; code blocks left out."""
    block: list[str] = []
    indents: tuple[int, ...] = ()
    fenced = doctest = False
    literal: int | None = None  # inside a literal or unspoken directive: everything indented deeper than this
    for line in lines:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if _FENCE.match(line):
            fenced = not fenced
        if fenced or _FENCE.match(line) or not stripped:
            doctest = False
            yield block
            block = []
            continue
        doctest = doctest or _DOCTEST.match(line) is not None
        if literal is not None and indent <= literal:
            literal = None
        if literal is not None or doctest or _TABLE.match(line) or _TYPED.match(line):
            yield block
            block = []
            continue
        if _UNDERLINE.match(line):  # the line above is a heading
            yield block[:-1]
            block = []
            continue
        if directive := _DIRECTIVE.match(line):
            yield block
            block = []
            if directive[1] not in _SPOKEN:
                literal = indent
            continue
        start = _BULLET.match(line) or _FIELD.match(line) or (None if block else _ARGUMENT.match(line))
        if start is None and indent not in indents:
            start = _ARGUMENT.match(line)
        if start or (block and indent not in indents):
            yield block
            block = []
        if not block:
            # what continues a bullet or an argument may be indented by anything up to the text of its first line
            indents = tuple(range(indent + 1, indent + 9)) if start else (indent,)
        block.append(line[start.end() :] if start else stripped)
        if stripped.endswith("::"):
            block[-1] = block[-1].rstrip()[:-1]
            literal = indent
    yield block
