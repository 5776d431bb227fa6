"""Passages of a corpus to make tasks from: a few lines of one document, and whole documents held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sparsefinder.corpora import Corpus

T = TypeVar("T")

LENGTH = 400  # characters up to which lines are joined; a longer line is a passage of its own
_HELD_OUT = 5  # every fifth document of a source is held out


def sides(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """Passages to learn from and passages held out, of different documents."""
    training: list[str] = []
    held_out: list[str] = []
    for index, document in enumerate(documents):
        (held_out if index % _HELD_OUT == _HELD_OUT - 1 else training).extend(passages(document))
    return training, held_out


def passages(document: str) -> Iterator[str]:
    """The lines of a document joined by spaces, up to `LENGTH` characters each."""
    part = ""
    for line in filter(None, map(str.strip, document.split("\n"))):
        if part and len(part) + 1 + len(line) > LENGTH:
            yield part
            part = line
        else:
            part = f"{part} {line}".strip()
    if part:
        yield part


def of_split(corpus: Corpus, split: str, cache: Path) -> Iterator[str]:
    """The passages of a split of any corpus."""
    for document in corpus.documents(split, cache):
        yield from passages(document)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, at equal distances: of a corpus not its beginning, but something from everywhere."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]
