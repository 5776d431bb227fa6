"""The span of a context that answers a question, as in SQuAD (Rajpurkar et al. 2016).

Without labelled data: **recurring spans** (Ram et al. 2021, https://arxiv.org/abs/2101.00438). Of a passage in which a run of one
to three words comes twice, the sentence of the second time is the question, with ``what`` in place of the words; the rest of the
passage is the context, and every time that the words are there is a right answer. Departures: one question a passage, of its
longest such run, whose first and last word have six letters or more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sparsefinder.corpora import Corpus
from sparsefinder.errors import UserError
from sparsefinder.evaluation.tasks.data import Row
from sparsefinder.evaluation.tasks.judges import Batch, Judge, per_position
from sparsefinder.evaluation.tasks.labelled import Feature, Reader
from sparsefinder.evaluation.tasks.measures import best, exact_match, span_f1
from sparsefinder.evaluation.tasks.passages import of_split, spread

_MOST = (5000, 1000)  # questions to learn from, and held out
_LONGEST = 30  # tokens of an answer, as in the published scripts
_SENTENCE = re.compile(r"(?<=[.!?]) +")
_WORD = re.compile(r"\b[A-Za-z]+\b")
_SPAN = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")
_LETTERS = 6  # of the shortest word that makes a span worth asking for
_RUNS = (3, 2, 1)  # words of a span, the longest first
WHAT = "what"


@dataclass(frozen=True)
class QuestionAnswering:
    """The span of a context that answers a question."""

    name: str = "question_answering"
    head: str = "AutoModelForQuestionAnswering"
    roles: tuple[str, ...] = ("question", "context", "answers")
    made_split: str | None = None

    def made(self, corpus: Corpus, split: str, cache: Path) -> tuple[list[Row], list[Row]]:
        """As `LabelledTask`: recurring spans."""
        training, held_out = (
            spread([row for passage in of_split(corpus, part, cache) if (row := recurring(passage))], most)
            for part, most in zip(("train", split), _MOST, strict=True)
        )
        if not training or not held_out:
            raise UserError(
                f"evaluate.task={self.name}: no passage of the corpus says the same words twice; give labelled data with "
                "evaluate.labels.path=DATASET"
            )
        return training, held_out

    def classes(self, training: Sequence[Row], held_out: Sequence[Row]) -> tuple[str, ...]:
        """As `LabelledTask`: none."""
        return ()

    def encode(self, row: Row, read: Reader) -> Feature | None:
        """As `LabelledTask`: the context is cut to the model's length; None where no answer is left in it."""
        question, context = row["question"].strip(), row["context"]
        answers = list(_answers(row["answers"], self.name))
        special = read.tokenizer.num_special_tokens_to_add(pair=True)
        if len(read.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]) + special >= read.length:
            return None
        tokens = read(question, context, truncation="only_second", return_offsets_mapping=True)
        positions = [position for position, which in enumerate(tokens.sequence_ids()) if which == 1]
        offsets = [tokens["offset_mapping"][position] for position in positions]
        for text, begin in answers:
            end = begin + len(text)
            inside = [position for position, (b, e) in zip(positions, offsets, strict=True) if e > begin and b < end]
            if inside and offsets[-1][1] >= end:
                labels = {"start_positions": inside[0], "end_positions": inside[-1]}
                reference = Reference(context, positions[0], offsets, [text for text, _ in answers])
                return Feature(tokens["input_ids"], dict(labels), tokens.get("token_type_ids"), reference)
        return None

    def judge(self, features: Sequence[Feature]) -> Judge:
        """As `LabelledTask`."""
        return Spans([feature.reference for feature in features])


@dataclass(frozen=True)
class Reference:
    """What an answer is compared with."""

    context: str
    first: int  # token of the context
    offsets: list[tuple[int, int]]  # of its tokens in the text
    answers: list[str]  # each of them right

    def read(self, logits: Tensor) -> str:
        """The text of the best span of the context, from logits ``(2, N)`` of starts and ends."""
        starts, ends = logits[:, self.first : self.first + len(self.offsets)]
        spans = torch.ones(len(starts), len(ends), dtype=torch.bool).triu().tril(_LONGEST - 1)
        sums = (starts[:, None] + ends).masked_fill(~spans, -torch.inf)
        start, end = divmod(int(sums.argmax()), len(ends))
        return self.context[self.offsets[start][0] : self.offsets[end][1]]


@dataclass(frozen=True)
class Spans:
    """Spans of a context: loss of start and end, and their text against the right ones."""

    references: Sequence[Reference]
    unit: str = "questions"
    asked: str = "questions"
    measures: tuple[str, ...] = ("exact_match", "answer_f1")  # f1 is that of the graph

    def judge(self, output: Any, batch: Batch) -> tuple[Tensor, list[Any]]:
        """As `Judge`; ``right`` is: both ends, by tokens. The logits of starts and ends are kept, ``(2, N)`` of each example."""
        both = torch.stack([output.start_logits, output.end_logits], 1).float()
        truth = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        sums, _, _ = per_position(both, truth)
        of_example = torch.stack([torch.ones_like(sums[:, 0]), sums[:, 1] / 2, (sums[:, 2] == 2).double()], 1)
        return of_example.cpu(), list(both.cpu())

    def scores(self, blocks: pd.DataFrame, answers: Sequence[Any]) -> dict[str, float]:
        """As `Judge`: the largest value over the right answers of each example, and their means."""
        texts = [reference.read(logits) for reference, logits in zip(self.references, answers, strict=True)]
        pairs = list(zip(texts, self.references, strict=True))
        measures = {"exact_match": exact_match, "answer_f1": span_f1}
        return {
            name: sum(best(measure, text, reference.answers) for text, reference in pairs) / len(pairs)
            for name, measure in measures.items()
        }


def _answers(answers: Any, task: str) -> Iterator[tuple[str, int]]:
    """Text and first character of each right answer of a row in SQuAD's form."""
    try:
        yield from zip(answers["text"], map(int, answers["answer_start"]), strict=True)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"evaluate.task={task}: answers must be {{text: [...], answer_start: [...]}} as in SQuAD, got {answers!r:.80}; "
            "name their column with evaluate.labels.answers="
        ) from error


def recurring(passage: str) -> Row | None:
    """A question about a passage from words that come twice in it; None where none do."""
    sentences = _SENTENCE.split(passage)
    for size in _RUNS:
        met: dict[str, int] = {}
        for index, sentence in enumerate(sentences):
            words = list(_WORD.finditer(sentence))
            for run in zip(*(words[at:] for at in range(size)), strict=False):
                span = sentence[run[0].start() : run[-1].end()]
                if min(len(run[0][0]), len(run[-1][0])) < _LETTERS or not _SPAN.fullmatch(span):
                    continue
                if met.setdefault(span.lower(), index) < index:
                    return _question(sentences, index, span, run[0].start())
    return None


def _question(sentences: Sequence[str], index: int, span: str, begin: int) -> Row:
    sentence = sentences[index]
    context = " ".join(each for other, each in enumerate(sentences) if other != index)
    begins = [match.start() for match in re.finditer(rf"\b{re.escape(span)}\b", context, re.IGNORECASE)]
    return {
        "question": f"{sentence[:begin]}{WHAT}{sentence[begin + len(span) :]}",
        "context": context,
        "answers": {"text": [context[at : at + len(span)] for at in begins], "answer_start": begins},
    }
