"""Differences at equal density that the report states: the best of ours against the best published, and an error budget.

An error budget says at which step recall is lost: the true scores, then fewer numbers for each token, then clusters instead of
keys, then the rule by which a query stops; and what a window with global tokens adds. Every line is the difference of two
frontiers at one density, never of two settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparsefinder.analysis.bootstrap import Replicas, interval
from sparsefinder.analysis.frontiers import LEVELS, recall_table
from sparsefinder.analysis.method_families import BOUNDS, OURS, PUBLISHED, TOP_K, UPPER_BOUND, family_of

ANY_ORACLE = "the best oracle"


@dataclass(frozen=True)
class Step:
    """One line of an error budget: what changes between two patterns."""

    method: str
    what: str
    before: str
    after: str
    united: bool = False  # whether the second one is united with a window or global tokens, and the first is not


STEPS = (
    Step("routed", "one budget for every query of the true scores, instead of a threshold", ANY_ORACLE, TOP_K),
    Step("routed", "true scores → rank R", ANY_ORACLE, "lowrank"),
    Step("routed", "keys → clusters of keys", "lowrank", "routed"),
    Step("routed", "margin → budget for every query", "routed", "routed_budget"),
    Step("routed", "window and global tokens", "routed", "routed", united=True),
    Step("routed_budget", "true scores → routed with the same rule", TOP_K, "routed_budget"),
    Step("routed_budget", "window and global tokens", "routed_budget", "routed_budget", united=True),
    Step("distance", "true scores → distance of learned projections", ANY_ORACLE, "distance"),
    Step("distance", "window and global tokens", "distance", "distance", united=True),
    Step("kmeans", "distance → clusters of queries and keys", "distance", "kmeans"),
    Step("kmeans", "window and global tokens", "kmeans", "kmeans", united=True),
    Step("quantize", "distance → bins of each coordinate", "distance", "quantize"),
    Step("quantize", "window and global tokens", "quantize", "quantize", united=True),
)
COLUMNS = ("method", "step", "density", "recall_before", "recall_after", "change", "change_low", "change_high")


def error_budget(
    points: pd.DataFrame, replicas: Replicas | None = None, levels: Sequence[float] = LEVELS
) -> pd.DataFrame:
    """One row for each step of which both patterns are among the points, and density; NaN where one is not reached."""
    recalls = recall_table(points, levels)
    changes: list[dict[str, Any]] = []
    for step in STEPS:
        before, after = _rows(recalls, step.before, united=False), _rows(recalls, step.after, united=step.united)
        if before.empty or after.empty:
            continue
        for level in levels:
            changes.append(
                {"method": step.method, "step": step.what, "density": level}
                | _difference(_best(before, level), _best(after, level), level, replicas)
            )
    return pd.DataFrame(changes, columns=list(COLUMNS))


def ours_minus_rival(
    points: pd.DataFrame,
    replicas: Replicas | None,
    levels: Sequence[float],
    rivals: Sequence[str] = (PUBLISHED,),
    measure: str = "recall",
) -> pd.DataFrame:
    """The best sub-quadratic pattern of ours minus the best rival.

    Each with or without window and global tokens, whichever helps it most.

    Args:
        points: `frontiers.points`, or `frontiers.by_cost` of them.
        replicas: Of these points; None where there are no intervals.
        levels: Shares of the allowed pairs, or of the cost of dense attention.
        rivals: Families of patterns.
        measure: ``recall`` or ``recall_far``.

    Returns:
        One row per density; which two are compared is decided on all documents, the interval is of their difference.
    """
    recalls = recall_table(points, levels)
    family = recalls["pattern"].map(family_of) if len(recalls) else pd.Series(dtype=object)
    ours = recalls[(family == OURS) & ~recalls["quadratic"].astype(bool)]
    others = recalls[family.isin(rivals)]
    advantages = []
    for level in levels:
        first, second = _best(others, level), _best(ours, level)
        if first is None or second is None:
            continue
        names = {"density": level, "ours": _name(second), "rival": _name(first)}
        advantages.append(names | _difference(first, second, level, replicas, measure))
    return pd.DataFrame(advantages)


def best_of(recalls: pd.DataFrame, levels: Sequence[float]) -> str | None:
    """The pattern of a `recall_table` whose recall is largest on average over the levels; not reached counts as nothing."""
    if recalls.empty:
        return None
    means = recalls[[("recall", level) for level in levels]].fillna(0.0).mean(axis=1)
    return str(recalls["pattern"][means.idxmax()])


def _rows(recalls: pd.DataFrame, pattern: str, united: bool) -> pd.DataFrame:
    if recalls.empty:
        return recalls
    names = recalls["pattern"]
    is_it = (
        names.str.startswith(UPPER_BOUND) & (names.map(family_of) == BOUNDS)
        if pattern == ANY_ORACLE
        else names == pattern
    )
    return recalls[is_it & ((recalls["united_with"] != "") == united)]


def _best(recalls: pd.DataFrame, level: float) -> dict[Any, Any] | None:
    known = recalls.dropna(subset=[("recall", level)]) if len(recalls) else recalls
    if known.empty:
        return None
    row: dict[Any, Any] = known.iloc[int(known["recall", level].to_numpy(float).argmax())].to_dict()
    return row


def _difference(
    before: dict[Any, Any] | None,
    after: dict[Any, Any] | None,
    level: float,
    replicas: Replicas | None,
    measure: str = "recall",
) -> dict[str, float]:
    if before is None or after is None:
        return {
            f"{measure}_before": np.nan if before is None else before[measure, level],
            f"{measure}_after": np.nan if after is None else after[measure, level],
            **dict.fromkeys(("change", "change_low", "change_high"), np.nan),
        }
    low = high = np.nan
    if replicas is not None:
        ends = interval(replicas.at(after["rows"], [level], measure) - replicas.at(before["rows"], [level], measure))
        low, high = (float(end[0]) for end in ends)
    values = {f"{measure}_before": before[measure, level], f"{measure}_after": after[measure, level]}
    return values | {"change": after[measure, level] - before[measure, level], "change_low": low, "change_high": high}


def _name(row: dict[Any, Any]) -> str:
    return f"{row['pattern']} + {row['united_with']}" if row["united_with"] else str(row["pattern"])
