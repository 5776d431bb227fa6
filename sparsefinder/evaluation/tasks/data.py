"""Labelled examples of anybody: rows of a data set that the library ``datasets`` reads, by the names of their columns."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsefinder.corpora import AnyDataset, Corpus
from sparsefinder.corpora.loading import load_split
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError
from sparsefinder.storage import hub

log = logging.getLogger(__name__)

Row = dict[str, Any]  # the role of a column in the task → its value


@dataclass(frozen=True)
class LabelledData:
    """A data set with labels, and which of its columns hold what; without ``path`` that of ``corpus=datasets``, if any."""

    path: str | None = None  # a name on the hub such as glue, a folder, or a reader of files: json, csv, parquet
    name: str | None = None  # configuration of the data set, such as sst2
    revision: str | None = None  # commit or tag on the hub; None for the newest
    data_files: Mapping[str, str | Sequence[str]] | None = None  # split → file or list of them, for readers of files
    train: str = "train"  # names of the splits there: learned from, and
    test: str = "test"  # measured on
    streaming: bool = False
    max_examples: int | None = None  # read of each split; None for all
    text: str = "text"  # columns: of sequence_classification
    text_pair: str | None = None  # a second text, such as a hypothesis
    label: str = "label"
    tokens: str = "tokens"  # of token_classification: words, and
    tags: str = "tags"  # a label for each
    question: str = "question"  # of question_answering
    context: str = "context"
    answers: str = "answers"  # {text: [...], answer_start: [...]}, as in SQuAD

    def __post_init__(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"evaluate.labels.max_examples must be 1 or more, or null, got {self.max_examples}")
        if self.path is None and self.data_files is not None:
            raise UserError("evaluate.labels.data_files needs a reader: evaluate.labels.path=json (csv, parquet)")
        if shared := self._source(self.path or "the corpus", "").shared_rows(self.test):
            raise UserError(
                f"evaluate.labels takes train={self.train} and test={self.test} from the same rows of {shared}: name two splits "
                "that share none; what is measured must not have been learned"
            )

    def of(self, corpus: Corpus) -> LabelledData:
        """The rows of ``corpus=datasets`` where no ``path`` is given; with none at all, `path` stays None."""
        if self.path is not None or not isinstance(corpus, AnyDataset):
            return self
        where = {name: getattr(corpus, name) for name in ("path", "name", "revision", "data_files", "streaming")}
        most = self.max_examples or corpus.max_documents
        test = corpus.test or corpus.validation
        return replace(self, **where, train=corpus.train, test=test, text=corpus.column, max_examples=most)

    def fingerprint(self) -> str:
        """Changes with the settings and the bytes of local files; empty where there is no data set."""
        if self.path is None:
            return ""
        files = self._source(self.path, self.test).fingerprint()
        return hashlib.sha256(json.dumps([files, asdict(self)], default=str).encode()).hexdigest()

    def _source(self, path: str, held_out: str) -> AnyDataset:
        """Where the rows are, which knows what its splits share and whether its files changed."""
        known = {name: getattr(self, name) for name in ("name", "revision", "data_files", "train")}
        return AnyDataset(path, **known, validation=held_out, streaming=False)

    def rows(self, split: str, roles: Mapping[str, str]) -> list[Row]:
        """The rows of ``split`` (the setting: train or test), their columns by ``roles`` (role → the setting that names it).

        Rows in which one is missing (null or empty) are left out and counted in the log. A `UserError` where a column, a split
        or the whole data set is not there, or no row is left.
        """
        name = getattr(self, split)
        label = f"evaluate.labels.{split}={name} of {self.path}"
        options: dict[str, Any] = {"streaming": self.streaming, "revision": self.revision}
        if self.data_files is not None:
            options["data_files"] = dict(self.data_files)
        loaded = load_split(label, str(self.path), self.name, name, bool(self.data_files), **options)
        columns = {role: getattr(self, setting) for role, setting in roles.items()}
        names = {role: class_names((loaded.features or {}).get(column)) for role, column in columns.items()}
        kept: list[Row] = []
        count = 0
        for row in _read(itertools.islice(loaded, self.max_examples), label):
            count += 1
            for role, column in columns.items():
                if column not in row:
                    raise UserError(
                        f"{label} has no column {column}: choose one of {', '.join(row)} with "
                        f"evaluate.labels.{roles[role]}=COLUMN"
                    )
            values = {role: row[column] for role, column in columns.items()}
            if not any(empty(value) for value in values.values()):
                kept.append({role: named(value, names[role], label) for role, value in values.items()})
        if count > len(kept):
            log.warning(
                "%s: %s of %s rows have no %s and are left out",
                *(label, f"{count - len(kept):,}", f"{count:,}", " or no ".join(columns.values())),
            )
        if not kept:
            raise UserError(f"{label} has no row with {' and '.join(columns.values())}: choose another split or column")
        return kept


def _read(rows: Iterable[Row], label: str) -> Iterator[Row]:
    try:
        yield from rows
    except Exception as error:  # a stream that breaks, a file that its reader does not understand: no common type
        raise hub.refusal(label, error, " cannot be read on") from error


def empty(value: Any) -> bool:
    """Whether a value of a row says nothing: null, no text, an empty list, or answers without any (SQuAD 2.0)."""
    if isinstance(value, Mapping):
        return not value or all(empty(each) for each in value.values())
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, tuple)) and (not value or None in value))


def class_names(feature: Any) -> list[str] | None:
    """The names of a column's numbered classes, or of those in its lists; None where it declares none."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return None if names is None else [str(name) for name in names]


def named(value: Any, names: list[str] | None, label: str) -> Any:
    """A value of a column with numbered classes by its name, each of a list's too."""
    if names is None or isinstance(value, str) or value == IGNORED:
        return value
    if isinstance(value, list):
        return [named(each, names, label) for each in value]
    if not 0 <= value < len(names):
        raise UserError(
            f"{label} has the label {value}, and its classes are 0 to {len(names) - 1}: a split without labels has -1 in "
            "their place; choose another one"
        )
    return names[value]


def classes_of(training: Iterable[Any], held_out: Iterable[Any], what: str) -> tuple[str, ...]:
    """The classes among the labels learned from, sorted. A `UserError` where there is one only, or where others are held out."""
    classes = sorted({as_class(value, what) for value in training})
    if len(classes) < 2:
        raise UserError(f"{what}: {classes[0]} is the only label to learn; a classifier needs two or more")
    unseen = sorted({as_class(value, what) for value in held_out} - set(classes))
    if unseen:
        raise UserError(
            f"{what}: {', '.join(unseen[:5])} {'are labels' if len(unseen) > 1 else 'is a label'} of the held-out side that "
            f"the training side does not have; it has {', '.join(classes[:8])}{', …' if len(classes) > 8 else ''}"
        )
    return tuple(classes)


def as_class(value: Any, what: str) -> str:
    """A label as the name of its class; a `UserError` for what is none, such as the number of a regression."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        raise UserError(f"{what}: labels must be whole numbers or words, got {value!r:.60}")
    return str(value)
