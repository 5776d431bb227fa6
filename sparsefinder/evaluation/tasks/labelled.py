"""From labelled rows to a model that has learned them, and to batches to measure every variant on.

What is common to all tasks with labels. What is special about one is a `LabelledTask`, a file each: which columns it reads, how
it makes rows of a corpus without labels, how a row becomes tokens, and how answers are counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsefinder.corpora import Corpus
from sparsefinder.corpora.blocks import pad
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError
from sparsefinder.evaluation.tasks.data import LabelledData, Row
from sparsefinder.evaluation.tasks.heads import HeadSettings, finetuned, with_head
from sparsefinder.evaluation.tasks.judges import Batch, Judge
from sparsefinder.storage import distributed
from sparsefinder.storage.files import remove
from sparsefinder.storage.manifests import plain, versions
from sparsefinder.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feature:
    """One example as a model reads it."""

    input_ids: list[int]
    labels: dict[str, int | list[int]]  # a number for the whole, or one for each token: what the model calls it → value
    token_type_ids: list[int] | None = None
    reference: Any = None  # what the answer is compared with, where labels do not say it


@dataclass(frozen=True)
class Reader:
    """How texts become tokens for one model."""

    tokenizer: Any
    length: int  # most tokens of an example, special ones included
    segments: bool  # whether the model tells two texts apart by token types
    classes: tuple[str, ...] = ()  # of the task; a label is an index into them

    def __call__(self, *texts: str, **options: Any) -> Any:
        """The encoding of one text or of a pair, at most `length` tokens."""
        options = {"truncation": True, **options}
        return self.tokenizer(*texts, max_length=self.length, return_token_type_ids=self.segments, **options)


class LabelledTask(Protocol):
    """What is special about a task; see `sequence_classification` for the shortest one."""

    @property
    def name(self) -> str:
        """The value of ``evaluate.task`` that chooses it."""

    @property
    def head(self) -> str:
        """The class of transformers, AutoModelFor…."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The settings of `LabelledData` that name the columns it reads."""

    @property
    def made_split(self) -> str | None:
        """What held-out rows that are `made` are of; None where that is the split that was asked for."""

    def made(self, corpus: Corpus, split: str, cache: Path) -> tuple[list[Row], list[Row]]:
        """Rows made of a corpus without labels: to learn from, and held out."""

    def classes(self, training: Sequence[Row], held_out: Sequence[Row]) -> tuple[str, ...]:
        """The classes to tell apart; none where the task is another."""

    def encode(self, row: Row, read: Reader) -> Feature | None:
        """A row as a model reads it; None where what is asked for does not fit in its length."""

    def judge(self, features: Sequence[Feature]) -> Judge:
        """How answers about these examples are counted."""


@dataclass(frozen=True)
class Asked:
    """What every variant is asked: the model, the examples, and how its answers are counted."""

    model: Any
    judge: Judge
    held_out: list[Batch]
    training: list[Batch]  # to adapt a variant on; empty where nothing is adapted
    facts: dict[str, Any] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class Request:
    """What of `evaluate` a task has to know."""

    corpus: Corpus
    labels: LabelledData
    head: HeadSettings
    split: str
    samples: int
    batch_size: int
    adapt_examples: int
    adapt_batch_size: int
    seed: int


def ask(task: LabelledTask, request: Request, store: Store, model: Any, tokenizer: Any, length: int) -> Asked:
    """The model with a head that has learned the task, under the model's own attention, and examples held out."""
    data = request.labels.of(request.corpus)
    training, held_out = distributed.first_then_all(lambda: _rows(task, data, request, store.scratch("corpus")))
    classes = task.classes(training, held_out)
    segments = getattr(model.config, "type_vocab_size", 1) > 1 and "token_type_ids" in tokenizer.model_input_names
    read = Reader(tokenizer, length, segments, classes)
    measured = encoded(task, held_out, request.samples, request.seed, read, "held out")
    wanted = max(request.head.examples * distributed.count(), request.adapt_examples)
    learned = encoded(task, training, wanted, request.seed, read, "to learn from")
    made = with_head(model, task.head, classes, request.head.seed)
    folder = distributed.once(lambda: _folder(task, data, request, store, length))
    model = finetuned(
        made, learned, lambda some: collate(some, tokenizer.pad_token_id), tokenizer, request.head, folder
    )
    log.info("%s: %d examples to learn from, %d held out", task.name, len(learned), len(measured))

    def batches(features: Sequence[Feature], size: int) -> list[Batch]:
        return [collate(features[at : at + size], tokenizer.pad_token_id) for at in range(0, len(features), size)]

    split = data.test if data.path is not None else task.made_split or request.split
    facts = {"split": split, "task": task.name, "learned_examples": len(learned)} | (
        {"classes": len(classes)} if classes else {}
    )
    adapting = batches(learned[: request.adapt_examples], request.adapt_batch_size) if request.adapt_examples else []
    return Asked(model, task.judge(measured), batches(measured, request.batch_size), adapting, facts)


def _rows(task: LabelledTask, data: LabelledData, request: Request, cache: Path) -> tuple[list[Row], list[Row]]:
    if data.path is None:
        return task.made(request.corpus, request.split, cache)
    roles = {role: role for role in task.roles if getattr(data, role) is not None}
    return data.rows("train", roles), data.rows("test", roles)


def _folder(task: LabelledTask, data: LabelledData, request: Request, store: Store, length: int) -> Path:
    """A folder for the head that belongs to this model, data and settings; those of the same task for others go."""
    scratch = store.scratch("tasks")
    known = [store.content("model"), data.fingerprint() or request.corpus.fingerprint(), versions().get("sparsefinder")]
    settings = [plain(part) for part in (data, request.head)]
    identity = json.dumps([known, settings, request.split, request.adapt_examples, request.seed, length], default=str)
    folder = scratch / f"{task.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    for other in scratch.glob(f"{task.name}-*"):
        if other != folder:
            remove(other)
    folder.mkdir(exist_ok=True)
    return folder


def encoded(task: LabelledTask, rows: Sequence[Row], most: int, seed: int, read: Reader, which: str) -> list[Feature]:
    """At most so many of the rows as features, in an order drawn by the seed.

    Those whose answer lies beyond the model's length are left out, and counted in the log.
    """
    features: list[Feature] = []
    met = 0
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(features) == most:
            break
        met += 1
        feature = task.encode(rows[index], read)
        if feature is not None:
            features.append(feature)
    if met > len(features):
        log.warning(
            "%s: %d of %d examples %s do not fit in %d tokens with what is asked for, and are left out",
            *(task.name, met - len(features), met, which, read.length),
        )
    if not features:
        raise UserError(
            f"evaluate.task={task.name}: none of {met} examples {which} fits in {read.length} tokens; "
            "give shorter texts, or a model of more tokens"
        )
    return features


def collate(features: Sequence[Feature], pad_token_id: int) -> Batch:
    """Several features, padded on the right to the longest; a label for each token is `IGNORED` on padding."""

    def padded(rows: Sequence[list[int]], value: int) -> tuple[Tensor, Tensor]:
        return pad([torch.tensor(row) for row in rows], value)

    input_ids, valid = padded([feature.input_ids for feature in features], pad_token_id)
    batch = {"input_ids": input_ids, "attention_mask": valid}
    segments = [feature.token_type_ids for feature in features if feature.token_type_ids is not None]
    if segments:
        batch["token_type_ids"] = padded(segments, 0)[0]
    for name, first in features[0].labels.items():
        values: list[Any] = [feature.labels[name] for feature in features]
        batch[name] = padded(values, IGNORED)[0] if isinstance(first, list) else torch.tensor(values)
    return batch
