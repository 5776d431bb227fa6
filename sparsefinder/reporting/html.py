"""One file of HTML that needs nothing else: figures are inside it, and so are its style and the few lines that sort tables.

The markup is in ``templates/``: ``report.html`` is the document, ``parts.html`` what its sections are made of.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Markup", "code", "document", "facts", "figure", "folded", "note", "table", "warning"]

_ABSENT = {"–", "not reached", "not defined", "not measured"}  # values that are printed in grey


def document(title: str, lead: str, sections: Sequence[tuple[str, Markup]]) -> str:
    """The whole document.

    Args:
        title: Of the window, and the first heading.
        lead: What it is about, in small print.
        sections: Pairs of a heading and what the functions below made.
    """
    return _templates().get_template("report.html").render(title=title, lead=lead, sections=sections)


def note(text: str) -> Markup:
    """A paragraph of small print."""
    return _part("note", text)


def figure(svg: str, caption: str) -> Markup:
    """A picture inside the document. As an image, not as elements: the ids of two drawings never meet."""
    return _part("figure", base64.b64encode(svg.encode()).decode(), caption)


def table(frame: pd.DataFrame, words: Sequence[str]) -> Markup:
    """A table of texts.

    Args:
        frame: The table; values are printed by ``str``.
        words: Columns that are set to the left; the others are numbers, set to the right.
    """
    rows = [[str(value) for value in row] for row in frame.itertuples(index=False)]
    return _part("table", [str(name) for name in frame], rows, words, _ABSENT)


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
