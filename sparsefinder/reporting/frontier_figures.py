"""Recall against the share of pairs: the patterns that matter for a decision, and every pattern beside its family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsefinder.analysis.bootstrap import Replicas, interval
from sparsefinder.analysis.comparisons import best_of
from sparsefinder.analysis.frontiers import LEVELS, frontier, recall_table
from sparsefinder.analysis.method_families import (
    BOUNDS,
    CHANCE,
    EVERYTHING,
    FAMILIES,
    OURS,
    PUBLISHED,
    TOP_K,
    UPPER_BOUND,
    family_of,
)
from sparsefinder.reporting.style import (
    FEW,
    GREY,
    blank,
    colour_of,
    marker_of,
    panel_title,
    panels_of,
    style,
)

_DARK = "#333333"
_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)


def recall_sparsity(points: pd.DataFrame, replicas: Replicas | None = None) -> Figure:
    """Every configuration and the frontier of each pattern; a panel for each window with its global tokens.

    Of more than `FEW` patterns only those of `highlighted` have colours. Patterns that were run without window and global
    tokens only (oracle, random, …) appear in every panel. Open markers and dashed lines: the pattern compares every pair.

    Args:
        points: `frontiers.points`.
        replicas: Of the points, for bands of 95 % intervals; None leaves them out.
    """
    chosen = highlighted(points)
    panels = panels_of(points)
    with style():
        figure, grid = _grid(len(panels))
        for axes, united_with in zip(grid, panels, strict=False):
            shown = _shown(points, united_with)
            for pattern, group in shown.groupby("pattern", sort=False):
                name = str(pattern)
                if family_of(name) == BOUNDS:
                    continue
                look = _look(name, group) if name in chosen else _pale(group)
                _draw(axes, points, group, look, replicas if name in chosen else None, name in chosen)
            _draw_bounds(axes, points, shown, replicas)
            _finish(axes, points, panel_title(united_with, len(panels)))
        _shared_words(figure, grid)
        figure.legend(
            handles=_legend(points, chosen), loc="outside lower center", ncols=4 if len(grid) > 1 else 2, frameon=False
        )
    return figure


def recall_by_family(points: pd.DataFrame, replicas: Replicas | None = None) -> Figure:
    """A panel for each family of patterns, each pattern in its colour, with the same bounds in all of them.

    Patterns without window and global tokens; those that were only run with them, with them.

    Args:
        points: `frontiers.points`.
        replicas: Of the points, for bands of 95 % intervals; None leaves them out.
    """
    alone = points.groupby("pattern")["united_with"].transform(lambda words: (words == "").any())
    shown = points[~alone | (points["united_with"] == "")]
    families = [name for name in FAMILIES if name in set(shown["pattern"].map(family_of))]
    with style():
        figure, grid = _grid(len(families), extra=0.6)
        for axes, family in zip(grid, families, strict=False):
            members = shown[shown["pattern"].map(family_of) == family]
            handles = []
            for pattern, group in members.groupby("pattern", sort=True):
                look = _look(str(pattern), group) | {"lw": 1.2, "ms": 4.5}
                _draw(axes, points, group, look, replicas, strong=True)
                handles.append(Line2D([], [], **look, label=str(pattern)))
            _draw_bounds(axes, points, shown, replicas)
            _finish(axes, points, family)
            axes.legend(
                handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=7.5
            )
        _shared_words(figure, grid, below=False)
        figure.legend(
            handles=_bound_handles(points), loc="outside lower center", ncols=4 if len(grid) > 1 else 2, frameon=False
        )
    return figure


def highlighted(points: pd.DataFrame) -> set[str]:
    """The patterns that a figure of many shows in colour: the published ones and the best of each kind.

    The best of ours without comparing every pair, the best of all others without, and the best that compares every pair.
    """
    names = [str(name) for name in points["pattern"].unique() if family_of(str(name)) != BOUNDS]
    if len(names) <= FEW:
        return set(names)
    recalls = recall_table(points, LEVELS)
    recalls = recalls[recalls["pattern"].isin(names)]
    family, quadratic = recalls["pattern"].map(family_of), recalls["quadratic"].astype(bool)
    best = (
        best_of(recalls[~quadratic & (family == OURS)], LEVELS),
        best_of(recalls[~quadratic & ~family.isin([OURS, PUBLISHED])], LEVELS),
        best_of(recalls[quadratic & (family != PUBLISHED)], LEVELS),
    )
    return {name for name in names if family_of(name) == PUBLISHED} | {name for name in best if name is not None}


def _draw(
    axes: Axes,
    points: pd.DataFrame,
    group: pd.DataFrame,
    look: dict[str, Any],
    replicas: Replicas | None,
    strong: bool,
) -> None:
    group = group[group["density"] > 0]
    best = frontier(group)
    beaten = group.drop(index=best.index).dropna(subset=["density", "recall"])
    order = 3 if strong else 2
    if len(best) > 1:
        levels = np.geomspace(best["density"].min(), best["density"].max(), 60)
        levels = np.union1d(levels, best["density"])  # a straight line is bent where the axis is logarithmic
        if replicas is not None:
            low, high = interval(replicas.at(_places(points, group), levels.tolist()))
            axes.fill_between(levels, low, high, color=look["color"], alpha=0.16, lw=0, zorder=order - 1)
        rising = best.iloc[::-1]
        line = np.interp(levels, rising["density"], rising["recall"])
        axes.plot(levels, line, zorder=order, **look | {"marker": ""})
    axes.plot(best["density"], best["recall"], zorder=order, **look | {"ls": "none"})
    axes.plot(beaten["density"], beaten["recall"], zorder=order, **look | {"ls": "none", "alpha": 0.4})


def _draw_bounds(axes: Axes, points: pd.DataFrame, shown: pd.DataFrame, replicas: Replicas | None) -> None:
    """What no pattern can pass and what every pattern has to: run, or where it was not, as it must come out."""
    for pattern, group in shown.groupby("pattern", sort=False):
        if family_of(str(pattern)) == BOUNDS and pattern != CHANCE:
            _draw(axes, points, group, _bound_look(str(pattern)), replicas if pattern == TOP_K else None, strong=True)
    if UPPER_BOUND not in set(shown["pattern"]) and "gold_sparsity" in points:
        axes.plot([1 - points["gold_sparsity"].mean()], [1.0], zorder=4, **_bound_look(UPPER_BOUND))
    chance = shown[shown["pattern"] == CHANCE]
    if len(chance):
        _draw(axes, points, chance, _bound_look(CHANCE), None, strong=True)
    else:
        densities = np.geomspace(1e-3, 1, 60)
        axes.plot(densities, densities, zorder=1, **_bound_look(CHANCE) | {"marker": ""})


def _look(pattern: str, group: pd.DataFrame) -> dict[str, Any]:
    """Colour and marker of the pattern; open and dashed where it compares every pair."""
    quadratic = bool(group["quadratic"].any())
    colour = colour_of(pattern)
    return {
        "color": colour,
        "marker": marker_of(pattern),
        "ms": 5,
        "mfc": "white" if quadratic else colour,
        "ls": "none" if len(group) == 1 else ("--" if quadratic else "-"),
    }


def _pale(group: pd.DataFrame) -> dict[str, Any]:
    return {"color": GREY, "marker": ".", "ms": 3, "lw": 0.8, "ls": "none" if len(group) == 1 else "-"}


def _bound_look(pattern: str) -> dict[str, Any]:
    if pattern == UPPER_BOUND:
        return {"color": "black", "marker": "*", "ms": 11, "ls": "none"}
    if pattern == CHANCE:
        return {"color": "#8C8C8C", "marker": "x", "ms": 4, "lw": 1.0, "ls": ":"}
    line = {TOP_K: "--", EVERYTHING: "none", "oracle_topp": "-."}.get(pattern, (0, (4, 1, 1, 1, 1, 1)))
    return {"color": "black", "marker": "s" if pattern == EVERYTHING else ".", "ms": 4, "lw": 1.0, "ls": line}


def _finish(axes: Axes, points: pd.DataFrame, title: str) -> None:
    if "gold_sparsity" in points:
        axes.axvline(1 - points["gold_sparsity"].mean(), color=_DARK, lw=1, ls=":", zorder=0)
    densities = points.loc[points["density"] > 0, "density"]
    least = max(0.005, min(0.02, float(densities.min()) if len(densities) else 0.02) / 1.3)
    axes.set_xscale("log")
    axes.set(xlim=(1.12, least), ylim=(-0.03, 1.05), title=title)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick >= least]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())


def _grid(panels: int, extra: float = 0.0) -> tuple[Figure, list[Axes]]:
    columns, rows = min(2, panels), math.ceil(panels / 2)
    figure = blank(4.1 * columns + 0.6, (3.5 + extra) * rows + 1.1)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def _shared_words(figure: Figure, grid: Sequence[Axes], below: bool = True) -> None:
    columns = min(2, len(grid))
    for index, axes in enumerate(grid):
        if index % columns == 0:
            axes.set_ylabel("recall of gold edges  (better ↑)")
        if below:
            axes.set_xlabel("share of pairs predicted, log scale  (sparser →)")
    if not below:
        figure.suptitle("recall against the share of pairs predicted, log scale  (sparser →)", fontsize=9)


def _shown(points: pd.DataFrame, united_with: str) -> pd.DataFrame:
    """The points of a panel: its own, and the patterns that were only run alone."""
    here = points[points["united_with"] == united_with]
    everywhere = points[(points["united_with"] == "") & ~points["pattern"].isin(here["pattern"])]
    return pd.concat([here, everywhere])


def _places(points: pd.DataFrame, group: pd.DataFrame) -> list[int]:
    known = group.dropna(subset=["sparsity", "recall"])
    return [int(row) for row in points.index.get_indexer(known.index)]


def _legend(points: pd.DataFrame, chosen: Iterable[str]) -> list[Line2D]:
    chosen = set(chosen)
    groups = [(str(name), group) for name, group in points.groupby("pattern", sort=False)]
    groups = [(name, group) for name, group in groups if family_of(name) != BOUNDS]
    handles = [Line2D([], [], **_look(name, group), label=name) for name, group in groups if name in chosen]
    others = sum(name not in chosen for name, _ in groups)
    if others:
        handles.append(Line2D([], [], **_pale(points), label=f"{others} other patterns"))
    handles += _bound_handles(points)
    if points["quadratic"].any():
        grey: dict[str, Any] = {"color": "#555555", "marker": "o", "ms": 5, "mfc": "white", "ls": "--"}
        handles.append(Line2D([], [], **grey, label="open: compares every pair"))
    return handles


def _bound_handles(points: pd.DataFrame) -> list[Line2D]:
    names = [str(name) for name in points["pattern"].unique() if family_of(str(name)) == BOUNDS]
    names = [UPPER_BOUND, *(name for name in names if name not in (UPPER_BOUND, CHANCE)), CHANCE]
    handles = [Line2D([], [], **_bound_look(name), label=name) for name in names]
    if "gold_sparsity" in points:
        gold = 1 - points["gold_sparsity"].mean()
        handles.append(Line2D([], [], color=_DARK, lw=1, ls=":", label=f"density of the gold graph, {gold:.1%}"))
    return handles
