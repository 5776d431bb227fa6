"""The ``wikitext103`` corpus: WikiText-103-raw (Merity et al. 2016), through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefinder.corpora.files import split_documents
from sparsefinder.corpora.loading import load_split
from sparsefinder.store import UserError

_REPOSITORY, _NAME = "Salesforce/wikitext", "wikitext-103-raw-v1"


@dataclass(frozen=True)
class WikiText103:
    """Articles of the English Wikipedia: 28,475 to train on, 60 and 60 held out. Downloaded once (about 190 MB)."""

    max_documents: int | None = None  # of each split; None for all

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"corpus.max_documents must be a positive number or null, got {self.max_documents}")

    def documents(self, split: str, cache: Path | None = None) -> Iterator[str]:
        """The articles of ``split``. ``cache`` is not used: ``datasets`` keeps its own."""
        lines: list[str] = []
        count = 0
        for row in _load(split):
            line = row["text"]
            if line.startswith(" = ") and not line.startswith(" = =") and lines:
                for document in split_documents("".join(lines)):
                    if count == self.max_documents:
                        return
                    count += 1
                    yield document
                lines = []
            lines.append(line)
        if count != self.max_documents:
            yield from split_documents("".join(lines))

    def fingerprint(self) -> str:
        """The data set is frozen; only the limit can change."""
        return f"{_REPOSITORY}/{_NAME}/{self.max_documents}"


def _load(split: str) -> Any:
    return load_split("corpus=wikitext103", _REPOSITORY, _NAME, split)
