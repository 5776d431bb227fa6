"""One file of HTML that needs nothing else: figures are inside it, and so are its style and the few lines that sort tables.

The markup is in ``templates/``: ``report.html`` is the document, ``parts.html`` what its sections are made of.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Markup", "answer", "code", "document", "facts", "figure", "folded", "frontier", "note", "table", "warning"]

_NUMBER = re.compile(r"[+-]?\d[\d.]*")
# rows of tables that set bounds, by how their name begins: dense attention, true scores, chance
_BOUNDS = (
    r"(bucketed |masked |auto )?(oracle|random|full)|dense|softmax|no attention|.*\(the true scores\)|.*full$|.* \*"
)
_ABSENT = {"–", "not reached", "not defined", "not measured"}  # values that are printed in grey


def document(title: str, lead: str, sections: Sequence[tuple[str, Markup]]) -> str:
    """The whole document.

    Args:
        title: Of the window, and the first heading.
        lead: What it is about, in small print.
        sections: Pairs of a heading and what the functions below made.
    """
    anchors = [
        re.sub(r"\W+", "-", heading.lower()).strip("-") for heading, _ in sections
    ]  # to be linked to from elsewhere
    named = [(anchor, *section) for anchor, section in zip(anchors, sections, strict=True)]
    return _templates().get_template("report.html").render(title=title, lead=lead, sections=named)


def note(text: str) -> Markup:
    """A paragraph of small print."""
    return _part("note", text)


def answer(said: Mapping[str, str]) -> Markup:
    """What a reader came for: questions, a sentence for each, commands in it between backticks."""
    return _part("answer", said.items())


def frontier(data: Mapping[str, Any], svg: str, caption: str) -> Markup:
    """The frontier to hover, filter and switch; the picture stands in its place where scripts are off.

    Args:
        data: `interactive.frontier_data`.
        svg: The same as a drawing.
        caption: For both.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # no end of a script in it
    macros: Any = _templates().get_template("frontier.html").module
    return Markup(macros.frontier(Markup(text), base64.b64encode(svg.encode()).decode(), caption))


def figure(svg: str, caption: str) -> Markup:
    """A picture inside the document. As an image, not as elements: the ids of two drawings never meet."""
    return _part("figure", base64.b64encode(svg.encode()).decode(), caption)


def table(frame: pd.DataFrame, words: Sequence[str], best: Mapping[str, str] | None = None) -> Markup:
    """A table of texts.

    Args:
        frame: The table; values are printed by ``str``.
        words: Columns that are set to the left; the others are numbers, set to the right.
        best: Columns of which the best value is marked, ``max`` or ``min``; a number is what a text begins with. Rows whose
            first column is in ``_BOUNDS`` are not competing.
    """
    rows = [[str(value) for value in row] for row in frame.itertuples(index=False)]
    marked = _best(rows, [str(name) for name in frame], best or {})
    return _part("table", [str(name) for name in frame], rows, words, _ABSENT, marked)


def _best(rows: Sequence[Sequence[str]], names: Sequence[str], best: Mapping[str, str]) -> list[list[int]]:
    """For each row the columns in which it has the best value."""
    marked: list[list[int]] = [[] for _ in rows]
    competing = [place for place, row in enumerate(rows) if not re.match(_BOUNDS, row[0])]
    for column, name in enumerate(names):
        if name not in best:
            continue
        numbers = {place: float(found[0]) for place in competing if (found := _NUMBER.match(rows[place][column]))}
        if len(numbers) > 1:
            top = max(numbers.values()) if best[name] == "max" else min(numbers.values())
            for place, number in numbers.items():
                if number == top:
                    marked[place].append(column)
    return marked


def facts(lines: Sequence[tuple[str, str]]) -> Markup:
    """Names and values, one below the other."""
    return _part("facts", lines)


def warning(lines: Sequence[str]) -> Markup:
    """A box that is hard to overlook."""
    return _part("warning", lines)


def folded(title: str, content: Mapping[str, object]) -> Markup:
    """Settings, to be unfolded by who wants to read them."""
    return _part("folded", title, json.dumps(content, indent=1, ensure_ascii=False))


def code(text: str) -> Markup:
    """Lines to be copied."""
    return _part("code", text)


@cache
def _templates() -> Environment:
    """Whatever is put into a template is escaped, but what another one made."""
    return Environment(
        loader=PackageLoader("sparsefinder.reporting"),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )


def _part(name: str, *values: Any) -> Markup:
    macros: Any = _templates().get_template("parts.html").module
    return Markup(getattr(macros, name)(*values))
