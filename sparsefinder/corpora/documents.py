"""What a document is in a plain text: an article under its title, a paragraph, a line, or the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

UNITS = ("title", "blank_line", "line", "file")

# with its end. str.splitlines would also cut at U+2028, U+0085, form feeds and the like, which stand inside lines of text
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")

_ARTICLE = re.compile(r" ?= ([^=].*[^=]|[^=\s]) = ?$")  # a title of WikiText; sections have more signs
_FULL = range(40, 101)  # characters of a line that an editor or a typist broke because it was full
_SENTENCE_ENDS = tuple(".!?:;…。！？\"'”’»)*")
_FEW = 20  # lines that go on in the next one, below which a text says nothing about how it was broken
_PART = 1_000_000  # characters after which a file that is one document goes on as another, at a line's end


def split_documents(text: str) -> Iterator[str]:
    """The documents of a text, stripped, none of them empty; what they are follows from the text (`unit_of`)."""
    lines = LINE.findall(text)
    return documents_of(lines, unit_of(lines))


def documents_of(lines: Iterable[str], unit: str) -> Iterator[str]:
    """The documents of a text, stripped, none of them empty.

    Args:
        lines: Of the text.
        unit: What a document is, one of `UNITS`. title, from one title in WikiText's form (`` = Title = ``) to the next;
            blank_line, what stands between blank lines; line, every line; file, all of it, in parts of about a million
            characters where it is longer, because a tokenizer takes some thousand bytes for each word of what it reads at
            once.
    """
    cuts = _CUTS[unit]
    part: list[str] = []
    size = 0
    for line in lines:
        text = line.strip()
        if part and cuts(line, text, size):
            yield "\n".join(part)
            part, size = [], 0
        if text:
            part.append(text)
            size += len(text)
    if part:
        yield "\n".join(part)


def unit_of(lines: Iterable[str]) -> str:
    """What a document seems to be in a text: the unit for which corpus.documents=auto takes it.

    A text with titles has articles. Lines that were broken where they were full, in the midst of sentences, belong to
    running prose (a book): the file is one document. Otherwise blank lines inside the text part documents, and where there
    are none every line is one.
    """
    begun = gap = paragraphs = False
    inner = broken = 0
    last = ""
    for line in lines:
        if is_title(line):
            return "title"
        text = line.strip()
        if text and last:
            inner += 1
            broken += len(last) in _FULL and not last.endswith(_SENTENCE_ENDS)
        if text:
            paragraphs = paragraphs or (begun and gap)
            begun, gap = True, False
        else:
            gap = True
        last = text
    if inner >= _FEW and 2 * broken > inner:
        return "file"
    return "blank_line" if paragraphs else "line"


def is_title(line: str) -> bool:
    """Whether a line is an article's title in WikiText's form."""
    return _ARTICLE.match(line.rstrip("\r\n")) is not None


_CUTS: dict[
    str, Callable[[str, str, int], bool]
] = {  # does a new document begin at this line, its text, after that much?
    "title": lambda line, text, size: is_title(line),
    "blank_line": lambda line, text, size: not text,
    "line": lambda line, text, size: True,
    "file": lambda line, text, size: size >= _PART,
}
