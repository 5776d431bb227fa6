"""Curves: recall against sparsity, loss against sparsity, and what sharing buckets says about a pair. Table → figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsefinder.drawing import blank, colour_of, marker_of, style
from sparsefinder.frontiers import CHANCE, EVERYTHING, UPPER_BOUND, frontier

_ATTENTIONS = {"masked": ("o", 62, False), "bucketed": ("s", 17, True)}  # marker, size, filled: both stay visible
_OTHER_ATTENTIONS = (("^", 62, False), ("D", 42, False), ("v", 62, False), ("P", 30, True))


def recall_sparsity(points: pd.DataFrame) -> Figure:
    """Every configuration of `frontiers.points` and the frontier of each pattern; a panel for each surroundings.

    Patterns that were run without window and global tokens only (oracle, random, …) appear in every panel, to compare with.
    Open markers and dashed lines: the pattern compares every pair.
    """
    panels = _panels(points)
    with style():
        figure = blank(3.6 * min(2, len(panels)) + 0.8, 3.4 * math.ceil(len(panels) / 2) + 1.0)
        grid = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False, sharey=True)
        for axes, surroundings in zip(grid.flat, panels, strict=False):
            own = points[points["surroundings"] == surroundings]
            everywhere = points[(points["surroundings"] == "") & ~points["pattern"].isin(own["pattern"])]
            for pattern, group in pd.concat([own, everywhere]).groupby("pattern", sort=False):
                _draw_pattern(axes, str(pattern), group)
            _gold_line(axes, points)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.05), title=_panel_title(surroundings, len(panels)))
            axes.set_xlabel("sparsity: share of pairs left out  (sparser →)")
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("recall of gold edges  (better ↑)")
        figure.legend(handles=_pattern_legend(points), loc="outside lower center", ncols=4, frameon=False)
    return figure


def loss_sparsity(results: pd.DataFrame) -> Figure:
    """Every variant of ``evaluate/results`` that has a token graph; dense attention as horizontal lines.

    Colour: the pattern; marker: the attention that ran it. A panel for each surroundings.
    """
    variants = results[results["attention"] != "dense"].dropna(subset=["sparsity"])
    attentions = list(dict.fromkeys(variants["attention"]))
    looks = _attention_looks(attentions)
    panels = _panels(variants)
    with style():
        figure = blank(3.6 * min(2, len(panels)) + 0.8, 3.2 * math.ceil(len(panels) / 2) + 1.0)
        grid = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False, sharey=True)
        for axes, surroundings in zip(grid.flat, panels, strict=False):
            for row in variants[variants["surroundings"] == surroundings].to_dict("records"):
                marker, size, filled = looks[row["attention"]]
                colour = colour_of(row["pattern"])
                face = colour if filled else "none"
                axes.scatter(row["sparsity"], row["loss"], s=size, marker=marker, fc=face, ec=colour, lw=1.3, zorder=3)
            for text, loss, dashes in dense_losses(results):
                axes.axhline(loss, color="#333333", lw=1.1, ls=dashes, zorder=1, label=text)
            axes.set(xlim=(-0.03, 1.03), title=_panel_title(surroundings, len(panels)))
            axes.set_xlabel("sparsity of the executed graph  (sparser →)")
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("masked-LM loss, nats  (better ↓)")
        handles = [_dot(pattern, colour_of(pattern)) for pattern in dict.fromkeys(variants["pattern"])]
        handles += [_dot(name, "#555555", *looks[name]) for name in attentions]
        handles += [
            Line2D([], [], color="#333333", lw=1.1, ls=dashes, label=t) for t, _, dashes in dense_losses(results)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def dense_losses(results: pd.DataFrame) -> list[tuple[str, float, str]]:
    """Name, loss and line style of the dense rows: the model's own normalizer, and softmax."""
    found = []
    for row in results[results["attention"] == "dense"].to_dict("records"):
        softmax = row.get("alpha") == 1
        name = "dense softmax" if softmax else f"dense entmax (α = {row.get('alpha', float('nan')):g})"
        found.append((name, float(row["loss"]), ":" if softmax else "-"))
    return list(dict.fromkeys(found))


def bucket_sharing(shared: pd.DataFrame) -> Figure:
    """``score/shared_buckets``: squared distance of a projected pair, and how often it is an edge, by shared buckets.

    A line for each quantization, over all layers; the dotted line is the share of gold edges among all pairs.
    """
    with style():
        figure = blank(7.6, 3.5)
        left, right = figure.subplots(1, 2)
        lines = list(shared.groupby(["same_size", "bucket_size"], sort=True))
        shades = colormaps["viridis"]
        for place, ((same_size, bucket_size), group) in enumerate(lines):
            total = _over_layers(group)
            colour = shades(0.9 * place / max(1, len(lines) - 1))
            kind = "" if same_size else ", equal width"
            look = {"color": colour, "marker": "o", "ms": 4, "ls": "-" if same_size else "--"}
            left.plot(total.index, total["distance"], label=f"bucket size {bucket_size}{kind}", **look)
            right.plot(total.index, total["gold_share"], **look)
        most = int(shared["shared"].max())
        base = (shared["gold_share"] * shared["pairs"]).sum() / shared["pairs"].sum()
        right.axhline(base, color="#333333", lw=1, ls=":")
        left.plot([], [], color="#333333", lw=1, ls=":", label=f"all pairs, {base:.3f}")  # for the legend of both
        left.set(ylabel="mean squared distance, projected", ylim=(0, None), title="distance")
        right.set(ylabel="share of pairs that are gold edges", ylim=(0, None), title="gold edges")
        for axes in (left, right):
            axes.set(xlim=(-0.3, most + 0.3), xticks=range(most + 1), xlabel="buckets that query and key share")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _over_layers(group: pd.DataFrame) -> pd.DataFrame:
    weighted = group[["distance", "gold_share"]].mul(group["pairs"], axis=0).groupby(group["shared"]).sum()
    return weighted.div(group.groupby("shared")["pairs"].sum(), axis=0)


def _panels(table: pd.DataFrame) -> list[str]:
    found = list(dict.fromkeys(table["surroundings"]))
    return sorted(found, key=lambda words: words != "") or [""]


def _panel_title(surroundings: str, panels: int) -> str:
    if surroundings:
        return f"united with {surroundings}"
    return "without window or global tokens" if panels > 1 else ""


def _draw_pattern(axes: Axes, pattern: str, group: pd.DataFrame) -> None:
    best = frontier(group)
    look = _look(pattern, group)
    order = {UPPER_BOUND: 5, CHANCE: 1, EVERYTHING: 1}.get(pattern, 3)
    axes.plot(best["sparsity"], best["recall"], zorder=order, **look)
    beaten = group.drop(index=best.index)
    axes.plot(beaten["sparsity"], beaten["recall"], alpha=0.45, zorder=order, **look | {"ls": "none"})


def _look(pattern: str, group: pd.DataFrame) -> dict[str, Any]:
    """Colour and marker of the pattern; open and dashed where it compares every pair."""
    quadratic = bool(group["quadratic"].any())
    colour, marker = colour_of(pattern), marker_of(pattern)
    return {
        "color": colour,
        "marker": marker,
        "ms": 11 if marker == "*" else 5,
        "mfc": "white" if quadratic and marker != "*" else colour,
        "ls": "none" if len(group) == 1 else ("--" if quadratic else "-"),
    }


def _gold_line(axes: Axes, points: pd.DataFrame) -> None:
    if "gold_sparsity" in points:
        axes.axvline(points["gold_sparsity"].mean(), color="#333333", lw=1, ls=":", zorder=0)


def _pattern_legend(points: pd.DataFrame) -> list[Line2D]:
    groups = points.groupby("pattern", sort=False)
    handles = [Line2D([], [], **_look(str(pattern), group), label=pattern) for pattern, group in groups]
    if points["quadratic"].any():
        grey: dict[str, Any] = {"color": "#555555", "marker": "o", "ms": 5, "mfc": "white", "ls": "--"}
        handles.append(Line2D([], [], **grey, label="open: compares every pair"))
    if "gold_sparsity" in points:
        gold = points["gold_sparsity"].mean()
        handles.append(Line2D([], [], color="#333333", lw=1, ls=":", label=f"gold sparsity {gold:.3f}"))
    return handles


def _attention_looks(names: Sequence[str]) -> dict[str, tuple[str, int, bool]]:
    others = [name for name in names if name not in _ATTENTIONS]
    looks = {name: _OTHER_ATTENTIONS[place % len(_OTHER_ATTENTIONS)] for place, name in enumerate(sorted(others))}
    return {**_ATTENTIONS, **looks}


def _dot(label: str, colour: str, marker: str = "o", size: float = 30, filled: bool = True) -> Line2D:
    face = colour if filled else "none"
    return Line2D([], [], ls="none", marker=marker, ms=size**0.5, mfc=face, mec=colour, mew=1.3, label=label)
