"""One page of HTML that needs nothing else: figures are inside it, and no script, font or style comes from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence

import pandas as pd

_CSS = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
figure { margin: 0 0 1rem } figure img { max-width: 100%; height: auto; display: block; margin: 0 auto }
figcaption, .note { color: #444; font-size: .9rem; max-width: 54rem }
figcaption { margin: .4rem auto 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #888; padding: .25rem .45rem; vertical-align: bottom }
td { text-align: right; border-bottom: 1px solid #e3e3e3; padding: .22rem .45rem; white-space: nowrap }
th.words, td.words { text-align: left }
td.words { white-space: normal; min-width: 5rem } td.words:first-child { min-width: 13rem } td.none { color: #777 }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1.2rem; font-size: .95rem } dd { margin: 0 }
.warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem 1rem; font-size: .95rem }
.warning ul { margin: .2rem 0; padding-left: 1.2rem }
pre { font-size: .75rem; overflow-x: auto; background: #f6f6f6; padding: .6rem } summary { cursor: pointer; font-size: .9rem }
"""

_ABSENT = {"–", "not reached", "not defined", "not measured"}


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document: ``sections`` are pairs of a heading and HTML made by the functions below."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{note(lead)}\n{body}\n</body>\n</html>\n"
    )


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def figure(svg: str, caption: str) -> str:
    """A picture inside the page. As an image, not as elements: the ids of two drawings never meet."""
    data = base64.b64encode(svg.encode()).decode()
    words = html.escape(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/svg+xml;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def table(frame: pd.DataFrame, words: Sequence[str]) -> str:
    """A table of texts; the columns named by ``words`` are set to the left, the others as numbers to the right."""

    def cell(tag: str, column: str, text: str) -> str:
        kinds = (["words"] if column in words else []) + (["none"] if tag == "td" and text in _ABSENT else [])
        return f"<{tag}{_class(kinds)}>{html.escape(text)}</{tag}>"

    names = [str(name) for name in frame]
    head = "".join(cell("th", name, name) for name in names)
    rows = ["".join(map(cell, ["td"] * len(names), names, map(str, row))) for row in frame.itertuples(index=False)]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def facts(lines: Sequence[tuple[str, str]]) -> str:
    """Names and values, one below the other."""
    return f"<dl>{''.join(f'<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>' for name, value in lines)}</dl>"


def warning(lines: Sequence[str]) -> str:
    """A box that is hard to overlook."""
    return f'<div class="warning"><ul>{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul></div>'


def folded(title: str, content: Mapping[str, object]) -> str:
    """Settings, to be unfolded by who wants to read them."""
    text = html.escape(json.dumps(content, indent=1, ensure_ascii=False))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"


def _class(kinds: Sequence[str]) -> str:
    return f' class="{" ".join(kinds)}"' if kinds else ""
