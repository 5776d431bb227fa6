"""The stage ``compare``: what every attention costs and loses at every length, in one model, on the same words.

Long texts are masked once, or of a decoder asked for every next word, and read whole or in pieces
(`sparsefinder.evaluation.long_texts`), so that the same words are asked for at 512 tokens and at 8,192. For every arm and
length: the loss, its difference to the model's own dense attention with a paired interval over texts, the graph that was
executed (looked at for some queries), and the time and memory of whole passes in one process, in turn
(`sparsefinder.evaluation.speed`). What is measured is kept in the scratch folder at once, so that a killed run goes on where it
was, and times can be taken again on a quiet machine without asking for a word twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sparsefinder import models
from sparsefinder.analysis.bootstrap import ratio_difference
from sparsefinder.analysis.iso_quality import alarms, at_equal_quality
from sparsefinder.corpora import Corpus, Masking, NextWords, block_length, token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.corpora.packing import identity_of
from sparsefinder.errors import UserError, check_counts
from sparsefinder.evaluation.arms import DENSE, NONE, SOFTMAX, Arm, plugged
from sparsefinder.evaluation.long_texts import LongText, check_lengths, long_texts
from sparsefinder.evaluation.observer import Observer, measure_graphs
from sparsefinder.evaluation.speed import Contestant, give_back_memory, race
from sparsefinder.evaluation.tasks.language import JUDGES
from sparsefinder.experiment.configuration import Learned
from sparsefinder.graphs import reads_ahead
from sparsefinder.models.documents_apart import read_apart
from sparsefinder.models.families import kind_of
from sparsefinder.models.masked_lm import masked_logits
from sparsefinder.models.objectives import is_causal
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import tables
from sparsefinder.storage.files import write_text
from sparsefinder.storage.manifests import plain, versions
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

_COLUMNS = ("block", "masked", "loss", "right")


@dataclass(frozen=True)
class CompareSettings:
    """Settings of the stage ``compare``."""

    corpus: Corpus
    arms: tuple[Arm, ...] = ()
    lengths: tuple[int, ...] = (
        512,
        1024,
        2048,
        4096,
        8192,
    )  # tokens; each divides the next, and the longest is a block
    split: str = "test"  # train, validation or test
    samples: int = 16  # texts of the longest length, which is all that can be drawn again for intervals
    mask_probability: float = 0.15  # of a masked language model
    causal: bool = False  # of the other stages: true for a decoder
    measured: int = 1  # texts of each length on which graphs and output errors are measured
    measured_queries: int = 256  # of each layer of such a text, drawn by the seed; what they show are estimates
    quadratic_up_to: int = 2048  # tokens; arms that compare every pair in a matrix are left out beyond
    rounds: int = 5  # times that each forward pass is timed; 0: losses alone
    step_rounds: int = 2  # times that each training step is timed; 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        check_counts("compare", self, "samples", "measured", "measured_queries")
        if not self.lengths or min(self.lengths) < 8:
            raise UserError(f"compare.lengths={list(self.lengths)}: give lengths of 8 tokens or more")
        check_lengths(self.lengths)
        if min(self.rounds, self.step_rounds) < 0:
            raise UserError(f"compare.rounds must not be negative, got {self.rounds} and {self.step_rounds}")
        if not 0 < self.mask_probability < 1:
            raise UserError(f"compare.mask_probability must lie between 0 and 1, got {self.mask_probability}")

    @property
    def left_out(self) -> str:
        """Why there is nothing to do; empty where there is."""
        return "" if self.arms else "there are no arms to compare; experiment=long has some"

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage: the model, and what the patterns of the arms work with."""
        return ("model", *sorted({need for arm in self.arms for need in arm.needs}))

    @property
    def inputs(self) -> dict[str, str]:
        """What else the result depends on, by content."""
        return {"corpus": identity_of(self.corpus)}


@dataclass(frozen=True)
class _Run:
    """All that the arms of one run share."""

    settings: CompareSettings
    store: Store
    model: Any
    texts: Sequence[LongText]
    frequencies: Tensor  # (V,) nats: what a word costs that is guessed by its frequency in the training part
    learned: Learned
    own: Normalizer

    def losses(self, arm: Arm, length: int) -> pd.DataFrame:
        """A row for each text: words asked for, their loss in nats, and how many were guessed right."""
        rows = []
        with torch.inference_mode(), plugged(self.model, arm, arm.build(self.learned, self.own)):
            for index, text in enumerate(self.texts):
                batch, cut = self.batch(arm, text, length)
                logits, labels = masked_logits(self.model, batch)
                read = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                right = int((logits.argmax(-1) == labels).sum()) + int((cut == self.frequencies.argmin()).sum())
                rows.append((index, len(labels) + len(cut), float(read) + float(self.frequencies[cut].sum()), right))
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def batch(self, arm: Arm, text: LongText, length: int) -> tuple[dict[str, Tensor], Tensor]:
        """What an arm reads of a text in pieces of ``length`` tokens, and the words asked for that it does not read."""
        nothing = torch.empty(0, dtype=torch.int64)
        if arm.reading is None or arm.reading.tokens >= length:
            return text.pieces(length), nothing
        if arm.reading.kind == "chunks":
            return text.pieces(arm.reading.tokens), nothing
        return text.beginnings(length, arm.reading.tokens)

    def graph(self, arm: Arm, length: int) -> dict[str, Any]:
        """Metrics of the graph that an arm executes on the first pieces; none where it has no attention of its own.

        Estimates from the drawn queries, but for the pairs that are multiplied, which are counted.
        """
        attention = arm.build(self.learned, self.own)
        if attention is None:
            return {}
        asked = self.settings
        observer = Observer(attention, arm.configuration, self.own, asked.measured_queries, asked.seed)
        batches = [{name: x[:1] for name, x in text.pieces(length).items()} for text in self.texts]
        measure_graphs(self.model, observer, batches, self.settings.measured)
        give_back_memory()
        return observer.means()

    def contestant(self, arm: Arm, length: int) -> Contestant:
        """An arm that reads one text of ``length`` tokens."""
        attention = arm.build(self.learned, self.own)
        batch, _ = self.batch(arm, self.texts[0], length)
        of_one = len(self.texts[0].inputs) // length  # such texts in a long one
        batch = {name: x[: len(x) // of_one] for name, x in batch.items()}
        return Contestant(lambda: plugged(self.model, arm, attention), batch)


def run(settings: CompareSettings, store: Store) -> None:
    """Make ``compare``: ``results`` (a row for each arm and length), ``blocks`` (× text) and ``equal_quality``."""
    made = _prepared(settings, store)
    own = made.own
    always = [Arm(DENSE), *([Arm(SOFTMAX)] if own.sparse else []), Arm(NONE)]
    arms = [*always, *_without_future(settings, made.learned)]
    parents = {name: store.content(name) for name in settings.needs}
    parts: list[tuple[Arm, int, dict[str, Any], pd.DataFrame]] = []
    wanted = [(length, arm) for length in settings.lengths for arm in arms if _possible(arm, length, settings)]
    for length, arm in progress(wanted, "compare"):
        mine = {name: parents[name] for name in ("model", *arm.needs)}  # another arm changes nothing for this one
        key = [_identity(arm), length, mine, settings.inputs, versions().get("sparsefinder")]
        key += [
            getattr(settings, name)
            for name in ("lengths", "split", "samples", "mask_probability", "seed", "measured", "measured_queries")
        ]
        found = _kept(store, key, lambda arm=arm, length=length: _quality(made, arm, length))  # type: ignore[misc]
        blocks = pd.DataFrame(found["blocks"])
        parts.append((arm, length, found["graph"], blocks))
        log.info("%s, %d tokens: loss %.4f", arm.name, length, blocks["loss"].sum() / blocks["masked"].sum())
    speeds = {
        length: _speeds(made, [arm for arm, at, *_ in parts if at == length], length) for length in settings.lengths
    }
    results = _table(parts, speeds, JUDGES[kind_of(made.model.config)].asked)
    for line in alarms(results):
        log.warning("%s", line)
    with store.writing("compare") as folder:
        folder.mkdir()
        tables.write(results, folder, "results")
        tables.write(at_equal_quality(results), folder, "equal_quality")
        blocks = pd.concat([blocks.assign(arm=arm.name, length=length) for arm, length, _, blocks in parts])
        blocks.to_parquet(folder / "blocks.parquet", index=False)
    store.note("compare", split=settings.split, texts=len(made.texts), tokens=sum(len(t.inputs) for t in made.texts))


def _prepared(settings: CompareSettings, store: Store) -> _Run:
    model, tokenizer = models.load_language_model(store.path("model"))
    _check_kind(settings, model)
    read_apart(model, tokenizer, settings.corpus)
    shape = models.describe(model)
    longest = block_length(max(settings.lengths), shape.max_length, "compare.lengths")
    cache = store.scratch("corpus")
    blocks = token_blocks(settings.corpus, tokenizer, settings.split, longest, cache=cache)
    full = [index for index, tokens in enumerate(blocks.lengths.tolist()) if tokens == longest]
    if not full:
        raise UserError(
            f"compare.lengths: no text of the {settings.split} split fills {longest} tokens; give shorter lengths, or "
            "corpus.document=distribution"
        )
    log.info("compare: %d of %d blocks of %d tokens are full", len(full), len(blocks), longest)
    drawn = draw(
        len(full), min(settings.samples, len(full)), settings.seed, f"the {settings.split} split of the corpus"
    )
    asking = NextWords() if settings.causal else Masking.of(tokenizer, settings.mask_probability)
    texts = long_texts([blocks[full[index]] for index in drawn], settings.lengths, asking, settings.seed)
    training = token_blocks(settings.corpus, tokenizer, "train", longest, cache=cache)
    counts = training.ids.long().bincount(minlength=len(tokenizer)).double() + 0.5
    configurations = tuple(arm.configuration for arm in settings.arms if arm.configuration is not None)
    learned = Learned.of(store, configurations, shape.group)
    learned.check(shape.layers, shape.heads, shape.head_size)
    return _Run(settings, store, model, texts, -(counts / counts.sum()).log(), learned, models.get_normalizer(model))


def _check_kind(settings: CompareSettings, model: Any) -> None:
    family = model.config.model_type
    kind = kind_of(model.config)
    if kind == "encoder_decoder":
        raise UserError(f"stage=compare reads one text, and a {family} reads two: give stage=evaluate")
    if not models.has_head(model):
        raise UserError("stage=compare asks for words, and this model has no head to guess them with")
    if settings.causal != is_causal(model):
        raise UserError(
            f"stage=compare with causal={str(settings.causal).lower()} is not for a {family}: give "
            f"causal={str(is_causal(model)).lower()}"
        )


def _without_future(settings: CompareSettings, learned: Learned) -> Iterator[Arm]:
    """The arms, in causal attention without those that read ahead."""
    for arm in settings.arms:
        ahead = "" if arm.configuration is None else reads_ahead(arm.configuration.build(learned))
        if settings.causal and ahead:
            log.info("%s is left out of a causal model: it reads ahead (%s)", arm.name, ahead)
        else:
            yield arm


def _possible(arm: Arm, length: int, settings: CompareSettings) -> bool:
    """Whether an arm is run at a length: not where a matrix would be too large, and no chunk that is the whole text."""
    if arm.reading is not None and arm.reading.tokens >= length:
        return False
    return not arm.quadratic or length <= settings.quadratic_up_to


def _quality(made: _Run, arm: Arm, length: int) -> dict[str, Any]:
    graph = {name: value for name, value in made.graph(arm, length).items() if value == value}
    return {"blocks": made.losses(arm, length).to_dict("list"), "graph": graph}


def _identity(arm: Arm) -> Any:
    return json.loads(json.dumps(plain(arm), default=str))


def _kept(store: Store, key: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured under a key, now or by a run before this one."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path: Path = store.scratch("compare") / f"{name}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found = measure()
    write_text(path, json.dumps(found))
    return found


def _speeds(made: _Run, arms: Sequence[Arm], length: int) -> dict[str, dict[str, Any]]:
    if not made.settings.rounds:
        return {}
    log.info("compare: timing %d arms at %d tokens", len(arms), length)
    contestants = {arm.name: made.contestant(arm, length) for arm in arms}
    return race(made.model, contestants, made.settings.rounds, made.settings.step_rounds)


def _table(
    parts: Sequence[tuple[Arm, int, dict[str, Any], pd.DataFrame]],
    speeds: dict[int, dict[str, dict[str, Any]]],
    asked: str,
) -> pd.DataFrame:
    """A row for each arm and length, beside dense attention and torch's softmax; ``asked``: the column that counts words."""
    dense = {length: blocks for arm, length, _, blocks in parts if arm.name == DENSE}
    rows = []
    for arm, length, graph, blocks in parts:
        beside, masked = dense[length], blocks["masked"].to_numpy(float)
        low, high = ratio_difference(blocks["loss"].to_numpy(), beside["loss"].to_numpy(), masked)
        columns = {} if arm.configuration is None else arm.configuration.columns
        time = speeds.get(length, {})
        mine = time.get(arm.name, {})
        usual = time.get(SOFTMAX, time.get(DENSE, {}))
        row = {"arm": arm.name, "length": length, **columns, **graph, **mine}
        row |= {
            "loss": blocks["loss"].sum() / masked.sum(),
            "accuracy": blocks["right"].sum() / masked.sum(),
            asked: int(masked.sum()),
            "loss_minus_dense": (blocks["loss"].sum() - beside["loss"].sum()) / masked.sum(),
            "loss_minus_dense_low": low,
            "loss_minus_dense_high": high,
        }
        for what, name in (("latency_ms", "speed"), ("step_ms", "step_speed")):
            known = mine.get(what) and usual.get(what)
            row[name] = usual[what] / mine[what] if known else None
        if mine.get("latency_ms") and time.get(NONE):
            row["share_of_bound"] = time[NONE]["latency_ms"] / mine["latency_ms"]
        rows.append(row)
    return tables.tidy(rows)
