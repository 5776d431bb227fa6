"""The stage ``report``: figures, and one HTML file that works offline, from what ``score`` and ``evaluate`` wrote.

It computes nothing about attention: every number comes from the tables and manifests of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparsefinder.analysis import frontiers
from sparsefinder.analysis.bootstrap import Replicas
from sparsefinder.analysis.iso_quality import alarms
from sparsefinder.analysis.method_families import ALL_OTHERS
from sparsefinder.errors import UserError
from sparsefinder.reporting import html, length_tables, text_tables
from sparsefinder.storage import growing_table, tables
from sparsefinder.storage.manifests import Manifest
from sparsefinder.storage.store import Store

if TYPE_CHECKING:
    from sparsefinder.reporting.captions import Illustration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportSettings:
    """Settings of the stage ``report``."""

    title: str | None = None  # of the document; None: the name of the run directory
    levels: tuple[float, ...] = frontiers.LEVELS  # shares of the allowed pairs at which recall is compared
    # shares of the multiplications of dense attention at which recall is compared, prediction and attention together
    cost_levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    dpi: int = 200  # of the figures as PNG

    def __post_init__(self) -> None:
        for name in ("levels", "cost_levels"):
            levels = tuple(getattr(self, name))
            object.__setattr__(self, name, levels)  # a list from a configuration file
            if not levels or not all(0 < level < 1 for level in levels):
                raise UserError(f"report.{name} must be shares between 0 and 1, got {list(levels)}")
        if self.dpi < 1:
            raise UserError(f"report.dpi must be 1 or more dots an inch, got {self.dpi}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing for certain: it reads whichever of score and evaluate are finished."""
        return ()


@dataclass(frozen=True)
class Results:
    """What there is to report; None where a stage was not run."""

    metrics: pd.DataFrame | None
    points: pd.DataFrame | None  # see `frontiers.points`
    variants: pd.DataFrame | None  # evaluate/results
    manifests: Mapping[str, Manifest]
    replicas: Replicas | None = None  # of the points
    budget: pd.DataFrame | None = None  # score/error_budget
    dials: pd.DataFrame | None = None  # calibration/dials
    exported: Path | None = None  # the folder sparse_model
    compared: pd.DataFrame | None = None  # compare/results
    equal_quality: pd.DataFrame | None = None  # compare/equal_quality

    @classmethod
    def read(cls, store: Store) -> Results:
        """Read the finished tables; a `UserError` where there is none."""
        score, evaluate, compare = (store.find(name) for name in ("score", "evaluate", "compare"))
        if score is None and evaluate is None and compare is None:
            raise UserError(
                f"nothing to report in {store.run_dir}: run stage=score, stage=evaluate or stage=compare first"
            )
        for name, found in (("score", score), ("evaluate", evaluate), ("compare", compare)):
            if found is not None:
                store.content(name)  # no number from tables that are not those that were written
        metrics = None if score is None else pd.read_parquet(score / "metrics.parquet")
        variants = None if evaluate is None else pd.read_parquet(evaluate / "results.parquet")
        points = None if metrics is None else frontiers.points(metrics)
        counts = None if score is None else _table(score / "counts.parquet")
        calibration = store.find("calibration")
        return cls(
            metrics,
            points,
            None if variants is None else frontiers.described(variants),
            text_tables.read_manifests(store),
            None if points is None or counts is None else Replicas.of(points, counts),
            None if score is None else _table(score / "error_budget.parquet"),
            None if calibration is None else _table(calibration / "dials.parquet"),
            store.find("sparse_model"),
            None if compare is None else _table(compare / "results.parquet"),
            None if compare is None else _table(compare / "equal_quality.parquet"),
        )

    def only(self, rows: Mapping[str, Sequence[Any]]) -> Results:
        """What these rows of ``score`` and ``evaluate`` say; a stage without any is left out."""
        metrics, points, variants, replicas = self.metrics, self.points, self.variants, self.replicas
        if metrics is not None and points is not None:
            mine = points["configuration"].isin(rows.get("score", ()))
            replicas = None if replicas is None else replicas.of_points([int(p) for p in mine.to_numpy().nonzero()[0]])
            points = points[mine].reset_index(drop=True)
            metrics = metrics[metrics["configuration"].isin(rows.get("score", ()))]
            if points.empty:
                metrics = points = replicas = None
        if variants is not None:  # dense attention is there to compare with
            mine = variants["variant"].isin(rows.get("evaluate", ()))
            variants = variants[mine | (variants["attention"] == "dense")] if mine.any() else None
        return replace(self, metrics=metrics, points=points, replicas=replicas, variants=variants)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the run noted about itself."""
        return text_tables.fact_lines(self.manifests)

    @property
    def warnings(self) -> list[str]:
        """What to look at twice."""
        compared = [] if self.compared is None else alarms(self.compared)
        return text_tables.warnings(self.points, self.variants, self.manifests) + compared

    @property
    def by_cost(self) -> tuple[pd.DataFrame, Replicas | None] | None:
        """The points and their replicas with the total cost in the place of the density; None where no cost is known."""
        if self.points is None or self.points["total_cost"].isna().all():
            return None
        shares = self.points["prediction_share"].to_numpy(float)
        return frontiers.by_cost(self.points), None if self.replicas is None else self.replicas.by_cost(shares)

    def densities(self, settings: ReportSettings) -> list[float]:
        """The levels of the settings, and that of the gold graph where it is not almost one of them."""
        gold = [] if self.points is None else text_tables.gold_density(self.points)
        new = [density for density in gold if all(abs(density - level) > 0.05 * level for level in settings.levels)]
        return sorted({*settings.levels, *new})


def _table(path: Path) -> pd.DataFrame | None:
    return pd.read_parquet(path) if path.is_file() else None


def run(settings: ReportSettings, store: Store) -> None:
    """Make ``report``: ``index.html``, every figure as PNG and SVG, and the table ``recall`` with intervals."""
    from sparsefinder.reporting import captions, style

    results = Results.read(store)
    drawn = []
    if results.metrics is not None and results.points is not None:
        scored = results.manifests.get("score")
        distance = "l2" if scored is None else scored.settings.get("bucket_distance", "l2")
        drawn = captions.of_score(results.metrics, results.points, store.path("score"), results.replicas, distance)
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
                text_tables.recall_numbers(results.points, results.densities(settings), results.replicas),
                folder,
                "recall",
            )
        (folder / "index.html").write_text(_html(title, results, drawn, vectors, settings), encoding="utf-8")
    log.info("report: %d figures and %s", len(drawn), store.run_dir / "report" / "index.html")


def summary(store: Store, settings: ReportSettings | None = None, asked: Mapping[str, Any] | None = None) -> str:
    """The main numbers as plain text, for the end of a run.

    ``asked``: the settings of the stages that were run, if it is to be about what they asked for and not about all that is
    there (see `growing`).
    """
    results = Results.read(store)
    if asked is not None:
        results = results.only({name: growing_table.rows_asked(name, each, store) for name, each in asked.items()})
    parts = [text_table(pd.DataFrame(results.facts, columns=["run", "value"]))] if results.facts else []
    if results.points is not None and text_tables.one_each(results.points):
        shares = ", ".join(f"{100 * level:g} %" for level in (settings or ReportSettings()).levels)
        note = f"Recall at {shares} of the pairs is read from a frontier: pattern=all sweeps one."
        parts.append(f"{_MEASURED}\n{text_table(text_tables.measured_lines(results.points))}\n{note}")
    elif results.points is not None:
        levels = results.densities(settings or ReportSettings())
        lines = text_tables.recall_lines(results.points, levels, results.replicas, far=False)
        parts.append(_RECALL + "\n" + text_table(lines))
        advantage = text_tables.advantage_lines(results.points, results.replicas, levels)
        if len(advantage):
            parts.append(_ADVANTAGE + "\n" + text_table(advantage))
        if results.by_cost is not None:
            costs = (settings or ReportSettings()).cost_levels
            lines = text_tables.recall_lines(results.by_cost[0], costs, results.by_cost[1], far=False)
            parts.append(_RECALL_BY_COST + "\n" + text_table(lines))
            advantage = text_tables.advantage_lines(*results.by_cost, costs, ALL_OTHERS, "cost")
            if len(advantage):
                parts.append(_ADVANTAGE_BY_COST + "\n" + text_table(advantage))
    if results.variants is not None:
        scores = ["accuracy", "macro-F1", "exact match", "F1 of answers", "pooled cosine", "token cosine"]
        scores += ["text found by its title"]
        loss = [] if text_tables.of_states(results.variants) else ["loss, nats", "Δ dense entmax"]
        wanted = ["variant", *loss, *scores, "sparsity", "recall", "latency, ms"]
        lines = text_tables.variant_lines(results.variants)
        lines = lines[[name for name in wanted if name in lines]]
        parts.append(f"In the model, on the same {text_tables.asked(results.variants)}\n" + text_table(lines))
    if results.exported is not None and asked is None:
        parts.append(f"To load the model with its predicted graph\n{_loading(results.exported)}")
    if results.compared is not None and asked is None:
        parts.append(_COMPARED + "\n" + text_table(length_tables.arm_lines(results.compared)))
    if results.equal_quality is not None and len(results.equal_quality) and asked is None:
        parts.append(length_tables.EQUAL + "\n" + text_table(length_tables.quality_lines(results.equal_quality)))
    if results.warnings:
        parts.append("Look twice\n" + "\n".join(f"  - {line}" for line in results.warnings))
    return "\n\n".join(parts)


def _loading(folder: Path) -> str:
    """The lines that load what the stage ``export`` made, in a script of one's own."""
    return (
        "import sparsefinder\nfrom transformers import AutoTokenizer\n\n"
        f"model = sparsefinder.load({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        'states = model.base_model(**tokenizer("A long text.", return_tensors="pt"))[0]'
    )


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


def _html(
    title: str,
    results: Results,
    drawn: list[Illustration],
    vectors: Mapping[str, str],
    settings: ReportSettings,
) -> str:
    sections = []
    if answer := _answer(results, settings):
        sections.append(("The answer", answer))
    if results.facts:
        sections.append(("The run", html.facts(results.facts)))
    if results.warnings:
        sections.append(("Look twice", html.warning(results.warnings)))
    parts = _tables(results, settings)
    for illustration in drawn:
        content = html.figure(vectors[illustration.name], illustration.caption)
        sections.append((illustration.heading, content + parts.pop(illustration.name, html.Markup(""))))
    sections += [(_UNDRAWN[name], content) for name, content in parts.items()]
    if results.budget is not None and len(results.budget):
        budget = html.table(text_tables.budget_lines(results.budget), ["method", "step"])
        sections.append(("Where recall is lost, and where it is gained", budget + html.note(_BUDGET)))
    if results.dials is not None:
        sections.append(
            ("Calibrated sparsity parameters", html.table(text_tables.calibration_lines(results.dials), _DIALS))
        )
    if results.exported is not None:
        sections.append(("Take the model with you", html.code(_loading(results.exported))))
    sections.append(("Where it comes from", _provenance(results.manifests)))
    lead = "Which keys will a query need? Predicted graphs against the support of the dense entmax attention (gold)."
    return html.document(title, lead, sections)


def _answer(results: Results, settings: ReportSettings) -> html.Markup | None:
    """One sentence, and the small table that it is read from; None where ours and others were not both scored."""
    if results.points is None:
        return None
    levels = results.densities(settings)
    lines = text_tables.advantage_lines(results.points, results.replicas, levels, ALL_OTHERS)
    if lines.empty:
        return None
    words = [str(name) for name in lines]
    row = lines[lines["pairs"] == "10 %"].iloc[0] if "10 %" in set(lines["pairs"]) else lines.iloc[-1]
    ours, other = str(row["recall"]).split(" against ")
    sentence = (
        f"With {row['pairs']} of the pairs {row['ours']} finds {ours} of the gold edges without comparing every pair; the best "
        f"other method, {row['best other']}, finds {other}."
    )
    parts = [html.note(sentence), html.table(lines, words)]
    if results.by_cost is not None:
        by_cost = text_tables.advantage_lines(*results.by_cost, settings.cost_levels, ALL_OTHERS, "cost")
        if len(by_cost):
            parts += [html.note(f"{_ADVANTAGE_BY_COST}:"), html.table(by_cost, [str(name) for name in by_cost])]
    return html.Markup("\n").join(parts)


_RECALL = "Recall of gold edges at equal density (± half the 95 % interval over documents; * compares every pair)"
_COMPARED = "Every attention at every length, in the model, on the same words"
_MEASURED = "Each configuration as it was asked for, means over samples, layers and heads"
_ADVANTAGE = (
    "The best sub-quadratic pattern of ours minus the best published one (95 % interval, paired over documents)"
)
_RECALL_BY_COST = (
    "Recall of gold edges at equal total cost: multiplications of prediction and attention, as a share of those of dense "
    "attention over all allowed pairs (± as above)"
)
_ADVANTAGE_BY_COST = (
    "The best sub-quadratic pattern of ours minus the best of all others at equal total cost (as above)"
)
_BUDGET = (
    "Change of recall at equal density from one step to the next, with its 95 % interval, paired over documents. True "
    "scores: the best oracle of those that were scored. –: one of the two does not reach that density."
)
_DIALS = ["pattern", "united with", "target", "dial"]
_UNDRAWN = {
    "recall_sparsity": "Recall at equal density",
    "loss_sparsity": "In the model",
    "loss_by_time": "Every attention at every length",
}  # tables without their figure


def _tables(results: Results, settings: ReportSettings) -> dict[str, html.Markup]:
    """Tables by the figure that they belong to."""
    parts = {}
    if results.points is not None:
        levels = results.densities(settings)
        lines = text_tables.recall_lines(results.points, levels, results.replicas)
        words = (
            "Best recall of each pattern where it names that share of the allowed pairs, on the straight line between the "
            "neighbouring points of its frontier. Not reached: its configurations do not come there. In brackets: recall "
            "of the gold edges outside the window and the global tokens. ±: half the width of the 95 % interval over documents "
            "drawn again (and over seeds, where there are several). * compares every pair."
        )
        parts["recall_sparsity"] = html.table(lines, ["pattern", "united with"]) + html.note(words)
        advantage = text_tables.advantage_lines(results.points, results.replicas, levels)
        if len(advantage):
            parts["recall_sparsity"] += html.note(f"{_ADVANTAGE}:") + html.table(
                advantage, [str(name) for name in advantage]
            )
    if results.by_cost is not None:
        by_cost = text_tables.recall_lines(results.by_cost[0], settings.cost_levels, results.by_cost[1], far=False)
        parts["recall_sparsity"] += html.note(f"{_RECALL_BY_COST}:") + html.table(by_cost, ["pattern", "united with"])
        advantage = text_tables.advantage_lines(*results.by_cost, settings.cost_levels, ALL_OTHERS, "cost")
        if len(advantage):
            parts["recall_sparsity"] += html.note(f"{_ADVANTAGE_BY_COST}:")
            parts["recall_sparsity"] += html.table(advantage, [str(name) for name in advantage])
    if results.variants is not None:
        words = (
            "Graph metrics are those of the executed graph; not defined: the attention has no token graph. Computed pairs: pairs "
            "really multiplied, padding and tiles included, as a share of the allowed ones. Output error: relative L2 distance "
            "of the layers' outputs to dense attention. Latency: median of a batch, with the share that the predictor takes."
        )
        parts["loss_sparsity"] = html.table(text_tables.variant_lines(results.variants), ["variant"]) + html.note(words)
    if results.compared is not None:
        words = f"{length_tables.COLUMNS} {length_tables.EQUAL}:"
        parts["loss_by_time"] = html.table(length_tables.arm_lines(results.compared), ["attention"]) + html.note(words)
        if results.equal_quality is not None and len(results.equal_quality):
            lines = length_tables.quality_lines(results.equal_quality)
            parts["loss_by_time"] += html.table(lines, ["length", "fastest"])
    return parts


def _provenance(manifests: Mapping[str, Manifest]) -> html.Markup:
    lines = text_tables.artefact_lines(manifests)
    versions: dict[str, str] = {}
    for manifest in manifests.values():
        versions |= manifest.versions
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    settings = [html.folded(f"Settings of {manifest.stage}", manifest.settings) for manifest in manifests.values()]
    settings = list(dict.fromkeys(settings))  # a stage that makes two artefacts has its settings once
    return (
        html.table(lines, ["artefact", "stage", "content", "made from"])
        + html.note(words)
        + html.Markup("\n").join(settings)
    )
