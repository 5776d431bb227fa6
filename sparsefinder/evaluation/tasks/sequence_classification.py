"""A class for every text, or pair of texts: the topic of a review, or whether one sentence follows from another.

Without labelled data: **which package a passage comes from**, of the ``docstrings`` corpus. All its splits are taken, since a
package must be on both sides; every fifth document of a package is held out. The model has read the text of the corpus's training
part while it was finetuned, but never which package it is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefinder.corpora import Corpus, Docstrings
from sparsefinder.errors import UserError
from sparsefinder.evaluation.tasks.data import Row, as_class, classes_of
from sparsefinder.evaluation.tasks.judges import Classes, Judge
from sparsefinder.evaluation.tasks.labelled import Feature, Reader
from sparsefinder.evaluation.tasks.passages import sides, spread

_MOST = (200, 50)  # passages of one package to learn from, and held out: a few packages are most of the corpus


@dataclass(frozen=True)
class SequenceClassification:
    """A class for every text."""

    name: str = "sequence_classification"
    head: str = "AutoModelForSequenceClassification"
    roles: tuple[str, ...] = ("text", "text_pair", "label")
    made_split: str | None = "held-out"  # documents of every split

    def made(self, corpus: Corpus, split: str, cache: Path) -> tuple[list[Row], list[Row]]:
        """As `LabelledTask`: passages by their package."""
        if not isinstance(corpus, Docstrings):
            raise UserError(
                f"evaluate.task={self.name} needs labels: give evaluate.labels.path=DATASET and the names of its columns, or "
                "corpus=docstrings, whose passages are distinguished by their package"
            )
        documents: dict[str, list[str]] = {}
        for part in ("train", "validation", "test"):
            for package, document in corpus.by_package(part, cache):
                documents.setdefault(package, []).append(document)
        parts: tuple[list[Row], list[Row]] = ([], [])
        for package, own in documents.items():
            both = sides(own)
            if all(both):  # a package of one document cannot be on both sides
                for rows, part_of, most in zip(parts, both, _MOST, strict=True):
                    rows.extend({"text": text, "label": package} for text in spread(part_of, most))
        return parts

    def classes(self, training: Sequence[Row], held_out: Sequence[Row]) -> tuple[str, ...]:
        """As `LabelledTask`."""
        return classes_of(_labels(training), _labels(held_out), f"evaluate.task={self.name}")

    def encode(self, row: Row, read: Reader) -> Feature | None:
        """As `LabelledTask`: a text that is too long is cut."""
        texts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
        tokens = read(*texts)
        label = read.classes.index(as_class(row["label"], self.name))
        return Feature(tokens["input_ids"], {"labels": label}, tokens.get("token_type_ids"))

    def judge(self, features: Sequence[Feature]) -> Judge:
        """As `LabelledTask`."""
        return Classes("examples")


def _labels(rows: Sequence[Row]) -> list[Any]:
    return [row["label"] for row in rows]
