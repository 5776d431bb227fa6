"""Recall against sparsity: configurations as points, the frontier that a pattern reaches, and patterns at equal density.

Patterns are compared where they name equally many pairs, never setting against setting. Between two points of a frontier
the straight line is used: running the one configuration on a share of the heads and the other on the rest lies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sparsefinder.metrics import BALANCE, RATIOS
from sparsefinder.store import UserError

MEASURES = (*RATIOS, *BALANCE)
UPPER_BOUND, CHANCE, EVERYTHING = "oracle", "random", "full"  # patterns that others are read against

_PLACE = ("run", "configuration", "layer", "head", "samples")
_SURROUNDINGS = ("window", "global_tokens", "last_token")
_NOT_SETTINGS = {*MEASURES, *_PLACE, *_SURROUNDINGS, "pattern", "causal", "alpha", "quadratic"}


def points(metrics: pd.DataFrame) -> pd.DataFrame:
    """``score/metrics`` → one row per configuration, each measure averaged over layers and heads where it is defined.

    Added are ``density`` (1 − sparsity), ``surroundings`` (the window and global tokens in words, empty without them) and
    ``label`` (the pattern and those of its settings that vary). Tables of several runs (`tables.collect`) may be given.
    """
    missing = [name for name in ("configuration", "pattern", "sparsity", "recall") if name not in metrics]
    if missing:
        raise UserError(f"the table has no column {', '.join(missing)}: give score/metrics as stage=score writes it")
    table = described(metrics)
    quadratic = table["quadratic"] if "quadratic" in table else pd.Series(False, table.index)
    table["quadratic"] = [False if pd.isna(value) else bool(value) for value in quadratic]
    keys = [name for name in ("run", "configuration") if name in table]
    how = {name: "mean" if name in MEASURES else "first" for name in table if name not in (*keys, "layer", "head")}
    found = table.groupby(keys, sort=False, as_index=False).agg(how)
    found["density"] = 1 - found["sparsity"]
    found["label"] = _labels(found)
    return found


def described(table: pd.DataFrame) -> pd.DataFrame:
    """A copy in which every row has a name for its ``pattern`` and its ``surroundings``, the words for its window and so on.

    A random number is no distance, so ``distance=random`` is the pattern random wherever it was asked for; an attention that
    brings its own graph stands for its pattern.
    """
    found = table.copy()
    for name in _SURROUNDINGS:
        values = found[name] if name in found else pd.Series(0, found.index)
        found[name] = [0 if pd.isna(value) else int(value) for value in values]
    found["surroundings"] = [_in_words(*row) for row in found[list(_SURROUNDINGS)].itertuples(index=False)]
    if "distance" in found:
        found["pattern"] = found["pattern"].mask([value == CHANCE for value in found["distance"]], CHANCE)
    if "attention" in found:
        own = pd.Series(None, found.index, dtype=object) if "pattern" not in found else found["pattern"]
        found["pattern"] = own.astype(object).where(own.notna(), found["attention"])
    return found


def setting_columns(table: pd.DataFrame) -> list[str]:
    """Columns that hold settings of patterns, such as ``threshold``."""
    return [str(name) for name in table.columns if name not in {*_NOT_SETTINGS, "density", "surroundings", "label"}]


def frontier(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `points` that no other row beats: none is as sparse and recalls as much, and is better in one of the two.

    Sorted by rising sparsity, so falling recall. Points without a token graph (NaN) are on no frontier.
    """
    order = table.dropna(subset=["sparsity", "recall"]).sort_values(["sparsity", "recall"], ascending=False)
    best_of_sparser = order["recall"].cummax().shift(fill_value=-np.inf)
    return order[order["recall"] > best_of_sparser].iloc[::-1]


def recall_at(front: pd.DataFrame, density: float, measure: str = "recall") -> float:
    """``measure`` of a `frontier` at a share of the allowed pairs, NaN where the frontier does not reach that density.

    A frontier that ends in recall 1 keeps it with more pairs.
    """
    if front.empty or measure not in front:
        return float("nan")
    rising = front.iloc[::-1]
    densities = rising["density"].to_numpy(float).round(12)  # 1 − 0.8 is a little less than 0.2
    values = rising[measure].to_numpy(float)
    kept = 1.0 if rising["recall"].iloc[-1] >= 1 else float("nan")
    return float(np.interp(density, densities, values, left=float("nan"), right=kept))


def recall_table(table: pd.DataFrame, densities: Sequence[float]) -> pd.DataFrame:
    """`points` → one row per pattern and surroundings: recall and far recall of its frontier at each of the densities.

    Columns ``(measure, density)`` hold NaN where the frontier does not come there. Patterns that always take every pair are
    left out.
    """
    columns = ["pattern", "surroundings", "quadratic", "configurations", "defined"]
    rows = []
    for (surroundings, pattern), group in table.groupby(["surroundings", "pattern"], sort=False):
        if group["density"].min() >= 1:
            continue
        front = frontier(group)
        described_by = [pattern, surroundings, bool(group["quadratic"].any()), len(group), not front.empty]
        row: dict[Any, Any] = dict(zip(columns, described_by, strict=True))
        for measure in ("recall", "recall_far"):
            row |= {(measure, density): recall_at(front, density, measure) for density in densities}
        rows.append(row)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def comparable(table: pd.DataFrame, most: int = 3) -> pd.DataFrame:
    """One configuration of each of the ``most`` best patterns, chosen where all patterns name about equally many pairs.

    The density is the one between 5 and 50 % to which the patterns come closest together; the best are those whose recall
    lies highest above their density, which is what chance would recall.
    """
    usable = table[~table["pattern"].isin([UPPER_BOUND, EVERYTHING, CHANCE]) & table["density"].between(1e-4, 0.9)]
    if usable.empty:
        return usable
    alone = usable.groupby("pattern")["surroundings"].transform(lambda words: (words == "").any())
    usable = usable[~alone | (usable["surroundings"] == "")]
    best: tuple[float, pd.DataFrame] | None = None
    for density in np.geomspace(0.05, 0.5, 47):
        away = np.log(usable["density"] / density).abs()
        nearest = away.groupby(usable["pattern"]).idxmin()
        total = float(away[nearest].sum())
        if best is None or total < best[0]:
            best = total, usable.loc[nearest]
    assert best is not None
    chosen = best[1]
    order = (chosen["recall"] - chosen["density"]).sort_values(ascending=False, kind="stable").index
    return chosen.loc[order[:most]]


def broken_curves(table: pd.DataFrame, tolerance: float = 0.01) -> list[str]:
    """Sweeps of one setting along which recall *rises* with sparsity by more than ``tolerance``, in words.

    A sweep is three points or more that differ in one numeric setting alone; seeds are no dial.
    """
    found = []
    for (pattern, surroundings), group in table.groupby(["pattern", "surroundings"], sort=False):
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
                    where = f" with {surroundings}" if surroundings else ""
                    found.append(
                        f"{pattern}{where}, along {name}: a sparser graph recalls {rise.max():.3f} more than the one of "
                        f"sparsity {at:.3f}; a dial should trade one for the other"
                    )
    return found


def _in_words(window: int, global_tokens: int, last_token: int) -> str:
    parts = [f"window {window}"] if window else []
    parts += [f"{global_tokens} global"] if global_tokens else []
    return " + ".join(parts + (["last token"] if last_token else []))


def _labels(table: pd.DataFrame) -> list[str]:
    names = setting_columns(table)
    groups = table.groupby("pattern")
    varying = {pattern: [name for name in names if group[name].nunique() > 1] for pattern, group in groups}
    labels = []
    for row in table.to_dict("records"):
        settings = [f"{name}={row[name]}" for name in varying[row["pattern"]] if pd.notna(row[name])]
        around = [f"+ {row['surroundings']}"] if row["surroundings"] else []
        labels.append(" ".join([row["pattern"], *settings, *around]))
    return labels
