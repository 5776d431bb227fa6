"""The ``text`` corpus: anybody's files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsefinder.store import UserError

_ARTICLE = re.compile(r"^ ?= [^=].*[^=] = ?$", re.MULTILINE)  # a title of WikiText; sections have more signs


@dataclass(frozen=True)
class TextFiles:
    """Documents in plain UTF-8 files, one file a split.

    What a document is follows from the file: articles, where it has titles in WikiText's form (`` = Title = ``); otherwise
    paragraphs between blank lines, where there are any inside the file; otherwise lines.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None  # None: the validation file serves here too
    max_documents: int | None = None  # of each split; None for all
    max_characters: int | None = None  # of the training split, an eighth of it for each other split; None for all

    def __post_init__(self) -> None:
        if self.train is None or self.validation is None:
            raise UserError("corpus=text needs two files: give corpus.train=FILE and corpus.validation=FILE")
        for name in ("max_documents", "max_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"corpus.{name} must be a positive number or null, got {value}")
        given = [Path(file).resolve() for file in (self.train, self.validation, self.test) if file is not None]
        if len(set(given)) < len(given):
            raise UserError(f"corpus=text names {given[0]} for two splits: text held out must not be training text")

    def documents(self, split: str, cache: Path | None = None) -> Iterator[str]:
        """The documents of ``split``, in the order of the file. ``cache`` is not needed and not used."""
        limit = self.max_characters
        if limit is not None and split != "train":
            limit = max(1, limit // 8)
        characters = 0
        for index, document in enumerate(split_documents(_read(self._path(split), split))):
            if index == self.max_documents or (limit is not None and characters >= limit):
                return
            characters += len(document)
            yield document

    def fingerprint(self) -> str:
        """Changes with the bytes of the files and the limits."""
        digest = hashlib.sha256(f"{self.max_documents} {self.max_characters}".encode())
        for split, file in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if file is not None:
                digest.update(split.encode() + hashlib.sha256(_bytes(self._path(split), split)).digest())
        return digest.hexdigest()

    def _path(self, split: str) -> Path:
        files = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}
        if split not in files:
            raise UserError(f"there is no split {split}; choose one of {', '.join(files)}")
        return Path(str(files[split]))


def split_documents(text: str) -> Iterator[str]:
    """The documents of one file's text, stripped, none of them empty."""
    titles = [match.start() for match in _ARTICLE.finditer(text)]
    if titles:
        starts = sorted({0, *titles})
        parts = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
    elif re.search(r"\S[^\S\n]*\n\s*\n\s*\S", text):
        parts = re.split(r"\n[^\S\n]*\n\s*", text)
    else:
        parts = text.splitlines()
    for part in parts:
        lines = [line.strip() for line in part.splitlines()]
        if document := "\n".join(line for line in lines if line):
            yield document


def _read(path: Path, split: str) -> str:
    try:
        text = _bytes(path, split).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"corpus.{split}={path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise UserError(f"corpus.{split}={path} is empty; give a file with text")
    return text


def _bytes(path: Path, split: str) -> bytes:
    if not path.is_file():
        raise UserError(f"corpus.{split}={path}: there is no such file; give a file of plain text")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"corpus.{split}={path} cannot be read: {error.strerror}") from error
