"""Several runs as one: means and deviations over runs that differ in their seed alone, points of a sweep beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from sparsefinder.analysis.frontiers import MEASURES, labels, recall_table

_OF_A_RUN = ("run", "configuration", "members", "seed", "point", "label")
_AVERAGED = (*MEASURES, "density", "total_cost")


def point_without_seed(point: Any) -> str:
    """What a sweep set for a run, but for seeds: ``pattern=kmeans seed=3`` → ``pattern=kmeans``."""
    words = "" if pd.isna(point) else str(point)
    return " ".join(word for word in words.split() if word.partition("=")[0].rpartition(".")[2] != "seed")


def over_runs(points: pd.DataFrame) -> pd.DataFrame:
    """Configurations that are the same but for the seed of their run, as one: the mean of each measure.

    Args:
        points: `frontiers.points` of several runs, with the columns ``run`` and ``point``.

    Returns:
        One row for each; ``runs`` says of how many, ``recall_deviation`` is the standard deviation of their recall (one of n − 1;
        0 for a single run).
    """
    same = [name for name in points if name not in (*_AVERAGED, *_OF_A_RUN)]
    alike = points[same].map(str).agg(" ".join, axis=1) + points["point"].map(point_without_seed)
    how: dict[str, Any] = {str(name): "mean" if name in _AVERAGED else "first" for name in points}
    groups = points.groupby(alike, sort=False)
    merged = groups.agg(how)
    merged["members"] = groups["members"].first()  # of one run: numbers of configurations say nothing in another one
    merged["runs"] = groups["run"].nunique()
    merged["recall_deviation"] = groups["recall"].std().fillna(0.0)
    merged["label"] = labels(merged.drop(columns="seed", errors="ignore"))
    return merged.reset_index(drop=True)


def with_deviations(recalls: pd.DataFrame, runs: Sequence[pd.DataFrame], levels: Iterable[float]) -> pd.DataFrame:
    """A recall table with one deviation over the runs on each side, where intervals over documents stand otherwise.

    Args:
        recalls: `frontiers.recall_table` of `over_runs`.
        runs: `frontiers.points` of each run.
        levels: The densities of the table.
    """
    levels = list(levels)
    tables = pd.concat([recall_table(points, levels) for points in runs])
    found = recalls.copy()
    for measure in ("recall", "recall_far"):
        for level in levels:
            of_all = tables.groupby(["pattern", "united_with"])[[(measure, level)]].std()[(measure, level)]
            keys = zip(found["pattern"], found["united_with"], strict=True)
            away = [float(of_all.get(key, float("nan"))) for key in keys]
            found[(f"{measure}_low", level)] = [x - y for x, y in zip(found[(measure, level)], away, strict=True)]
            found[(f"{measure}_high", level)] = [x + y for x, y in zip(found[(measure, level)], away, strict=True)]
    return found


def variants_over_runs(results: pd.DataFrame) -> pd.DataFrame:
    """``evaluate/results`` of several runs with a row for each variant: means, and ``loss_minus_entmax_deviation`` over runs."""
    alike = results["variant"] + results["point"].map(point_without_seed)
    how: dict[str, Any] = {
        str(name): "mean" if pd.api.types.is_float_dtype(results[name]) else "first" for name in results
    }
    groups = results.groupby(alike, sort=False)
    merged = groups.agg(how)
    merged["runs"] = groups["run"].nunique()
    if "loss_minus_entmax" in results:
        merged["loss_minus_entmax_deviation"] = groups["loss_minus_entmax"].std()
    points = results["point"].map(point_without_seed).groupby(alike, sort=False).first()
    if points.nunique() > 1:
        named = zip(merged["variant"], points, strict=True)
        merged["variant"] = [f"{name} [{point}]" if point else name for name, point in named]
    return merged.reset_index(drop=True)
