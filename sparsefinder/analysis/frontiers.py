"""Recall against sparsity: configurations as points, the frontier that a pattern reaches, and patterns at equal density.

Patterns are compared where they name equally many pairs, never setting against setting. Between two points of a frontier
the straight line is used: running the one configuration on a share of the heads and the other on the rest lies on it.
Configurations that differ in their seed alone are one point, the mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sparsefinder.analysis.method_families import BOUNDS, CHANCE, TOP_K, family_of
from sparsefinder.errors import UserError
from sparsefinder.metrics import BALANCE, COSTS, RATIOS

MEASURES = (*RATIOS, *COSTS, *BALANCE)
_SATURATED, _ALIKE = 0.9, 0.25  # mean recall; natural logarithm of the ratio of two densities
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3)  # shares of the allowed pairs at which patterns are compared

_PLACE = ("run", "point", "configuration", "layer", "head", "samples", "members")
_LOCAL_AND_GLOBAL = ("window", "global_tokens", "last_token")
_NOT_SETTINGS = {*MEASURES, *_PLACE, *_LOCAL_AND_GLOBAL, "pattern", "causal", "alpha", "quadratic", "true_scores"}


def points(metrics: pd.DataFrame) -> pd.DataFrame:
    """Average each measure of each configuration over layers and heads, where it is defined.

    Args:
        metrics: ``score/metrics``; tables of several runs (`tables.collect`) may be given.

    Returns:
        One row per configuration. Added are ``density`` (1 − sparsity), ``total_cost`` (multiplications of prediction and
        attention as a share of those of attention over all allowed pairs), ``united_with`` (the window and global tokens in
        words, empty without them) and ``label`` (the pattern and those of its settings that vary).

    Raises:
        UserError: A column that is needed is not there.
    """
    missing = [name for name in ("configuration", "pattern", "sparsity", "recall") if name not in metrics]
    if missing:
        raise UserError(f"the table has no column {', '.join(missing)}: give score/metrics as stage=score writes it")
    table = described(metrics)
    for name in ("quadratic", "true_scores"):
        given = table[name] if name in table else pd.Series(False, table.index)
        table[name] = [False if pd.isna(value) else bool(value) for value in given]
    keys = [name for name in ("run", "configuration") if name in table]
    how = {name: "mean" if name in MEASURES else "first" for name in table if name not in (*keys, "layer", "head")}
    averaged = _over_seeds(table.groupby(keys, sort=False, as_index=False).agg(how))
    averaged["density"] = 1 - averaged["sparsity"]
    shares = averaged["prediction_share"] if "prediction_share" in averaged else pd.Series(np.nan, averaged.index)
    averaged["total_cost"] = averaged["density"] + shares
    averaged["label"] = labels(averaged)
    return averaged


def _over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that differ in their seed alone as one; ``members`` are the configurations that it is the mean of."""
    table = table.assign(
        members=pd.Series([(configuration,) for configuration in table["configuration"]], table.index, dtype=object)
    )
    if "seed" not in table or table["seed"].nunique() < 2:
        return table
    same = [name for name in table if name not in (*MEASURES, "seed", "configuration", "members")]
    how = {name: "mean" if name in MEASURES else "first" for name in table} | {"members": "sum"}
    alike = table[same].map(str).agg(" ".join, axis=1)  # what has no value is alike as well
    return table.groupby(alike, sort=False).agg(how).reset_index(drop=True)


def described(table: pd.DataFrame) -> pd.DataFrame:
    """A copy in which every row has a name for its ``pattern``, and in ``united_with`` its window and global tokens in words.

    A random number is no distance, so ``distance=random`` is the pattern random wherever it was asked for; an attention that
    brings its own graph stands for its pattern.
    """
    named = table.copy()
    for name in _LOCAL_AND_GLOBAL:
        values = named[name] if name in named else pd.Series(0, named.index)
        named[name] = [0 if pd.isna(value) else int(value) for value in values]
    named["united_with"] = [_in_words(*row) for row in named[list(_LOCAL_AND_GLOBAL)].itertuples(index=False)]
    if "distance" in named:
        named["pattern"] = named["pattern"].mask([value == CHANCE for value in named["distance"]], CHANCE)
    if "attention" in named:
        given = pd.Series(None, named.index, dtype=object) if "pattern" not in named else named["pattern"]
        named["pattern"] = given.astype(object).where(given.notna(), named["attention"])
    return named


def setting_columns(table: pd.DataFrame) -> list[str]:
    """Columns that hold settings of patterns, such as ``threshold``."""
    return [
        str(name)
        for name in table.columns
        if name not in {*_NOT_SETTINGS, "density", "total_cost", "united_with", "label"}
    ]


def frontier(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `points` that no other row beats: none is as sparse and recalls as much, and is better in one of the two.

    Sorted by rising sparsity, so falling recall. Points without a token graph (NaN) are on no frontier.
    """
    order = table.dropna(subset=["sparsity", "recall"]).sort_values(["sparsity", "recall"], ascending=False)
    best_of_sparser = order["recall"].cummax().shift(fill_value=-np.inf)
    return order[order["recall"] > best_of_sparser].iloc[::-1]


def at_levels(density: np.ndarray, recall: np.ndarray, values: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Values on frontiers, at shares of the allowed pairs.

    On the straight line between the neighbouring points that no other point beats. A frontier that ends in recall 1 keeps it
    with more pairs.

    Args:
        density: ``(..., points)``, shares of the allowed pairs.
        recall: ``(..., points)``, which decides what point beats what other.
        values: ``(..., points)``, what is read off; ``recall`` itself, or another measure of the same points.
        levels: Shares of the allowed pairs.

    Returns:
        ``(..., levels)``; NaN where a frontier does not reach a level.
    """
    order = np.lexsort((-recall, density), axis=-1)
    density, recall, values = (np.take_along_axis(x, order, -1) for x in (density.round(12), recall, values))
    count = density.shape[-1]
    sparser = np.full_like(recall, -np.inf)
    sparser[..., 1:] = np.maximum.accumulate(recall, -1)[..., :-1]
    kept = recall > sparser
    positions = np.arange(count)
    before = np.maximum.accumulate(np.where(kept, positions, 0), -1)  # the sparsest point is always kept
    after = np.minimum.accumulate(np.where(kept, positions, count)[..., ::-1], -1)[..., ::-1]
    after = np.concatenate([after, np.full_like(after[..., :1], count)], -1)

    def of(x: np.ndarray, position: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, position.clip(0, count - 1), -1)

    columns = []
    for level in np.round(levels, 12):
        passed = (density <= level).sum(-1, keepdims=True)
        left, right = of(before, passed - 1), np.take_along_axis(after, passed, -1)
        width = of(density, right) - of(density, left)
        share = np.where(width > 0, (level - of(density, left)) / np.where(width > 0, width, 1.0), 0.0)
        inside = of(values, left) + share * (of(values, right) - of(values, left))
        exact = of(density, left) == level
        beyond = np.where(of(recall, left) >= 1, 1.0, np.where(exact, of(values, left), np.nan))
        columns.append(np.where(passed == 0, np.nan, np.where(right >= count, beyond, inside)))
    return np.concatenate(columns, -1)


def recalls_at(group: pd.DataFrame, densities: Sequence[float], measure: str = "recall") -> np.ndarray:
    """A measure on the frontier of one pattern, see `at_levels`.

    Args:
        group: Rows of `points`, those of the pattern.
        densities: Shares of the allowed pairs.
        measure: A column, such as ``recall`` or ``recall_far``.

    Returns:
        ``(densities,)``; NaN where the frontier does not come there.
    """
    known = group.dropna(subset=["sparsity", "recall"])
    if known.empty or measure not in known:
        return np.full(len(densities), np.nan)
    density, recall, values = (known[name].to_numpy(float) for name in ("density", "recall", measure))
    return at_levels(density, recall, values, densities)


def recall_table(table: pd.DataFrame, densities: Sequence[float]) -> pd.DataFrame:
    """Recall and far recall of each pattern's frontier at equal density.

    Args:
        table: `points`.
        densities: Shares of the allowed pairs.

    Returns:
        One row per pattern and what it is united with. Columns ``(measure, density)`` hold NaN where the frontier does not
        come there; ``rows`` are the indices of its points in the table. Patterns that always take every pair are left out.
    """
    columns = ["pattern", "united_with", "quadratic", "true_scores", "configurations", "defined", "rows"]
    rows = []
    positions = pd.Series(range(len(table)), table.index)
    for (united_with, pattern), group in table.groupby(["united_with", "pattern"], sort=False):
        if group["density"].min() >= 1:
            continue
        known = group.dropna(subset=["sparsity", "recall"])
        flags = (bool(group[name].any()) for name in ("quadratic", "true_scores"))
        described_by = [pattern, united_with, *flags, len(group), not known.empty]
        row: dict[Any, Any] = dict(zip(columns, [*described_by, tuple(positions[known.index])], strict=True))
        for measure in ("recall", "recall_far"):
            recalls = recalls_at(known, densities, measure).tolist()
            row |= {(measure, density): recall for density, recall in zip(densities, recalls, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def by_cost(table: pd.DataFrame) -> pd.DataFrame:
    """`points` with the total cost in the place of the density, NaN where it is unknown: for comparisons at equal cost."""
    return table.assign(density=table["total_cost"], sparsity=1 - table["total_cost"])


def comparable(table: pd.DataFrame, most: int = 3) -> pd.DataFrame:
    """One configuration of each of the best patterns, chosen where all patterns name about equally many pairs.

    The density is the one between 5 and 50 % to which the patterns come closest together and where the best of them do not
    recall nearly all, which would tell nothing apart; what comes nowhere near it is left out. The best are those whose recall
    lies highest above their density, which is what chance would recall.

    Args:
        table: `points`.
        most: How many patterns.
    """
    predicted = table["pattern"].map(family_of) != BOUNDS
    if "true_scores" in table:
        predicted &= ~table["true_scores"].astype(bool)
    usable = table[predicted & table["density"].between(1e-4, 0.9)]
    if usable.empty:
        return usable
    alone = usable.groupby("pattern")["united_with"].transform(lambda words: (words == "").any())
    usable = usable[~alone | (usable["united_with"] == "")]
    best: tuple[bool, float, pd.DataFrame] | None = None
    for density in np.geomspace(0.05, 0.5, 47):
        away = np.log(usable["density"] / density).abs()
        nearest = away.groupby(usable["pattern"]).idxmin()
        near = nearest[away[nearest].to_numpy() < _ALIKE]  # one density for all that are shown
        chosen = usable.loc[near if len(near) else nearest]
        order = (chosen["recall"] - chosen["density"]).sort_values(ascending=False, kind="stable").index[:most]
        saturated = bool(chosen.loc[order, "recall"].mean() > _SATURATED)
        total = float(away[nearest].clip(upper=1.0).sum())
        if best is None or (saturated, total) < best[:2]:
            best = saturated, total, chosen.loc[order]
    assert best is not None
    return best[2]


def references(table: pd.DataFrame, density: float) -> pd.DataFrame:
    """What the recall of a configuration is read against: chance and the true scores, nearest to that density."""
    bounds = table[table["pattern"].isin([TOP_K, CHANCE]) & (table["density"] > 0)]
    away = np.log(bounds["density"] / density).abs()
    return bounds.loc[away.groupby(bounds["pattern"]).idxmin()]


def broken_curves(table: pd.DataFrame, tolerance: float = 0.01) -> list[str]:
    """Sweeps of one setting along which recall *rises* with sparsity, in words.

    A sweep is three points or more that differ in one numeric setting alone; seeds are no sparsity parameter.

    Args:
        table: `points`.
        tolerance: By how much recall may rise, as a share of the gold edges.
    """
    lines = []
    for (pattern, united_with), group in table.groupby(["pattern", "united_with"], sort=False):
        settings = [name for name in setting_columns(group) if group[name].nunique(dropna=False) > 1]
        numeric = [name for name in settings if pd.api.types.is_numeric_dtype(group[name]) and name != "seed"]
        for name in numeric:
            others = [other for other in settings if other != name]
            curves = group.groupby(others, dropna=False, sort=False) if others else [("", group)]
            for _, curve in curves:
                ordered = curve.dropna(subset=["sparsity", "recall"]).sort_values("sparsity")
                rise = ordered["recall"].iloc[::-1].cummax().iloc[::-1] - ordered["recall"]
                if len(ordered) > 2 and rise.max() > tolerance:
                    at = ordered["sparsity"][rise.idxmax()]
                    where = f" with {united_with}" if united_with else ""
                    lines.append(
                        f"{pattern}{where}, along {name}: a sparser graph recalls {rise.max():.3f} more than the one of "
                        f"sparsity {at:.3f}; a sparsity parameter should trade one for the other"
                    )
    return lines


def _in_words(window: int, global_tokens: int, last_token: int) -> str:
    parts = [f"window {window}"] if window else []
    parts += [f"{global_tokens} global"] if global_tokens else []
    return " + ".join(parts + (["last token"] if last_token else []))


def labels(table: pd.DataFrame) -> list[str]:
    """For each row of `points` its pattern, those of its settings that vary, and what it is united with, in a few words."""
    names = setting_columns(table)
    groups = table.groupby("pattern")
    varying = {pattern: [name for name in names if group[name].nunique() > 1] for pattern, group in groups}
    words = []
    for row in table.to_dict("records"):
        settings = [f"{name}={row[name]}" for name in varying[row["pattern"]] if pd.notna(row[name])]
        united = [f"+ {row['united_with']}"] if row["united_with"] else []
        words.append(" ".join([row["pattern"], *settings, *united]))
    return words
