"""The ``text`` corpus: anybody's files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsefinder.corpora.documents import UNITS, documents_of, unit_of
from sparsefinder.corpora.overlap import Overlap, check_contents
from sparsefinder.corpora.packing import check_pack
from sparsefinder.corpora.reading import digest_of, files_named, lines_of
from sparsefinder.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_WORDS = {
    "title": "articles, each from a title to the next",
    "blank_line": "what stands between blank lines",
    "line": "lines",
    "file": "whole files",
}


@dataclass(frozen=True, init=False)
class TextFiles:
    """Documents in plain UTF-8 files, compressed by gzip or not: for each split a file, a folder, a pattern such as
    ``texts/*.txt``, or a list of these.

    What a document is, is said by ``documents``: one of `UNITS`, or auto, which looks at the training text and says in the log
    what it took. Several files are a document each, unless they have titles; a single one is looked at by `unit_of`.
    Files are read line by line.
    """

    train: str | tuple[str, ...] | None  # the last is refused, by a line that says what to give
    validation: str | tuple[str, ...] | None
    test: str | tuple[str, ...] | None  # None: the validation files serve here too
    max_documents: int | None  # of each split; None for all
    max_characters: int | None  # of the training split, an eighth of it for each other split; None for all
    unit: str  # what a document is: auto or one of UNITS; the setting `documents`, whose name here is the method's
    pack: bool | str  # several documents in a block: false, true or apart, see `token_blocks`

    def __init__(
        self,
        train: str | Sequence[str] | None = None,
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        max_documents: int | None = None,
        max_characters: int | None = None,
        documents: str = "auto",
        pack: bool | str = False,
    ):
        if train is None or validation is None:
            raise UserError(
                "corpus=text needs text to train on and text that is held out: give corpus.train=FILE and "
                "corpus.validation=FILE (or a folder, or a pattern such as texts/*.txt)"
            )
        check_limits(max_documents, max_characters)
        check_pack(pack)
        if documents not in ("auto", *UNITS):
            raise UserError(f"corpus.documents={documents} is unknown; choose one of auto, {', '.join(UNITS)}")
        values = {
            "train": _named(train),
            "validation": _named(validation),
            "test": None if test is None else _named(test),
            "max_documents": max_documents,
            "max_characters": max_characters,
            "unit": documents,
            "pack": pack,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        met: set[Path] = set()
        for split in SPLITS:
            files = {file.resolve() for file in self._own_files(split)}
            if twice := met & files:
                raise UserError(
                    f"corpus=text names {min(twice)} for two splits: text held out must not be training text"
                )
            met |= files

    def documents(self, split: str, cache: Path | str | None = None) -> Iterator[str]:
        """The documents of ``split``, in the order of the files. ``cache`` is not needed and not used.

        In the end of held-out text, a `UserError` where the training documents are the same, a warning where some are.
        """
        if split == "train":
            yield from self._some(split)
            return
        overlap = Overlap(f"corpus.{split}")
        yield from overlap.reading(self._some(split))
        if overlap.check(self._some("train", quiet=True)):
            raise UserError(
                f"corpus.train and corpus.{split} have the same documents: text held out must not be training text"
            )

    def _some(self, split: str, quiet: bool = False) -> Iterator[str]:
        return limited(self._all(split, quiet), split, self.max_documents, self.max_characters)

    def _all(self, split: str, quiet: bool) -> Iterator[str]:
        files = self._files(split)
        unit = self._unit()
        if self.unit == "auto" and not quiet:
            log.info("corpus: %s: documents are %s (corpus.documents=%s, by auto)", split, _WORDS[unit], unit)
        empty = True
        for file in files:
            for document in documents_of(lines_of(file, split), unit):
                empty = False
                yield document
        if empty:
            several = f" ({len(files)} files)" if len(files) > 1 else ""
            raise UserError(f"corpus.{split}={self._given(split)} is empty{several}; give a file with text")

    def _unit(self) -> str:
        """What a document is in every split, so that held-out text is cut as the training text is: `auto` looks at that."""
        if self.unit != "auto":
            return self.unit
        files = self._files("train")
        units = (unit_of(lines_of(file, "train")) for file in files)
        if len(files) == 1:
            return next(units)
        return "title" if "title" in units else "file"

    def fingerprint(self) -> str:
        """Changes with the text of the files, which are documents, and the limits.

        Raises a `UserError` where the same text is given for training and held out.
        """
        digest = hashlib.sha256(f"{self.max_documents} {self.max_characters} {self.unit}".encode())
        training: dict[str, bytes] = {}
        held_out: dict[str, bytes] = {}
        for split in SPLITS:
            for file in self._own_files(split):
                content = digest_of(file, split)
                digest.update(split.encode() + content)
                (training if split == "train" else held_out)[f"corpus.{split}={file}"] = content
        check_contents(training, held_out)
        return digest.hexdigest()

    def _own_files(self, split: str) -> list[Path]:
        return [] if getattr(self, split) is None else self._files(split)

    def _files(self, split: str) -> list[Path]:
        return files_named(self._given(split), split)

    def _given(self, split: str) -> str | tuple[str, ...]:
        if split not in SPLITS:
            raise UserError(f"there is no split {split}; choose one of {', '.join(SPLITS)}")
        given: str | tuple[str, ...] = getattr(self, "validation" if split == "test" and self.test is None else split)
        return given


def _named(given: str | Sequence[str]) -> str | tuple[str, ...]:
    """A path or several, as plain text."""
    return str(given) if isinstance(given, (str, Path)) else tuple(map(str, given))


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
