"""The frontier as data for the page, where it can be hovered, filtered and switched: ``templates/frontier.html`` draws it.

Drawn there by a few lines without a library: one that does as much weighs 4 MB, in every report of every point of a sweep.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from sparsefinder.analysis.frontiers import setting_columns
from sparsefinder.analysis.method_families import BOUNDS, FAMILIES, family_of
from sparsefinder.reporting.frontier_figures import highlighted
from sparsefinder.reporting.style import look_of, panels_of
from sparsefinder.reporting.text_tables import loss_unit

USABLE, QUADRATIC, ORACLE = "usable", "quadratic", "oracle"
"""What a pattern can be used for: skips work; compares every pair; a bound, or the true scores under another name."""


def frontier_data(points: pd.DataFrame, variants: pd.DataFrame | None = None) -> dict[str, Any]:
    """What the page draws; numbers are rounded to five digits.

    Args:
        points: `frontiers.points`.
        variants: ``evaluate/results``, as `frontiers.described` gives it: for the loss of points that were also run in the
            model.

    Returns:
        ``patterns`` (name, family, kind, colour, marker, and whether it is shown at first), ``panels`` (what they are united
        with), ``gold`` (the mean density of the gold graph, or None), ``unit`` (of the loss) and ``points``: the number of the
        pattern and of the panel, density, recall, total cost, label, loss above dense attention, deviation of the recall over
        seeds; None where unknown.
    """
    names = [str(name) for name in points["pattern"].unique()]
    shown = highlighted(points)
    panels = panels_of(points)
    losses = _losses(points, variants)
    patterns = []
    for name in names:
        rows = points[points["pattern"] == name]
        colour, marker = look_of(name)
        first = name in shown or name in ("oracle", "oracle_topk", "random")
        kind = _kind(name, rows)
        family = family_of(name)
        patterns.append({"name": name, "family": family, "kind": kind, "colour": colour, "marker": marker, "on": first})
    listed = [
        [
            names.index(str(row["pattern"])),
            panels.index(row["united_with"]),
            *(_number(row.get(name)) for name in ("density", "recall", "total_cost")),
            row["label"],
            losses[place],
            _number(row.get("recall_deviation")),
        ]
        for place, row in enumerate(points.to_dict("records"))
    ]
    gold = points["gold_sparsity"].dropna() if "gold_sparsity" in points else pd.Series(dtype=float)
    return {
        "patterns": patterns,
        "families": [*FAMILIES, BOUNDS],
        "panels": panels,
        "points": [point for point in listed if point[2] and point[3] is not None],
        "unit": "" if variants is None else loss_unit(variants),
        "gold": None if gold.empty else _number(1 - float(gold.mean())),
    }


def _kind(name: str, rows: pd.DataFrame) -> str:
    if family_of(name) == BOUNDS or bool(rows["true_scores"].any()):
        return ORACLE
    return QUADRATIC if bool(rows["quadratic"].any()) else USABLE


def _losses(points: pd.DataFrame, variants: pd.DataFrame | None) -> list[float | None]:
    """The loss above dense attention of each point that was run in the model."""
    found: dict[tuple[str, ...], float] = {}
    if variants is None or "loss_minus_entmax" not in variants:
        return [None] * len(points)
    columns = ["pattern", "united_with", *(name for name in setting_columns(points) if name in variants)]
    columns = [name for name in columns if name not in ("target", "rounds", "n_clusters", "seed", "tail")]
    for row in variants[variants["attention"] != "dense"].to_dict("records"):
        loss = _number(row["loss_minus_entmax"])
        if loss is not None:
            found.setdefault(_key(row, columns), loss)  # buckets and masks of one graph lose the same
    return [found.get(_key(row, columns)) for row in points.to_dict("records")]


def _key(row: dict[Any, Any], columns: list[str]) -> tuple[str, ...]:
    return tuple("" if pd.isna(row[name]) else str(row[name]) for name in columns)


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(f"{value:.5g}")
