"""Loss against time at every length. Table → figure."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from sparsefinder.analysis.iso_quality import NATS
from sparsefinder.reporting.style import GREY, blank, colour_of, marker_of, style

_LEAST, _MOST = -0.01, 0.3  # nats above dense attention that are drawn; what loses more stands at the upper edge


def loss_by_time(results: pd.DataFrame) -> Figure:
    """Loss above dense attention's against the time of the whole model, a panel for each length.

    The dotted line is where an attention counts as being as good as dense; grey, from left to right: the model with attention
    left out, which no attention can be faster than, and with torch's softmax. Settings of one pattern are joined. What loses more
    than the panel shows stands at its upper edge, open.

    Args:
        results: ``compare/results``, timed.
    """
    timed = results.dropna(subset=["latency_ms"])
    lengths = sorted(timed["length"].unique())
    names = {arm: arm.split(" ")[0] for arm in timed["arm"]}
    columns = min(3, len(lengths))
    with style():
        figure = blank(3.1 * columns + 0.6, 2.9 * math.ceil(len(lengths) / columns) + 1.2)
        grid = figure.subplots(math.ceil(len(lengths) / columns), columns, squeeze=False, sharey=True)
        for axes, length in zip(grid.flat, lengths, strict=False):
            group = timed[timed["length"] == length]
            for arm in ("no attention", "softmax", "dense"):
                for time in group.loc[group["arm"] == arm, "latency_ms"]:
                    axes.axvline(
                        time, color=GREY if arm == "no attention" else "#333333", lw=1.1, ls=_DASHES[arm], zorder=1
                    )
            axes.axhline(NATS, color="#333333", lw=0.9, ls=":", zorder=1)
            compared = group[~group["arm"].isin(_DASHES)]
            for name, points in compared.groupby(compared["arm"].map(names), sort=False):
                _draw(axes, points.sort_values("latency_ms"), str(name))
            axes.set(title=f"{length:,} tokens", ylim=(_LEAST, _MOST * 1.06), xscale="log")
            axes.set_yscale("symlog", linthresh=NATS, linscale=0.6)
            axes.set_ylim(_LEAST, _MOST * 1.15)
            axes.set_yticks([0, NATS, 0.03, 0.1, _MOST], ["0", f"{NATS:g}", "0.03", "0.1", f"≥ {_MOST:g}"])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("whole model, ms  (← faster)")
        for axes in list(grid.flat)[len(lengths) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("loss above dense, nats  (better ↓)")
        figure.legend(handles=_handles(names), loc="outside lower center", ncols=4, frameon=False)
    return figure


_DASHES = {"no attention": "-", "softmax": "-", "dense": "--"}
_IN_WORDS = {"no attention": "attention left out", "softmax": "torch's softmax", "dense": "dense, the model's own"}


def _draw(axes: object, points: pd.DataFrame, name: str) -> None:
    colour, marker = colour_of(name), marker_of(name)
    losses = points["loss_minus_dense"].clip(_LEAST, _MOST)
    low = losses - points["loss_minus_dense_low"].clip(_LEAST, _MOST)
    high = points["loss_minus_dense_high"].clip(_LEAST, _MOST) - losses
    inside = points["loss_minus_dense"] < _MOST
    look = {"color": colour, "lw": 1.0, "zorder": 2}
    axes.plot(points["latency_ms"], losses, **look)  # type: ignore[attr-defined]
    errors = [low.clip(lower=0).fillna(0), high.clip(lower=0).fillna(0)]
    axes.errorbar(points["latency_ms"], losses, errors, fmt="none", **look)  # type: ignore[attr-defined]
    for filled, part in ((True, inside), (False, ~inside)):
        face = colour if filled else "white"
        axes.scatter(  # type: ignore[attr-defined]
            points["latency_ms"][part], losses[part], s=26, marker=marker, fc=face, ec=colour, lw=1.1, zorder=3
        )


def _handles(names: dict[str, str]) -> list[Line2D]:
    patterns = dict.fromkeys(name for arm, name in names.items() if arm not in _DASHES)
    handles = [
        Line2D([], [], ls="none", marker=marker_of(name), color=colour_of(name), ms=5, label=name.replace("_", " "))
        for name in patterns
    ]
    lines = [arm for arm in _DASHES if arm in names]
    return handles + [
        Line2D(
            [], [], color=GREY if arm == "no attention" else "#333333", lw=1.1, ls=_DASHES[arm], label=_IN_WORDS[arm]
        )
        for arm in lines
    ]
