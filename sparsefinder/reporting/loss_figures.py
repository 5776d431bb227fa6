"""Curves: loss against sparsity, and what sharing buckets says about a pair. Table → figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsefinder.analysis.method_families import BOUNDS, OURS, PUBLISHED, family_of
from sparsefinder.reporting.style import FEW, GREY, blank, look_of, panel_title, panels_of, style
from sparsefinder.reporting.text_tables import of_states

_NEAR = 0.01  # nats above dense attention up to which the axis is linear


def loss_sparsity(results: pd.DataFrame) -> Figure:
    """Loss above dense attention's against sparsity of every variant that has a token graph.

    Colour and marker are the pattern's, of more than `FEW` only ours, the published ones and the bounds; filled: it was run by
    its buckets, or brings its own graph; open: as a mask. A panel for each window with its global tokens, each with a range of
    its own, linear up to 0.01 and logarithmic above: what is near to dense attention stays apart. Without a dense row to compare
    with, the loss itself.

    Args:
        results: ``evaluate/results``, as `frontiers.described` gives it.
    """
    variants = results[results["attention"] != "dense"].dropna(subset=["sparsity"])
    named = _named_patterns(variants["pattern"])
    panels = panels_of(variants)
    lines = dense_losses(results)
    zero = lines[0][1] if lines else 0.0
    with style():
        figure = blank(4.2 * min(2, len(panels)) + 0.6, 3.6 * math.ceil(len(panels) / 2) + 1.2)
        grid = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False)
        for axes, united_with in zip(grid.flat, panels, strict=False):
            shown = variants[variants["united_with"] == united_with]
            for row in shown.to_dict("records"):
                known = row["pattern"] in named
                colour, marker = look_of(row["pattern"]) if known else (GREY, ".")
                look = {
                    "color": colour,
                    "marker": marker,
                    "ms": 6 if known else 4,
                    "mew": 1.2,
                    "zorder": 3 if known else 2,
                }
                face = "none" if row["attention"] == "masked" and known else colour
                axes.plot([row["sparsity"]], [row["loss"] - zero], ls="none", mfc=face, **look)
            for text, loss, dashes in lines:
                axes.axhline(loss - zero, color="#333333", lw=1.1, ls=dashes, zorder=1, label=text)
            axes.set(xlim=(-0.03, 1.03), title=panel_title(united_with, len(panels)))
            axes.set_xlabel("sparsity of the executed graph  (sparser →)")
            if lines:
                _scale(axes, (shown["loss"] - zero).tolist())
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        unit = "" if of_states(results) else ", nats"
        for axes in grid[:, 0]:
            axes.set_ylabel(f"{loss_name(results)}{' above dense' if lines else ''}{unit}  (better ↓)")
        handles = [_dot(name, *look_of(name)) for name in named]
        if others := variants.loc[~variants["pattern"].isin(named), "pattern"].nunique():
            handles.append(_dot(f"{others} other patterns", GREY, "."))
        if (variants["attention"] == "masked").any():
            handles.append(_dot("open: run as a mask", "#555555", "o", filled=False))
        handles += [Line2D([], [], color="#333333", lw=1.1, ls=dashes, label=t) for t, _, dashes in lines]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _scale(axes: Axes, losses: Sequence[float]) -> None:
    """Linear up to `_NEAR`, then a decade as high as that; ticks where there are points."""
    axes.set_yscale("symlog", linthresh=_NEAR, linscale=1.0)
    low, high = min([0.0, *losses]), max([_NEAR, *losses])
    axes.set_ylim(min(-0.1 * _NEAR, 1.3 * low), 1.4 * high)
    ticks = [-0.1, -_NEAR, 0.0, _NEAR / 2, _NEAR, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if 1.3 * low <= tick <= 1.4 * high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def loss_name(results: pd.DataFrame) -> str:
    """What the column ``loss`` is the loss of."""
    if of_states(results):
        return "1 − cosine of token states"
    return "masked-LM loss" if "task" not in results else f"loss of {results['task'].iloc[0].replace('_', ' ')}"


def dense_losses(results: pd.DataFrame) -> list[tuple[str, float, str]]:
    """Name, loss and line style of the dense rows: the model's own normalizer, and softmax."""
    lines = []
    for row in results[results["attention"] == "dense"].to_dict("records"):
        softmax = row.get("alpha") == 1
        name = "dense softmax" if softmax else f"dense entmax (α = {row.get('alpha', float('nan')):g})"
        lines.append((name, float(row["loss"]), ":" if softmax else "-"))
    return list(dict.fromkeys(lines))


def distance_histogram(histogram: pd.DataFrame, distance: str) -> Figure:
    """Distances of pairs, in a panel for each number of buckets that a pair shares.

    Args:
        histogram: ``score/distance_histogram``, the rows of one quantization.
        distance: Its name in words.
    """
    with style():
        numbers = sorted(histogram["shared"].unique())
        figure = blank(7.6, 0.9 + 1.1 * len(numbers))
        panels = figure.subplots(len(numbers), 1, sharex=True, squeeze=False)[:, 0]
        for axes, number in zip(panels, numbers, strict=True):
            group = histogram[histogram["shared"] == number]
            widths = group["high"] - group["low"]
            axes.bar(group["low"], group["pairs"] / max(1, group["pairs"].sum()), widths, align="edge", color="#4477AA")
            axes.set(ylabel=f"{number} shared", ylim=(0, None))
        panels[-1].set(xlabel=f"{distance}, projected", xlim=(0, float(histogram["high"].max())))
    return figure


def bucket_sharing(shared: pd.DataFrame, distance: str = "l2") -> Figure:
    """Distance of a projected pair, and how often it is an edge, by shared buckets.

    A line for each quantization, over all layers; the dotted line is the share of gold edges among all pairs.

    Args:
        shared: ``score/shared_buckets``.
        distance: The distance that was measured, by its setting's name.
    """
    with style():
        figure = blank(7.6, 3.5)
        left, right = figure.subplots(1, 2)
        lines = list(shared.groupby(["same_size", "bucket_size"], sort=True))
        shades = colormaps["viridis"]
        for index, ((same_size, bucket_size), group) in enumerate(lines):
            total = _over_layers(group)
            colour = shades(0.9 * index / max(1, len(lines) - 1))
            kind = "" if same_size else ", equal width"
            look = {"color": colour, "marker": "o", "ms": 4, "ls": "-" if same_size else "--"}
            left.plot(total.index, total["distance"], label=f"bucket size {bucket_size}{kind}", **look)
            right.plot(total.index, total["gold_share"], **look)
        most = int(shared["shared"].max())
        base = (shared["gold_share"] * shared["pairs"]).sum() / shared["pairs"].sum()
        right.axhline(base, color="#333333", lw=1, ls=":")
        left.plot([], [], color="#333333", lw=1, ls=":", label=f"all pairs, {base:.3f}")  # for the legend of both
        left.set(
            ylabel="mean squared distance, projected" if distance == "l2" else f"mean distance ({distance}), projected",
            ylim=(0, None),
            title="distance",
        )
        right.set(ylabel="share of pairs that are gold edges", ylim=(0, None), title="gold edges")
        for axes in (left, right):
            axes.set(xlim=(-0.3, most + 0.3), xticks=range(most + 1), xlabel="buckets that query and key share")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _over_layers(group: pd.DataFrame) -> pd.DataFrame:
    weighted = group[["distance", "gold_share"]].mul(group["pairs"], axis=0).groupby(group["shared"]).sum()
    return weighted.div(group.groupby("shared")["pairs"].sum(), axis=0)


def _named_patterns(patterns: pd.Series) -> list[str]:
    """Those that have a colour: all of a few, else ours, the published ones and the bounds."""
    names = [str(name) for name in dict.fromkeys(patterns)]
    if sum(family_of(name) != BOUNDS for name in names) > FEW:
        names = [name for name in names if family_of(name) in (BOUNDS, OURS, PUBLISHED)]
    return names


def _dot(label: str, colour: str, marker: str = "o", filled: bool = True) -> Line2D:
    face = colour if filled else "none"
    return Line2D([], [], ls="none", marker=marker, ms=5.5, mfc=face, mec=colour, mew=1.2, label=label)
