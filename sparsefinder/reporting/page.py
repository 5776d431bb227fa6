"""The page of a report: its sections in their order, each made of tables, figures and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from sparsefinder.analysis.method_families import ALL_OTHERS
from sparsefinder.reporting import html, length_tables, text_tables
from sparsefinder.reporting import words as words_of
from sparsefinder.reporting.answer import answers
from sparsefinder.reporting.interactive import frontier_data
from sparsefinder.reporting.results import Results
from sparsefinder.storage.manifests import Manifest

if TYPE_CHECKING:
    from sparsefinder.reporting.captions import Illustration


def page(
    title: str,
    results: Results,
    drawn: list[Illustration],
    vectors: Mapping[str, str],
    levels: Sequence[float],
    cost_levels: Sequence[float],
) -> str:
    """The whole document.

    Args:
        title: Its heading.
        results: What there is to say.
        drawn: Figures in their order.
        vectors: The same as SVG, by their names.
        levels: Shares of the pairs at which recall is compared.
        cost_levels: Shares of the multiplications of dense attention at which it is.
    """
    sections = []
    if answer := _answer(results, levels, cost_levels):
        sections.append(("The answer", answer))
    if results.warnings:
        sections.append(("Look twice", html.warning(results.warnings)))
    if results.facts:
        sections.append(("The run", html.facts(results.facts)))
    parts = _tables(results, levels, cost_levels)
    for illustration in drawn:
        content = html.figure(vectors[illustration.name], illustration.caption)
        if illustration.name == "recall_sparsity" and results.points is not None:
            data = frontier_data(results.points, results.variants)
            content = html.frontier(data, vectors[illustration.name], words_of.TO_HOVER)
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
        sections.append(("Take the model with you", html.code(loading(results.exported))))
    sections.append(("Where it comes from", _provenance(results.manifests)))
    lead = "Which keys will a query need? Predicted graphs against the support of the dense entmax attention (gold)."
    return html.document(title, lead, sections)


def _answer(results: Results, levels: Sequence[float], cost_levels: Sequence[float]) -> html.Markup | None:
    """The three answers, and the small tables that they are read from; None where nothing can be said."""
    several = bool(results.by_run)
    said = answers(results.points, results.variants, results.compared)
    parts = [html.answer(said)] if said else []
    if results.points is not None:
        best = text_tables.advantage_lines(results.points, results.replicas, levels, ALL_OTHERS)
        if len(best):
            parts += [
                html.note(f"{words_of.with_interval(words_of.ADVANTAGE_OVER_ALL, several)}:"),
                html.table(best, _NAMES),
            ]
    if results.by_cost is not None:
        best = text_tables.advantage_lines(*results.by_cost, cost_levels, ALL_OTHERS, "cost")
        if len(best):
            parts += [
                html.note(f"{words_of.with_interval(words_of.ADVANTAGE_BY_COST, several, said=True)}:"),
                html.table(best, _NAMES),
            ]
    return html.Markup("\n").join(parts) if parts else None


_BUDGET = (
    "Change of recall at equal density from one step to the next, with its 95 % interval, paired over documents. True "
    "scores: the best oracle of those that were scored. –: one of the two does not reach that density."
)
_NAMES = ["ours", "best other", "best published"]  # columns of words beside numbers
_DIALS = ["pattern", "united with", "target", "dial"]
_UNDRAWN = {
    "recall_sparsity": "Recall at equal density",
    "loss_sparsity": "In the model",
    "loss_by_time": "Every attention at every length",
}  # tables without their figure


def _tables(results: Results, levels: Sequence[float], cost_levels: Sequence[float]) -> dict[str, html.Markup]:
    """Tables by the figure that they belong to."""
    parts = {}
    several = bool(results.by_run)
    spread = (
        "one deviation over the runs."
        if several
        else "half the width of the 95 % interval over documents drawn again (and over seeds, where there are several)."
    )
    if results.points is not None:
        lines = text_tables.recall_lines(results.points, levels, results.replicas, runs=results.by_run)
        words = (
            "Best recall of each pattern where it names that share of the allowed pairs, on the straight line between the "
            "neighbouring points of its frontier. Not reached: its configurations do not come there. In brackets: recall "
            f"of the gold edges outside the window and the global tokens. ±: {spread} * compares every pair. Marked: the best "
            "that does not."
        )
        parts["recall_sparsity"] = _recalls(lines) + html.note(words)
        advantage = text_tables.advantage_lines(results.points, results.replicas, levels)
        if len(advantage):
            parts["recall_sparsity"] += html.note(
                f"{words_of.with_interval(words_of.ADVANTAGE, several)}:"
            ) + html.table(advantage, _NAMES)
    if results.by_cost is not None:
        by_cost = text_tables.recall_lines(
            results.by_cost[0], cost_levels, results.by_cost[1], far=False, runs=results.by_run_by_cost
        )
        parts["recall_sparsity"] += html.note(f"{words_of.RECALL_BY_COST}:") + _recalls(by_cost)
        advantage = text_tables.advantage_lines(*results.by_cost, cost_levels, ALL_OTHERS, "cost")
        if len(advantage):
            parts["recall_sparsity"] += html.note(
                f"{words_of.with_interval(words_of.ADVANTAGE_BY_COST, several, said=True)}:"
            )
            parts["recall_sparsity"] += html.table(advantage, _NAMES)
    if results.variants is not None:
        words = (
            "Graph metrics are those of the executed graph; not defined: the attention has no token graph. Computed pairs: "
            "pairs really multiplied, padding and tiles included, as a share of the allowed ones. Output error: relative L2 "
            "distance of the layers' outputs to dense attention. Latency: median of a batch, with the share that the predictor "
            "takes. Marked: the best, bounds apart."
        )
        lines = text_tables.variant_lines(results.variants, results.true_scores)
        parts["loss_sparsity"] = html.table(lines, ["variant"], _BEST_VARIANT) + html.note(words)
    if results.compared is not None:
        words = f"{length_tables.COLUMNS} {length_tables.EQUAL}:"
        parts["loss_by_time"] = html.table(length_tables.arm_lines(results.compared), ["attention"]) + html.note(words)
        if results.equal_quality is not None and len(results.equal_quality):
            lines = length_tables.quality_lines(results.equal_quality)
            parts["loss_by_time"] += html.table(lines, ["length", "fastest"])
    return parts


_BEST_VARIANT = {
    **dict.fromkeys(("loss, nats", "1 − token cosine", "Δ dense entmax", "latency, ms", "output error"), "min"),
    **dict.fromkeys(("accuracy", "macro-F1", "exact match", "F1 of answers", "pooled cosine", "recall"), "max"),
}


def _recalls(lines: pd.DataFrame) -> html.Markup:
    """A table of recalls, the number of configurations behind them, where a narrow screen does not show it first."""
    most = {str(name): "max" for name in lines if str(name).startswith("recall at")}
    order = [name for name in lines if name != "configurations"]
    return html.table(lines[[*order, "configurations"]], ["pattern", "united with"], most)


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


def loading(folder: Path) -> str:
    """The lines that load what the stage ``export`` made, in a script of one's own."""
    return (
        "import sparsefinder\nfrom transformers import AutoTokenizer\n\n"
        f"model = sparsefinder.load({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        'states = model.base_model(**tokenizer("A long text.", return_tensors="pt"))[0]'
    )
