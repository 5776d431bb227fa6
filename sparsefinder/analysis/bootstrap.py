"""How sure a figure is: documents drawn again with replacement, the same ones for every pattern.

The unit of chance is the document (a recorded sample, a block of text): its queries and keys are anything but independent.
Every replica draws as many documents as there are, with replacement, and all patterns are measured on the same draw, so that
what makes a document hard for all of them cancels in a difference (a paired bootstrap, Efron and Tibshirani 1993, chapter 16).
Where a pattern was run with several seeds, a replica also draws as many of its seeds with replacement. Intervals are the 2.5 and
97.5 percentiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sparsefinder.analysis.frontiers import at_levels

REPLICAS, SEED = 1000, 0
_PERCENT = (0.025, 0.975)
LEAST = 5  # documents for an interval: fewer say next to nothing about others, and one of them nothing at all
_KNOWN = 0.9  # share of the replicas in which a figure must be defined for an interval


def draws(count: int, replicas: int = REPLICAS, seed: int = SEED) -> np.ndarray:
    """How often each document is drawn in each replica.

    Args:
        count: Number of documents.
        replicas: How many times as many are drawn, with replacement.
        seed: Of the draws.

    Returns:
        ``(replicas, count)`` float64, whole numbers whose rows sum to ``count``.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=replicas).astype(float)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval over the first axis, NaN where too few replicas are defined."""
    enough = np.isfinite(values).mean(0) >= _KNOWN
    safe = np.where(enough, values, 0.0)
    low, high = np.nanquantile(safe, _PERCENT, axis=0)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


@dataclass(frozen=True)
class Replicas:
    """Measures of every point of `frontiers.points` in every replica.

    Args:
        density: ``(replicas, points)``, shares of the allowed pairs.
        recall: ``(replicas, points)``, of the gold edges.
        recall_far: ``(replicas, points)``, of those outside the window and the global tokens.
    """

    density: np.ndarray
    recall: np.ndarray
    recall_far: np.ndarray

    @classmethod
    def of(
        cls, points: pd.DataFrame, counts: pd.DataFrame, replicas: int = REPLICAS, seed: int = SEED
    ) -> Replicas | None:
        """Draw documents again, with macro means as in `metrics`.

        Args:
            points: `frontiers.points` of the same metrics.
            counts: ``score/counts``, a row for each configuration, document, layer and head.
            replicas: How many.
            seed: Of the draws of documents; those of seeds of a pattern have the next one.

        Returns:
            The replicas; None where there are fewer than `LEAST` documents.
        """
        keys = ["configuration", "sample", "layer", "head"]
        counts = counts.sort_values(keys)
        documents = counts["sample"].nunique()
        if documents < LEAST:
            return None
        drawn = draws(documents, replicas, seed)
        measures: dict[str, dict[int, np.ndarray]] = {name: {} for name in ("density", "recall", "recall_far")}
        for configuration, sums in counts.groupby("configuration", sort=False):
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = {
                    "density": sums["predicted"].to_numpy(float) / sums["allowed"].to_numpy(float),
                    "recall": sums["hits"].to_numpy(float) / sums["gold"].to_numpy(float),
                    "recall_far": sums["far_hits"].to_numpy(float) / sums["far_gold"].to_numpy(float),
                }
            for name, ratio in ratios.items():
                measures[name][int(str(configuration))] = _macro(ratio.reshape(documents, -1), drawn)
        members = list(points["members"])
        seeds = {
            count: draws(count, replicas, seed + 1) / count
            for count in {len(configurations) for configurations in members}
        }

        def of_points(name: str) -> np.ndarray:
            columns = [
                sum(
                    measures[name][configuration] * seeds[len(configurations)][:, index]
                    for index, configuration in enumerate(configurations)
                )
                for configurations in members
            ]
            return np.stack(columns, axis=1) if columns else np.empty((replicas, 0))

        return cls(of_points("density"), of_points("recall"), of_points("recall_far"))

    def of_points(self, points: Sequence[int]) -> Replicas:
        """Those of some of the points."""
        rows = list(points)
        return Replicas(self.density[:, rows], self.recall[:, rows], self.recall_far[:, rows])

    def by_cost(self, shares: np.ndarray) -> Replicas:
        """The total cost in the place of the density; ``shares (points,)`` of the predictions are alike in each replica."""
        return replace(self, density=self.density + shares)

    def at(self, rows: Sequence[int], levels: Sequence[float], measure: str = "recall") -> np.ndarray:
        """A measure of the frontier of some points, where it names so many pairs.

        Args:
            rows: Indices of the points.
            levels: Shares of the allowed pairs.
            measure: ``recall`` or ``recall_far``.

        Returns:
            ``(replicas, levels)``; NaN where a frontier does not reach a level.
        """
        rows = list(rows)
        if not rows:
            return np.full((len(self.density), len(levels)), np.nan)
        return at_levels(self.density[:, rows], self.recall[:, rows], getattr(self, measure)[:, rows], levels)


def _macro(ratio: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """``(documents, layers · heads)`` → mean over the drawn documents, then over heads, each where defined: ``(replicas,)``."""
    known = np.isfinite(ratio)
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = (drawn @ np.where(known, ratio, 0.0)) / (drawn @ known.astype(float))
    some = np.isfinite(heads)
    return np.where(some, heads, 0.0).sum(1) / np.where(some.any(1), some.sum(1), np.nan)


def with_intervals(recalls: pd.DataFrame, replicas: Replicas | None, levels: Sequence[float]) -> pd.DataFrame:
    """A recall table with the ends of its 95 % intervals.

    Args:
        recalls: `frontiers.recall_table`.
        replicas: Of the points that the table was made of; None leaves it as it is.
        levels: The densities of the table.

    Returns:
        The table with columns ``(recall_low, level)``, ``(recall_high, level)`` and the same for ``recall_far``.
    """
    if replicas is None or recalls.empty:
        return recalls
    added: dict[Any, list[float]] = {}
    for row in recalls.to_dict("records"):
        for measure in ("recall", "recall_far"):
            low, high = interval(replicas.at(row["rows"], levels, measure))
            for index, level in enumerate(levels):
                known = pd.notna(row[measure, level])
                added.setdefault((f"{measure}_low", level), []).append(low[index] if known else np.nan)
                added.setdefault((f"{measure}_high", level), []).append(high[index] if known else np.nan)
    return pd.concat([recalls, pd.DataFrame(added, index=recalls.index, columns=_flat(added))], axis=1)


def _flat(columns: dict[Any, list[float]]) -> pd.Index:
    """An index of tuples that is no MultiIndex, as the columns of a recall table are."""
    return pd.Index(list(columns), tupleize_cols=False)


def ratio_difference(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, replicas: int = REPLICAS, seed: int = SEED
) -> tuple[float, float]:
    """95 % interval of ``(Σ first − Σ second) / Σ weights`` over documents drawn again.

    Args:
        first: ``(documents,)``, sums of a measure.
        second: ``(documents,)``, those that are subtracted.
        weights: ``(documents,)``, what the sums are divided by, such as numbers of tokens.
        replicas: How many.
        seed: Of the draws.

    Returns:
        Both ends; NaN where there are fewer than `LEAST` documents.
    """
    if len(weights) < LEAST:
        return float("nan"), float("nan")
    drawn = draws(len(weights), replicas, seed)
    total = drawn @ weights
    low, high = interval(np.where(total > 0, drawn @ (first - second) / np.where(total > 0, total, 1.0), np.nan))
    return float(low), float(high)
