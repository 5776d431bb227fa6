"""The ``text`` corpus: anybody's files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sparsefinder.store import UserError

_ARTICLE = re.compile(r" ?= ([^=].*[^=]|[^=\s]) = ?$")  # a title of WikiText; sections have more signs

# with its end. str.splitlines would also cut at U+2028, U+0085, form feeds and the like, which stand inside lines of text
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")


@dataclass(frozen=True)
class TextFiles:
    """Documents in plain UTF-8 files, one file a split.

    What a document is follows from the file: articles, where it has titles in WikiText's form (`` = Title = ``); otherwise
    paragraphs between blank lines, where there are any inside the file; otherwise lines. The file is read line by line, twice.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None  # None: the validation file serves here too
    max_documents: int | None = None  # of each split; None for all
    max_characters: int | None = None  # of the training split, an eighth of it for each other split; None for all

    def __post_init__(self) -> None:
        if self.train is None or self.validation is None:
            raise UserError("corpus=text needs two files: give corpus.train=FILE and corpus.validation=FILE")
        check_limits(self.max_documents, self.max_characters)
        given = [Path(file).resolve() for file in (self.train, self.validation, self.test) if file is not None]
        if len(set(given)) < len(given):
            raise UserError(f"corpus=text names {given[0]} for two splits: text held out must not be training text")

    def documents(self, split: str, cache: Path | None = None) -> Iterator[str]:
        """The documents of ``split``, in the order of the file. ``cache`` is not needed and not used."""
        yield from limited(
            documents_of(lambda: _lines(self._path(split), split)), split, self.max_documents, self.max_characters
        )

    def fingerprint(self) -> str:
        """Changes with the bytes of the files and the limits."""
        digest = hashlib.sha256(f"{self.max_documents} {self.max_characters}".encode())
        for split, file in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if file is not None:
                digest.update(split.encode() + digest_of(self._path(split), split))
        return digest.hexdigest()

    def _path(self, split: str) -> Path:
        files = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}
        if split not in files:
            raise UserError(f"there is no split {split}; choose one of {', '.join(files)}")
        return Path(str(files[split]))


def check_limits(max_documents: int | None, max_characters: int | None) -> None:
    """Raise a `UserError` for limits that `limited` cannot keep."""
    for name, value in (("max_documents", max_documents), ("max_characters", max_characters)):
        if value is not None and value < 1:
            raise UserError(f"corpus.{name} must be a positive number or null, got {value}")


def limited(
    documents: Iterator[str], split: str, max_documents: int | None, max_characters: int | None
) -> Iterator[str]:
    """The first documents of a split: so many, or until so many characters; an eighth of these where it is held out."""
    if max_characters is not None and split != "train":
        max_characters = max(1, max_characters // 8)
    characters, count = 0, 0
    while count != max_documents and (max_characters is None or characters < max_characters):
        document = next(documents, None)
        if document is None:
            return
        count, characters = count + 1, characters + len(document)
        yield document


def split_documents(text: str) -> Iterator[str]:
    """The documents of a text, stripped, none of them empty."""
    return documents_of(lambda: _LINE.findall(text))


def documents_of(lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    """As `split_documents`, of a text that is read line by line: once to see what it is, and once more for its documents."""
    has_title, has_paragraphs = _kind(lines())
    begins = _is_title if has_title else None if has_paragraphs else _always
    part: list[str] = []
    for line in lines():
        blank = not line.strip()
        if part and (begins(line) if begins else blank):
            yield from _documents(part, one_each=begins is _always)
            part = []
        part.append(line)
    yield from _documents(part, one_each=begins is _always)


def _kind(lines: Iterable[str]) -> tuple[bool, bool]:
    """Whether a text has titles, and whether it has a blank line between two others."""
    begun = gap = paragraphs = False
    for line in lines:
        if _is_title(line):
            return True, paragraphs
        if line.strip():
            paragraphs = paragraphs or (begun and gap)
            begun, gap = True, False
        else:
            gap = True
    return False, paragraphs


def _is_title(line: str) -> bool:
    return _ARTICLE.match(line.rstrip("\r\n")) is not None


def _always(_: str) -> bool:
    return True


def _documents(part: list[str], one_each: bool) -> Iterator[str]:
    found = [stripped for line in part if (stripped := line.strip())]
    if one_each:
        yield from found
    elif found:
        yield "\n".join(found)


def _lines(path: Path, split: str) -> Iterator[str]:
    place, empty = 0, True
    with _opened(path, split) as file:
        for data in file:
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {place + error.start}"
                raise UserError(f"corpus.{split}={path} is not UTF-8 text ({where})") from error
            if not place:
                line = line.removeprefix("\ufeff")  # a byte order mark is no text
            place += len(data)
            empty = empty and not line.strip()
            yield from _LINE.findall(line)
    if empty:
        raise UserError(f"corpus.{split}={path} is empty; give a file with text")


def digest_of(path: Path, split: str) -> bytes:
    """A hash of the file that ``corpus.<split>`` names; a `UserError` where there is none."""
    digest = hashlib.sha256()
    with _opened(path, split) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _opened(path: Path, split: str) -> BinaryIO:
    if not path.is_file():
        raise UserError(f"corpus.{split}={path}: there is no such file; give a file of plain text")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"corpus.{split}={path} cannot be read: {error.strerror}") from error
