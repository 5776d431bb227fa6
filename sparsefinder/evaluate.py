"""The stage ``evaluate``: what a predicted graph does to the model that attends through it.

Every variant reads the same blocks with **the same masked positions**, or guesses the same next words, or reads the same examples
of another task (`sparsefinder.evaluation.tasks`). Two are always there to compare with: dense attention with the model's own
normalizer, exact (`Dense`), and dense softmax as transformers runs it (torch's SDPA). Graph metrics are taken from the graph that
the plugged attention really executes, against the gold graph of the very queries and keys it was given.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sparsefinder import models
from sparsefinder.analysis.bootstrap import ratio_difference
from sparsefinder.attention import Dense
from sparsefinder.corpora import Corpus, block_length
from sparsefinder.corpora.packing import identity_of
from sparsefinder.errors import UserError, check_counts
from sparsefinder.evaluation import asking, tasks
from sparsefinder.evaluation.adapt import AdaptSettings, adapt, attending
from sparsefinder.evaluation.cost import Stopwatch, peak_memory
from sparsefinder.evaluation.observer import Observer, measure_graphs, on
from sparsefinder.evaluation.variants import AttentionChoice, Conversion, Variant, check_some, crossed
from sparsefinder.executors.fastest_by_length import now
from sparsefinder.experiment.calibration import calibrated
from sparsefinder.experiment.configuration import Configuration, Learned, between_texts, buildable, fitted, needed
from sparsefinder.graphs import Attention, reads_ahead
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.full import Full
from sparsefinder.reporting.text_tables import SLOW
from sparsefinder.storage import distributed, tables
from sparsefinder.storage.growing_table import Item, Table
from sparsefinder.storage.manifests import plain
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
_MASKED_WORDS = tasks.MaskedWords()


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of the stage ``evaluate``."""

    corpus: Corpus
    configurations: tuple[Configuration, ...]
    attentions: tuple[AttentionChoice, ...]
    conversions: tuple[Conversion, ...] = ()
    target: str | None = None  # patterns with a sparsity parameter are run as the stage calibrate set them for it
    alpha: float | None = None  # of every variant's normalizer; None: the model's own
    split: str = "test"  # train, validation or test
    samples: int = 64  # text blocks
    length: int | None = None  # most tokens of a block; None: what the model can take
    batch_size: int = 8
    mask_probability: float = 0.15
    measured: int = 8  # blocks on which graphs and output errors are measured
    # causal_lm of a decoder; seq2seq_lm of an encoder-decoder; embedding (states beside the dense model's; always so without a
    # head); or one with labels, docs/how-to/tasks.md: sequence_classification, token_classification, question_answering
    task: str = tasks.MASKED_LM
    # of a task with labels; made from the corpus where no data set is given
    labels: tasks.LabelledData = field(default_factory=tasks.LabelledData)
    # of such a task, finetuned once and measured under every variant
    head: tasks.HeadSettings = field(default_factory=tasks.HeadSettings)
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    which: str = "enc"  # the attention that is replaced: enc, dec or cross
    # of the other stages; true leaves this one out but of models that write: who guesses masked words reads both ways
    causal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        tasks.check(self.task)
        if self.conversions and self.task != tasks.MASKED_LM:
            raise UserError(f"conversion= is measured with evaluate.task={tasks.MASKED_LM}, not with {self.task}")
        check_counts("evaluate", self, "samples", "batch_size", "measured")
        if not 0 < self.mask_probability < 1:
            raise UserError(f"evaluate.mask_probability must lie between 0 and 1, got {self.mask_probability}")
        if self.alpha is not None:
            Normalizer(self.alpha)
        if not self.conversions and not self.left_out:
            check_some(self.attentions, self.configurations)

    @property
    def left_out(self) -> str:
        """Why there is nothing to do; empty where there is."""
        if self.causal and self.task not in (tasks.CAUSAL_LM, tasks.SEQ2SEQ_LM):
            return "causal=true, and a model that guesses masked words reads both ways"
        return ""

    @property
    def items(self) -> tuple[Item, ...]:
        """What is to be measured, beside dense attention: attentions with their patterns, and conversions."""
        items = [self.item(Variant(each, None, Normalizer())) for each in self.attentions if not each.takes_pattern]
        for attention in self.attentions:
            for configuration in self.configurations if attention.takes_pattern else ():
                target = self.target if configuration.pattern.sparsity_parameter is not None else None
                items.append(self.item(Variant(attention, configuration, Normalizer()), target))
        items += [_item({"conversions": plain(each)}, ("model",)) for each in self.conversions]
        return tuple({item.key: item for item in items}.values())

    @property
    def shared(self) -> dict[str, Any]:
        """What all rows of a table have in common."""
        apart = ("corpus", "configurations", "attentions", "conversions", "target")  # `inputs` has the corpus
        return {own.name: plain(getattr(self, own.name)) for own in fields(self) if own.name not in apart}

    def item(self, variant: Variant, target: str | None = None) -> Item:
        """A variant among the items; with a target without the values for each head, which the calibration knows."""
        configuration = variant.configuration
        what = plain(configuration if target is None or configuration is None else replace(configuration, dials=None))
        if target is not None and configuration is not None:
            what["pattern"][configuration.pattern.sparsity_parameter] = None
        needs = () if configuration is None else configuration.needs
        settings = {"attentions": plain(variant.attention), "configurations": what, "target": target}
        return _item(settings, ("model", *needs, *(("calibration",) if target else ())))

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage: the model, and what the chosen patterns work with."""
        return ("model", *needed(self.configurations), *(("calibration",) if self.target else ()))

    @property
    def inputs(self) -> dict[str, str]:
        """What else the result depends on, by content."""
        labels = self.labels.of(self.corpus).fingerprint() if self.task in tasks.LABELLED else ""
        return {"corpus": identity_of(self.corpus)} | ({"labels": labels} if labels else {})


def _item(what: dict[str, Any], needs: tuple[str, ...]) -> Item:
    return Item(json.loads(json.dumps(what, default=str)), {}, needs)


def run(settings: EvaluateSettings, store: Store) -> None:
    """Make ``evaluate``: ``results`` (one row per variant), ``layers`` (× layer × head) and ``blocks`` (× block of text)."""
    model, tokenizer = models.load_language_model(store.path("model"))
    asking.check_kind(settings, model)
    shape = models.describe(model, settings.which)
    learned = Learned.of(store, settings.configurations, shape.group)
    learned.check(shape.layers, shape.heads, shape.head_size)
    table, typed = Table.of("evaluate", settings, store), settings.configurations
    if settings.task == tasks.MASKED_LM and not models.has_head(model):
        if settings.conversions:
            raise UserError("conversion= needs a masked language model, and this model has no head")
        log.info("this model has no head to guess words with: its states are compared with the dense model's")
        settings = replace(settings, task=tasks.EMBEDDING)
    settings = replace(settings, configurations=fitted(typed, shape.layers, shape.heads))
    own = models.get_normalizer(model)
    length = block_length(settings.length, shape.max_length, "evaluate.length")

    asked = asking.asked(settings, store, model, tokenizer, length)
    model, held_out, training = asked.model, asked.held_out, asked.training
    normalizer = own if settings.alpha is None else Normalizer(settings.alpha)
    dense = AttentionChoice("dense", Dense, {"causal": True} if settings.causal else {})
    wanted = {item.key: item for item in table.wanted}
    as_typed = dict(zip(map(id, settings.configurations), typed, strict=True))

    def item_of(variant: Variant) -> Item | None:
        as_given = as_typed.get(id(variant.configuration), variant.configuration)
        has_parameter = as_given is not None and as_given.pattern.sparsity_parameter is not None
        target = settings.target if has_parameter else None
        return wanted.get(settings.item(replace(variant, configuration=as_given), target).key)

    configurations, attentions = _at_target(settings, store, learned), settings.attentions
    if settings.which == "cross":
        configurations = between_texts(configurations, learned, shape.heads, shape.head_size)
        attentions = tuple(each for each in attentions if each.takes_pattern)  # an LSG layout is one text's
    sparse = crossed(attentions, configurations, normalizer, learned, shape.head_size)
    owned = [(variant, item) for variant in sparse if (item := item_of(variant)) is not None]
    everything = [
        Variant(dense, Configuration("full", Full()), own),
        Variant(dense, Configuration("full", Full()), Normalizer(1.0)),
        *(variant for variant, _ in owned),
    ]
    owners = [(each, _item({"conversions": plain(each)}, ("model",))) for each in settings.conversions]
    converting = [(each, wanted[item.key]) for each, item in owners if item.key in wanted]
    converted = []
    for conversion, _ in converting:  # first, since one may be refused
        converted.append(
            evaluate_converted(model, tokenizer, conversion, held_out, training, shape.max_length, settings)
        )
        log.info("%s: loss %.4f", conversion.columns["variant"], converted[-1].row["loss"])
    outcomes: list[Outcome] = []
    for variant in progress(everything, "evaluate"):
        outcomes.append(evaluate_variant(asked, variant, learned, own, settings))
        row, measure = outcomes[-1].row, asked.judge.measures[-1]
        log.info("%s: loss %.4f, %s %.4f", variant.label, row["loss"], measure.replace("_", " "), row[measure])
    outcomes += converted
    _name_apart(outcomes, table.rows)
    results = compared(outcomes, asked.judge)
    if not distributed.first():
        return
    blocks = pd.concat([each.blocks.assign(variant=each.row["variant"]) for each in outcomes], ignore_index=True)
    layers = tables.tidy([row for outcome in outcomes for row in outcome.layers])
    if table.folder is not None:  # dense attention, of now, comes first
        kept = {name: table.staying(name, "variant") for name in ("results", "blocks", "layers")}
        results = tables.join([results.iloc[:2], kept["results"], results.iloc[2:]])
        blocks, layers = tables.join([kept["blocks"], blocks]), tables.join([kept["layers"], layers])
    names = [outcome.row["variant"] for outcome in outcomes[2:]]
    items = [item for _, item in (*owned, *converting)]
    with store.writing("evaluate") as folder:
        folder.mkdir()
        tables.write(results, folder, "results")
        blocks.to_parquet(folder / "blocks.parquet", index=False)
        tables.write(layers, folder, "layers")
        table.write(folder, store, zip(names, items, strict=True))
    store.note("evaluate", **{"split": settings.split, "blocks": len(outcomes[0].blocks), **asked.facts})


def _name_apart(outcomes: Sequence[Outcome], taken: Sequence[str]) -> None:
    """Numbers behind the names of variants that differ in a setting that no name has, a distance for instance."""
    met = set(taken)
    for outcome in outcomes:
        name = outcome.row["variant"]
        number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name} ({n})") not in met)
        met.add(new := name if number == 1 else f"{name} ({number})")
        for row in (outcome.row, *outcome.layers):
            row["variant"] = new


def _at_target(settings: EvaluateSettings, store: Store, learned: Learned) -> tuple[Configuration, ...]:
    """The configurations that can be built; with a target, those with a sparsity parameter as they are calibrated for it."""
    possible = buildable(settings.configurations, learned)
    if settings.causal:
        ahead = {id(each): why for each in possible if (why := reads_ahead(each.build(learned)))}
        for each in possible:
            if id(each) in ahead:
                log.info("%s is left out of a causal model: it reads ahead (%s)", each.label, ahead[id(each)])
        possible = tuple(each for each in possible if id(each) not in ahead)
    if settings.target is None:
        return possible
    at_target = calibrated(possible, store.path("calibration"), settings.target)
    return (*(each for each in possible if each.pattern.sparsity_parameter is None), *at_target)


@dataclass(frozen=True)
class Outcome:
    """One variant: its row of the results, its rows of the layers' table, and what it got right in every block."""

    row: dict[str, Any]
    layers: list[dict[str, Any]]
    blocks: pd.DataFrame  # block, masked (positions; see `Judge.unit`), loss (their sum in nats), right (guesses)


def evaluate_variant(
    asked: tasks.Asked, variant: Variant, learned: Learned, own: Normalizer, settings: EvaluateSettings
) -> Outcome:
    """Adapt a copy of the model if asked to, then measure quality, cost, and the graphs that were run."""
    model, held_out, training = asked.model, asked.held_out, asked.training
    if training:
        model, learned = copy.deepcopy(model), copy.deepcopy(learned)
    pattern = variant.pattern(learned)
    attention = variant.attention.build(pattern, variant.normalizer)
    if training:
        adapt(model, attention, training, settings.adapt, learned.artefacts.get("projections"), settings.which)
    row = {
        **variant.columns,
        **({} if settings.task == tasks.MASKED_LM else {"task": settings.task}),
        "adapt_steps": settings.adapt.steps,
        "finetune_part": settings.adapt.part if training else None,
    }
    watch = None if pattern is None else Stopwatch(pattern)
    timed = attention if watch is None else variant.attention.build(watch, variant.normalizer)
    softmax = variant.attention.kind is Dense and not variant.normalizer.sparse
    with models.softmax(model) if softmax else contextlib.nullcontext():  # what users have, as they run it
        plugged = None if softmax else timed
        quality, blocks = quality_and_cost(model, plugged, watch, held_out, asked.judge, settings.which)
    row |= quality
    observer = Observer(attention, variant.configuration, own)
    measure_graphs(model, observer, held_out, settings.measured, settings.which)
    layers = [{**variant.columns, **row} for row in observer.rows()]
    return Outcome(row | observer.means(), layers, blocks)


def evaluate_converted(
    model: Any,
    tokenizer: Any,
    conversion: Conversion,
    held_out: Sequence[Batch],
    training: Sequence[Batch],
    length: int,
    settings: EvaluateSettings,
) -> Outcome:
    """The finetuned model as another architecture; its graph is not ours to see, so its metrics are not defined."""
    converted = conversion.convert(model, tokenizer, length)

    if training:
        adapt(converted.model, None, [converted.read(batch) for batch in training], settings.adapt)
    part = settings.adapt.part if training else None
    row = {**conversion.columns, "adapt_steps": settings.adapt.steps, "finetune_part": part}
    quality, blocks = quality_and_cost(converted.model, None, None, [converted.read(batch) for batch in held_out])
    return Outcome(row | quality, [], blocks)


@torch.inference_mode()
def quality_and_cost(
    model: Any,
    attention: Attention | None,
    watch: Stopwatch | None,
    batches: Sequence[Batch],
    judge: tasks.Judge = _MASKED_WORDS,
    which: str | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Loss, answers and time of a model whose attention is replaced.

    The first batch warms up: what it says counts, its time does not, unless it is the only one.

    Args:
        model: in evaluation mode.
        attention: what it attends with; None for its own.
        watch: the pattern inside ``attention`` that adds up its seconds; None where there is none.
        batches: inputs with labels; each process takes its part.
        judge: what is asked, and how answers are measured.
        which: the attention that is replaced, where the model has several.

    Returns:
        A row of the results, and a row for each block.
    """
    device = model.device

    def read(batch: Batch) -> tuple[Tensor, list[Any], float]:
        batch = on(batch, device)
        inputs = tasks.inputs_of(batch)
        start = now(device)
        output = model(**inputs)
        seconds = now(device) - start
        return *judge.judge(output, batch), seconds

    mine = list(distributed.share(batches))
    with attending(model, attention, which):
        warm = [read(batch) for batch in mine[:1]]
        if watch is not None:
            watch.seconds = 0.0
        with peak_memory(device) as peak:
            timed = [read(batch) for batch in mine[1:] or mine]
    counted = [*(warm if len(mine) > 1 else []), *timed]
    parts, answers = [sums for sums, _, _ in counted], [each for _, answered, _ in counted for each in answered]
    times = [seconds for *_, seconds in timed]
    everywhere = distributed.parts(lambda: (parts, answers, times, 0.0 if watch is None else watch.seconds, peak.bytes))
    times = [each for _, _, part, _, _ in everywhere for each in part]
    peaks = [bytes_ for *_, bytes_ in everywhere if bytes_ is not None]
    of_blocks = torch.cat([batch for part, *_ in everywhere for batch in part])
    blocks = pd.DataFrame(of_blocks.numpy(), columns=[judge.unit, "loss", "right"])
    blocks = blocks.astype({judge.unit: int, "right": int})
    blocks.insert(0, "block", range(len(blocks)))
    count = int(blocks[judge.unit].sum())
    quarter = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    row = {
        "loss": float(blocks["loss"].sum()) / count,
        **judge.scores(blocks, [each for _, answered, *_ in everywhere for each in answered]),
        judge.asked: count,
        "latency_ms": 1e3 * statistics.median(times),
        "latency_spread_ms": 1e3 * (quarter[2] - quarter[0]),
        "predictor_share": None if watch is None else sum(seconds for *_, seconds, _ in everywhere) / sum(times),
        "peak_memory_mb": max(peaks) / 1e6 if peaks else None,
    }
    return row, blocks


def compared(outcomes: Sequence[Outcome], judge: tasks.Judge) -> pd.DataFrame:
    """The results with each variant's distance to dense entmax (the first row) and dense softmax (the second).

    The distance in loss to dense entmax has an interval: blocks are drawn again, the same ones for both
    (`sparsefinder.analysis.bootstrap`).
    """
    table = tables.tidy([outcome.row for outcome in outcomes])
    entmax, softmax = table.iloc[0], table.iloc[1]
    for name in ("loss", *judge.measures):
        table[f"{name}_minus_entmax"] = table[name] - entmax[name]
        table[f"{name}_minus_softmax"] = table[name] - softmax[name]
    dense = outcomes[0].blocks
    weights = dense[judge.unit].to_numpy(float)
    ends = [ratio_difference(each.blocks["loss"].to_numpy(), dense["loss"].to_numpy(), weights) for each in outcomes]
    table["loss_minus_entmax_low"], table["loss_minus_entmax_high"] = (list(side) for side in zip(*ends, strict=True))
    table["speed_against_dense"] = entmax["latency_ms"] / table["latency_ms"]
    table["speed_against_softmax"] = softmax["latency_ms"] / table["latency_ms"]
    for row in table.iloc[2:].itertuples():
        if row.speed_against_dense < 1 and row.attention not in SLOW:
            log.info("%s is slower than exact dense entmax: %.2f × its speed", row.variant, row.speed_against_dense)
        if row.loss_minus_entmax_high < 0:
            log.warning(
                "%s has a lower loss than dense attention, by %.3f: look twice", row.variant, -row.loss_minus_entmax
            )
    return table
