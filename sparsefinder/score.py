"""The stage ``score``: measure patterns on recorded queries and keys; no model is needed.

Samples are taken one by one and layer by layer. The gold graph of a layer is computed once and shared by all configurations,
so a frontier of a hundred configurations costs a hundred predictions and one dense attention.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsefinder.analysis import frontiers
from sparsefinder.analysis.bootstrap import Replicas
from sparsefinder.analysis.comparisons import error_budget
from sparsefinder.errors import UserError
from sparsefinder.evaluation.other_seeds import other_seeds, seedless
from sparsefinder.evaluation.shared_buckets import distance_histogram, shared_buckets
from sparsefinder.experiment.calibration import calibrated
from sparsefinder.experiment.configuration import Configuration, Learned, between_texts, buildable, fitted, needed
from sparsefinder.experiment.costs import costs
from sparsefinder.graphs import QK, Buckets, Pattern
from sparsefinder.metrics import BALANCE, COSTS, RATIOS, Counts, Gold, balance, count
from sparsefinder.numerics.distances import PAIRWISE
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.combine import layout_of
from sparsefinder.patterns.lowrank import LowRank
from sparsefinder.storage import distributed, tables
from sparsefinder.storage.growing_table import Item, Table
from sparsefinder.storage.held_out import validation_samples
from sparsefinder.storage.manifests import plain
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

_AT_ONCE = 16  # samples whose counts are put together: many small tensors take ten times their content


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of the stage ``score``."""

    configurations: tuple[Configuration, ...]
    target: str | None = None  # patterns are scored also as the stage calibrate set them for it
    alpha: float = 1.5  # of the entmax whose support is gold
    causal: bool = False
    samples: int | None = None  # held-out samples to measure on; None: all
    seeds: int = 1  # times that a pattern which draws random numbers is scored, each with another seed
    map_tokens: int = 64  # tokens in the attention maps kept for the report
    # drawn against the number of buckets shared: cos, euclidean, l2, direction, minkowski, min or min_norm
    bucket_distance: str = "l2"
    bucket_bins: int = 0  # of a histogram of that distance for each such number; 0: its mean alone

    def __post_init__(self) -> None:
        Normalizer(self.alpha)
        if self.samples is not None and self.samples < 1:
            raise UserError(f"score.samples must be 1 or more, or null for all, got {self.samples}")
        if self.bucket_distance not in PAIRWISE:
            raise UserError(
                f"score.bucket_distance={self.bucket_distance} is unknown; choose one of {', '.join(PAIRWISE)}"
            )
        if self.bucket_bins < 0:
            raise UserError(f"score.bucket_bins must be 1 or more, or 0 for no histogram, got {self.bucket_bins}")
        if self.seeds < 1:
            raise UserError(f"score.seeds must be 1 or more, got {self.seeds}")

    @property
    def items(self) -> tuple[Item, ...]:
        """What is to be scored: each configuration, and with a target also as it is calibrated for that."""
        swept = (
            [each for each in self.configurations if each.pattern.sparsity_parameter is not None] if self.target else []
        )
        items = [
            *(self.item(each, None) for each in self.configurations),
            *(self.item(e, self.target) for e in swept),
        ]
        return tuple({item.key: item for item in items}.values())

    @property
    def shared(self) -> dict[str, Any]:
        """What all rows of a table have in common."""
        return {
            name: getattr(self, name)
            for name in ("alpha", "causal", "samples", "map_tokens", "bucket_distance", "bucket_bins")
        }

    def item(self, configuration: Configuration, target: str | None) -> Item:
        """A configuration among the items; with a target without the values for each head, which the calibration knows."""
        what = plain(configuration if target is None else replace(configuration, dials=None))
        if target is not None:
            what["pattern"][configuration.pattern.sparsity_parameter] = None
        seeds = self.seeds if hasattr(configuration.pattern, "seed") else 1
        needs = ("qk_validation", *configuration.needs, *(("calibration",) if target else ()))
        return Item(json.loads(json.dumps({"configurations": what, "target": target})), {"seeds": seeds}, needs)

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage: what the chosen patterns work with, and the held-out samples."""
        return ("qk_validation", *needed(self.configurations), *(("calibration",) if self.target else ()))


def run(settings: ScoreSettings, store: Store) -> None:
    """Make ``score``: ``metrics`` (one row per configuration × layer × head), ``counts`` (also × sample) and more."""
    held_out = validation_samples(store)
    samples = held_out.part(0, settings.samples or len(held_out))
    learned = Learned.of(store, settings.configurations, samples.group)
    learned.check(*samples.shape)
    fits = fitted(settings.configurations, *samples.shape[:2])
    typed = dict(zip(map(id, fits), settings.configurations, strict=True))
    configurations = buildable(fits, learned)
    if samples.crosses:
        configurations = between_texts(configurations, learned, *samples.shape[1:])
    if settings.target is not None:
        configurations += calibrated(configurations, store.path("calibration"), settings.target)
    table = Table.of("score", settings, store)
    wanted = {item.key: item for item in table.wanted}
    items = [
        settings.item(typed.get(id(each), each), each.dials.target if settings.target and each.dials else None)
        for each in configurations
    ]
    asked = [(each, wanted[item.key]) for each, item in zip(configurations, items, strict=True) if item.key in wanted]
    owners = {seedless(each): item for each, item in reversed(asked)}
    seeded = other_seeds(tuple(each for each, _ in asked), samples, learned, settings.seeds, settings.causal)
    asked += [(each, owners[seedless(each)]) for each in seeded]
    if not asked:
        raise UserError(f"none of {len(configurations)} configurations is left to score: see what was said of each")
    settings = replace(settings, configurations=tuple(each for each, _ in asked))
    scores = Scores.cat(
        distributed.parts(lambda: score(samples, settings, learned, distributed.share(range(len(samples)))))
    )
    if not distributed.first():
        return
    metrics = table.grown(metrics_table(scores, settings, learned, samples.shape[2], samples.crosses), "metrics")
    points = frontiers.points(metrics)
    with store.writing("score") as folder:
        folder.mkdir()
        tables.write(metrics, folder, "metrics")
        write_counts(scores, folder / "counts.parquet", table)  # long: for programs only
        counts = pd.read_parquet(folder / "counts.parquet")
        tables.write(error_budget(points, Replicas.of(points, counts)), folder, "error_budget")
        looked_at, distance = (samples, settings.configurations, learned), settings.bucket_distance
        shared = shared_buckets(*looked_at, settings.alpha, settings.causal, distance)
        tables.write(table.grown(shared, "shared_buckets"), folder, "shared_buckets")
        if settings.bucket_bins:
            histogram = distance_histogram(*looked_at, settings.bucket_bins, settings.causal, distance)
            tables.write(table.grown(histogram, "distance_histogram"), folder, "distance_histogram")
        save_maps(folder / "maps.safetensors", samples, settings, learned, points, table)
        table.write(folder, store, ((place, item) for place, (_, item) in enumerate(asked, table.first)))
    store.note("score", samples=len(samples), gold_sparsity=scores.gold_sparsity)


@dataclass(frozen=True)
class Scores:
    """Counts ``(samples, H)`` of each ``(configuration, layer)``, and bucket balance where there are buckets."""

    counts: Mapping[tuple[int, int], Counts]
    balance: Mapping[tuple[int, int], Mapping[str, Tensor]]

    @classmethod
    def cat(cls, parts: list[Scores]) -> Scores:
        """Scores of several runs of neighbouring samples, one after the other."""
        counts: dict[tuple[int, int], list[Counts]] = {}
        balances: dict[tuple[int, int], list[Mapping[str, Tensor]]] = {}
        for part in parts:
            for key, found in part.counts.items():
                counts.setdefault(key, []).append(found)
            for key, shares in part.balance.items():
                balances.setdefault(key, []).append(shares)
        return cls(
            {key: Counts.cat(found) for key, found in counts.items()},
            {
                key: {name: torch.cat([each[name] for each in found]) for name in BALANCE}
                for key, found in balances.items()
            },
        )

    @property
    def gold_sparsity(self) -> float:
        """Mean over layers, heads and samples."""
        each = [
            counts.ratios()["gold_sparsity"] for (configuration, _), counts in self.counts.items() if configuration == 0
        ]
        return torch.cat(each).mean().item()


@torch.no_grad()
def score(samples: Samples, settings: ScoreSettings, learned: Learned, indices: Sequence[int] | None = None) -> Scores:
    """Count every configuration on every sample, or on those of ``indices``.

    Nothing larger than one layer of one sample is in memory at a time, but for the counts.
    """
    indices = range(len(samples)) if indices is None else indices
    some = [indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE)]
    # configurations that differ in nothing but their local and global tokens follow one another
    groups = groupby(
        range(len(settings.configurations)), lambda index: settings.configurations[index].without_local_and_global
    )
    predictions = [Prediction.of(shared, list(members), learned) for shared, members in groups]
    return Scores.cat([_score(samples, settings, predictions, part) for part in progress(some, "score")])


@dataclass(frozen=True)
class Prediction:
    """A pattern without local and global tokens, run once for the configurations (by index) that unite it with theirs."""

    pattern: Pattern
    as_graph: bool  # it has no bucketed form
    indices: Sequence[int]

    @classmethod
    def of(cls, shared: Configuration, indices: Sequence[int], learned: Learned) -> Prediction:
        """What `shared` builds from what was learned; it fills the columns `indices` of the counts."""
        return cls(shared.build(learned), shared.quadratic or shared.dials is not None, indices)

    def __call__(self, qk: QK, layer: int) -> tuple[Tensor, Buckets | None]:
        """The graph ``(B, H, N, N)`` bool, and its buckets where it has any."""
        if self.as_graph:
            return self.pattern(qk, layer), None
        layout = layout_of(self.pattern, qk, layer)
        return layout.graph(qk), layout.buckets


def _score(
    samples: Samples, settings: ScoreSettings, predictions: Sequence[Prediction], indices: Sequence[int]
) -> Scores:
    layers, heads, _ = samples.shape
    configurations = settings.configurations
    unions = {configuration.united_with: configuration for configuration in configurations}
    # in one tensor each: small tensors kept between large ones that come and go make the heap grow by gigabytes
    room = (len(configurations), layers, len(indices), heads)
    kept = {f.name: torch.zeros(room, dtype=torch.float64 if f.name == "mass" else torch.int64) for f in fields(Counts)}
    balances = {name: torch.zeros(room, dtype=torch.float64) for name in BALANCE}
    balanced: set[tuple[int, int]] = set()
    for at, index in enumerate(indices):
        for layer, qk in enumerate(samples.layers(index, settings.causal)):
            gold = Gold.of(qk, settings.alpha)
            near = {tokens: any_with_them.near(qk) for tokens, any_with_them in unions.items()}
            for predict in predictions:
                graph, buckets = predict(qk, layer)
                shares = {} if buckets is None else balance(buckets, qk.valid)
                for row in predict.indices:
                    pairs_near = near[configurations[row].united_with]
                    counts = count(graph if pairs_near is None else graph | pairs_near, gold, qk, pairs_near)
                    for name, room_of in kept.items():
                        room_of[row, layer, at] = getattr(counts, name)[0]
                    if shares:
                        balanced.add((row, layer))
                    for name, share in shares.items():
                        balances[name][row, layer, at] = share[0]
    return Scores(
        {
            (row, layer): Counts(**{name: values[row, layer] for name, values in kept.items()})
            for row in range(len(configurations))
            for layer in range(layers)
        },
        {key: {name: values[key] for name, values in balances.items()} for key in sorted(balanced)},
    )


def metrics_table(
    scores: Scores, settings: ScoreSettings, learned: Learned, size: int, crosses: bool = False
) -> pd.DataFrame:
    """One row per configuration × layer × head; metrics are means over samples (see `sparsefinder.metrics`).

    ``size`` is that of the heads; ``crosses`` where keys are of another text than queries.
    """
    rows = []
    built = [configuration.build(learned) for configuration in settings.configurations]
    for (index, layer), counts in scores.counts.items():
        configuration = settings.configurations[index]
        means = counts.macro() | {
            name: values.nanmean(0) for name, values in scores.balance.get((index, layer), {}).items()
        }
        means |= costs(built[index], counts, size, crosses)
        own = configuration.columns
        if "alpha" in own:  # not the one of the gold graph
            own["pattern_alpha"] = own.pop("alpha")
        sizes = {name: size for name, size in learned.sizes(configuration.needs).items() if own.get(name) is None}
        for head in range(counts.gold.shape[1]):
            its_own = isinstance(configuration.pattern, LowRank) and not configuration.shares
            true_scores = its_own and sizes.get("rounds", 0) >= size
            rows.append(
                {"configuration": index, **own, **sizes, "true_scores": true_scores}
                | {"causal": settings.causal, "alpha": settings.alpha, "quadratic": configuration.quadratic}
                | {"samples": counts.gold.shape[0], "layer": layer, "head": head}
                | {name: means[name][head].item() for name in (*RATIOS, *COSTS, *BALANCE) if name in means}
            )
    return tables.tidy(rows)


def write_counts(scores: Scores, path: Path, grown: Table) -> None:
    """One row per configuration × layer × head × sample with the raw counts, so that any regrouping is exact.

    Long, so for programs only, and written layer by layer; what ``grown`` keeps comes before.
    """
    with contextlib.ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        if grown.folder is not None and grown.rows:
            old = stack.enter_context(pq.ParquetFile(grown.folder / "counts.parquet"))
            writer = stack.enter_context(pq.ParquetWriter(path, old.schema_arrow))
            for group in range(old.num_row_groups):
                part = old.read_row_group(group)
                writer.write_table(part.filter(pc.is_in(part["configuration"], pa.array(grown.rows, pa.int64()))))
        for frame in counts_tables(scores, grown.first):
            table = pa.Table.from_pandas(frame, preserve_index=False)
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)


def counts_tables(scores: Scores, first: int = 0) -> Iterator[pd.DataFrame]:
    """The raw counts of each configuration, numbered from ``first``, and layer: one row per sample × head."""
    for (index, layer), counts in scores.counts.items():
        samples, heads = counts.gold.shape
        grid = np.indices((samples, heads)).reshape(2, -1)
        columns = {f.name: getattr(counts, f.name).flatten().numpy() for f in fields(Counts)}
        yield pd.DataFrame(
            {"configuration": first + index, "layer": layer, "head": grid[1], "sample": grid[0], **columns}
        )


def save_maps(
    path: Path,
    samples: Samples,
    settings: ScoreSettings,
    learned: Learned,
    points: pd.DataFrame,
    grown: Table,
) -> None:
    """All heads of one held-out sample for the report: the dense probabilities, and the graphs of the best configurations.

    ``gold``: ``(L, H, n, n)`` float32; ``predicted_<configuration>``: bool of the same shape; the first ``map_tokens`` tokens.
    A configuration that was kept is drawn where it was drawn before.
    """
    old = {} if grown.folder is None else load_file(grown.folder / "maps.safetensors")
    before = [row for row in grown.rows if f"predicted_{row}" in old]
    drawable = points["configuration"].isin([*before, *range(grown.first, grown.first + len(settings.configurations))])
    chosen = [int(place) for place in frontiers.comparable(points[drawable])["configuration"]]
    kept = {f"predicted_{place}": old[f"predicted_{place}"] for place in chosen if place in before}
    patterns = {p: settings.configurations[p - grown.first].build(learned) for p in chosen if p >= grown.first}
    tokens = min(settings.map_tokens, samples.lengths[0], samples.query_lengths[0])
    layers = list(samples.layers(0, settings.causal))
    gold = torch.stack([_begin_of(Gold.of(qk, settings.alpha), tokens) for qk in layers])
    maps = {"gold": gold, **kept}
    for place, pattern in patterns.items():
        graph = torch.stack([pattern(qk, layer)[0, :, :tokens, :tokens] for layer, qk in enumerate(layers)])
        maps[f"predicted_{place}"] = graph.contiguous()
    save_file(maps, path)


def _begin_of(gold: Gold, tokens: int) -> Tensor:
    """The probabilities of one example between its first tokens, ``(H, tokens, tokens)``."""
    queries = gold.rows % gold.shape[-2]
    some = (queries < tokens) & (gold.keys < tokens)
    begin = gold.mass.new_zeros(gold.shape[1], tokens, tokens)
    begin[gold.heads[some], queries[some], gold.keys[some]] = gold.mass[some]
    return begin
