"""The ``wikitext103`` corpus: WikiText-103-raw (Merity et al. 2016), through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefinder.corpora.documents import split_documents
from sparsefinder.corpora.files import check_limits, limited
from sparsefinder.corpora.loading import load_split
from sparsefinder.corpora.packing import check_pack

_REPOSITORY, _NAME = "Salesforce/wikitext", "wikitext-103-raw-v1"


@dataclass(frozen=True)
class WikiText103:
    """Articles of the English Wikipedia: 28,475 to train on, 60 and 60 held out. Downloaded once (about 190 MB)."""

    max_documents: int | None = None  # of each split; None for all
    max_characters: int | None = None  # of the training split, an eighth of it for each other split; None for all
    pack: bool | str = False  # several documents in a block: false, true or apart, see `token_blocks`

    def __post_init__(self) -> None:
        check_limits(self.max_documents, self.max_characters)
        check_pack(self.pack)

    def documents(self, split: str, cache: Path | str | None = None) -> Iterator[str]:
        """The articles of ``split``. ``cache`` is not used: ``datasets`` keeps its own."""
        yield from limited(_articles(split), split, self.max_documents, self.max_characters)

    def fingerprint(self) -> str:
        """The data set is frozen; only the limits can change."""
        return f"{_REPOSITORY}/{_NAME}/{self.max_documents}/{self.max_characters}"


def _articles(split: str) -> Iterator[str]:
    lines: list[str] = []
    for row in _load(split):
        line = row["text"]
        if line.startswith(" = ") and not line.startswith(" = =") and lines:
            yield from split_documents("".join(lines))
            lines = []
        lines.append(line)
    yield from split_documents("".join(lines))


def _load(split: str) -> Any:
    return load_split("corpus=wikitext103", _REPOSITORY, _NAME, split)
