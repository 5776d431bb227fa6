"""A class for every word: a name or none, a part of speech. A word is known by its first token.

Without labelled data: **how a word is written**. The words of a passage of any corpus are read in lower case, and the model
tells which was ``lower``, ``Capital``, ``UPPER`` or ``miXed``; a word without letters is not asked for. What begins a sentence,
and which words are names, is in the neighbouring words.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefinder.corpora import Corpus
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError
from sparsefinder.evaluation.tasks.data import Row, as_class, classes_of
from sparsefinder.evaluation.tasks.judges import Classes, Judge
from sparsefinder.evaluation.tasks.labelled import Feature, Reader
from sparsefinder.evaluation.tasks.passages import of_split, spread

_MOST = (5000, 1000)  # passages to learn from, and held out


@dataclass(frozen=True)
class TokenClassification:
    """A class for every word."""

    name: str = "token_classification"
    head: str = "AutoModelForTokenClassification"
    roles: tuple[str, ...] = ("tokens", "tags")
    made_split: str | None = None

    def made(self, corpus: Corpus, split: str, cache: Path) -> tuple[list[Row], list[Row]]:
        """As `LabelledTask`: words without their capital letters."""
        training, held_out = (
            [_row(passage.split()) for passage in spread(list(of_split(corpus, part, cache)), most)]
            for part, most in zip(("train", split), _MOST, strict=True)
        )
        return training, held_out

    def classes(self, training: Sequence[Row], held_out: Sequence[Row]) -> tuple[str, ...]:
        """As `LabelledTask`: a tag of -100 is none."""
        return classes_of(_tags(training), _tags(held_out), f"evaluate.task={self.name}")

    def encode(self, row: Row, read: Reader) -> Feature | None:
        """As `LabelledTask`: words beyond the model's length are not asked for."""
        words, tags = row["tokens"], row["tags"]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise UserError(
                f"evaluate.task={self.name}: a row needs a list of words and a list of as many tags, got "
                f"{words!r:.60} and {tags!r:.60}; name their columns with evaluate.labels.tokens= and evaluate.labels.tags="
            )
        starts = [0]  # of the words in the text; by offsets, because not every tokenizer takes words
        for word in words:
            starts.append(starts[-1] + len(word) + 1)
        tokens = read(" ".join(words), return_offsets_mapping=True)
        labels = [IGNORED] * len(tokens["input_ids"])
        met = -1
        for index, (begin, end) in enumerate(tokens["offset_mapping"]):
            word = bisect.bisect_right(starts, end - 1) - 1  # by its last character: the first may be the space before
            if end > begin and word > met:
                met = word
                labels[index] = (
                    IGNORED if tags[word] == IGNORED else read.classes.index(as_class(tags[word], self.name))
                )
        if all(label == IGNORED for label in labels):
            return None
        return Feature(tokens["input_ids"], {"labels": labels}, tokens.get("token_type_ids"))

    def judge(self, features: Sequence[Feature]) -> Judge:
        """As `LabelledTask`."""
        return Classes("words")


def _row(words: Sequence[str]) -> Row:
    return {"tokens": [word.lower() for word in words], "tags": [written(word) for word in words]}


def _tags(rows: Sequence[Row]) -> Iterator[Any]:
    return (tag for row in rows for tag in row["tags"] if tag != IGNORED)


def written(word: str) -> str | int:
    """How a word is written: lower, Capital, UPPER (two letters or more), miXed; `IGNORED` for one without letters."""
    letters = "".join(filter(str.isalpha, word))
    if not letters:
        return IGNORED
    if letters == letters.lower():
        return "lower"
    if letters[1:] == letters[1:].lower():
        return "Capital"
    return "UPPER" if letters == letters.upper() else "miXed"
