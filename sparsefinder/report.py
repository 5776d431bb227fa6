"""The stage ``report``: figures, and one HTML file that works offline, from what ``score`` and ``evaluate`` wrote.

It computes nothing about attention: every number comes from the tables and manifests of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparsefinder.analysis import frontiers
from sparsefinder.analysis.method_families import ALL_OTHERS
from sparsefinder.errors import UserError
from sparsefinder.reporting import length_tables, text_tables
from sparsefinder.reporting import words as words_of
from sparsefinder.reporting.page import loading, page
from sparsefinder.reporting.results import Results
from sparsefinder.storage import growing_table, tables
from sparsefinder.storage.store import Store, content_hash

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportSettings:
    """Settings of the stage ``report``."""

    title: str | None = None  # of the document; None: the name of the run directory
    levels: tuple[float, ...] = frontiers.LEVELS  # shares of the allowed pairs at which recall is compared
    # shares of the multiplications of dense attention at which recall is compared, prediction and attention together
    cost_levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    dpi: int = 200  # of the figures as PNG
    # folders of other runs or sweeps to report on instead of this one: seeds as mean ± deviation, other points side by side
    runs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("levels", "cost_levels"):
            levels = tuple(getattr(self, name))
            object.__setattr__(self, name, levels)  # a list from a configuration file
            if not levels or not all(0 < level < 1 for level in levels):
                raise UserError(f"report.{name} must be shares between 0 and 1, got {list(levels)}")
        object.__setattr__(self, "runs", tuple(self.runs))
        if self.dpi < 1:
            raise UserError(f"report.dpi must be 1 or more dots an inch, got {self.dpi}")

    @property
    def inputs(self) -> dict[str, str]:
        """What it reads of other runs, by content: where that changes, the report is made again."""
        tables_read = [
            path for run in self.runs for path in Path(run).rglob("*.json") if path.stem in ("score", "evaluate")
        ]
        return {str(path): content_hash(path) for path in sorted(tables_read)}

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing for certain: it reads whichever of score and evaluate are finished."""
        return ()


def run(settings: ReportSettings, store: Store) -> None:
    """Make ``report``: ``index.html``, every figure as PNG and SVG, and the table ``recall`` with intervals."""
    from sparsefinder.reporting import captions, style

    results = _read(settings, store)
    drawn = []
    if results.metrics is not None and results.points is not None:
        scored = results.manifests.get("score")
        distance = "l2" if scored is None else scored.settings.get("bucket_distance", "l2")
        beside = None if settings.runs else store.path("score")  # maps and histograms are of one run
        drawn = captions.of_score(results.metrics, results.points, beside, results.replicas, distance)
    if results.variants is not None:
        drawn[1:1] = captions.of_evaluate(results.variants, results.manifests.get("evaluate"))
    if results.compared is not None and "latency_ms" in results.compared:
        drawn.append(captions.of_compare(results.compared))
    vectors = {illustration.name: style.svg(illustration.figure) for illustration in drawn}
    title = settings.title or f"sparsefinder: {store.run_dir.resolve().name}"
    with store.writing("report") as folder:
        folder.mkdir()
        for illustration in drawn:
            style.save_png(illustration.figure, folder / f"{illustration.name}.png", settings.dpi)
            (folder / f"{illustration.name}.svg").write_text(vectors[illustration.name], encoding="utf-8")
        if results.points is not None:
            tables.write(
                text_tables.recall_numbers(results.points, results.densities(settings.levels), results.replicas),
                folder,
                "recall",
            )
        (folder / "index.html").write_text(
            page(title, results, drawn, vectors, results.densities(settings.levels), settings.cost_levels),
            encoding="utf-8",
        )
    log.info("report: %d figures and %s", len(drawn), store.run_dir / "report" / "index.html")


def _read(settings: ReportSettings, store: Store) -> Results:
    return Results.of_runs(settings.runs, store) if settings.runs else Results.read(store)


def summary(store: Store, settings: ReportSettings | None = None, asked: Mapping[str, Any] | None = None) -> str:
    """The main numbers as plain text, for the end of a run.

    ``asked``: the settings of the stages that were run, if it is to be about what they asked for and not about all that is
    there (see `growing`).
    """
    results = _read(settings or ReportSettings(), store)
    if asked is not None:
        results = results.only({name: growing_table.rows_asked(name, each, store) for name, each in asked.items()})
    several = bool(results.by_run)
    parts = [text_table(pd.DataFrame(results.facts, columns=["run", "value"]))] if results.facts else []
    if results.points is not None and text_tables.one_each(results.points):
        shares = ", ".join(f"{100 * level:g} %" for level in (settings or ReportSettings()).levels)
        note = f"Recall at {shares} of the pairs is read from a frontier: pattern=all sweeps one."
        parts.append(f"{words_of.MEASURED}\n{text_table(text_tables.measured_lines(results.points))}\n{note}")
    elif results.points is not None:
        levels = results.densities((settings or ReportSettings()).levels)
        lines = text_tables.recall_lines(results.points, levels, results.replicas, far=False, runs=results.by_run)
        parts.append(words_of.recall(several) + "\n" + text_table(lines))
        advantage = text_tables.advantage_lines(results.points, results.replicas, levels)
        if len(advantage):
            parts.append(words_of.with_interval(words_of.ADVANTAGE, several) + "\n" + text_table(advantage))
        if results.by_cost is not None:
            costs = (settings or ReportSettings()).cost_levels
            lines = text_tables.recall_lines(
                results.by_cost[0], costs, results.by_cost[1], far=False, runs=results.by_run_by_cost
            )
            parts.append(words_of.RECALL_BY_COST + "\n" + text_table(lines))
            advantage = text_tables.advantage_lines(*results.by_cost, costs, ALL_OTHERS, "cost")
            if len(advantage):
                parts.append(
                    words_of.with_interval(words_of.ADVANTAGE_BY_COST, several, said=True)
                    + "\n"
                    + text_table(advantage)
                )
    if results.variants is not None:
        scores = ["accuracy", "macro-F1", "exact match", "F1 of answers", "pooled cosine", "token cosine"]
        scores += ["text found by its title"]
        loss = [] if text_tables.of_states(results.variants) else ["loss, nats", "Δ dense entmax"]
        wanted = ["variant", *loss, *scores, "sparsity", "recall", "latency, ms"]
        lines = text_tables.variant_lines(results.variants, results.true_scores)
        lines = lines[[name for name in wanted if name in lines]]
        parts.append(f"In the model, on the same {text_tables.asked(results.variants)}\n" + text_table(lines))
    if results.exported is not None and asked is None:
        parts.append(f"To load the model with its predicted graph\n{loading(results.exported)}")
    if results.compared is not None and asked is None:
        parts.append(words_of.COMPARED + "\n" + text_table(length_tables.arm_lines(results.compared)))
    if results.equal_quality is not None and len(results.equal_quality) and asked is None:
        parts.append(length_tables.EQUAL + "\n" + text_table(length_tables.quality_lines(results.equal_quality)))
    if results.warnings:
        parts.append("Look twice\n" + "\n".join(f"  - {line}" for line in results.warnings))
    return "\n\n".join(parts)


def text_table(lines: pd.DataFrame) -> str:
    """A table of texts for a terminal: the first column to the left, the others to the right."""
    columns = [[str(name), *lines[name]] for name in lines]
    widths = [max(map(len, column)) for column in columns]
    sides = ["<", *">" * (len(columns) - 1)]
    rows = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    )
