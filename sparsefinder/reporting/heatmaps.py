"""Grids in colour: layer × head, and one attention map with hits, misses and false alarms. Table or tensor → figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from sparsefinder.reporting.style import FALSE_ALARM, HIT, MISS, NOTHING, blank, style

_WRITTEN = 150  # most cells of a grid whose numbers are still legible inside


def layer_heads(gold: pd.DataFrame | None, recalls: Mapping[str, pd.DataFrame]) -> Figure:
    """Gold sparsity, and the recall of each pattern, for every layer and head.

    The recalls share one scale from 0 to 1; that of the gold sparsity begins at its lowest value.

    Args:
        gold: A row per layer and a column per head; None where it was not recorded.
        recalls: Title → grid of the same form.
    """
    grids = ([] if gold is None else [("gold sparsity", gold)]) + list(recalls.items())
    layers, heads = grids[0][1].shape
    columns = (len(grids) if len(grids) <= 4 else 3) if heads <= 8 else min(2, len(grids))
    rows = -(-len(grids) // columns)
    with style():
        figure = blank(max(1.9, 0.34 * heads + 0.5) * columns + 0.6, (max(1.3, 0.3 * layers) + 1.25) * rows)
        axes_grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for index, (axes, (title, grid)) in enumerate(zip(axes_grid, grids, strict=False)):
            is_gold = grid is gold
            low = float(np.nanmin(grid.to_numpy(float))) if is_gold else 0.0
            image = axes.imshow(
                grid.to_numpy(float), cmap="cividis" if is_gold else "viridis", vmin=low, vmax=1, aspect="auto"
            )
            axes.set(title=title, xlabel="head", xticks=_ticks(heads), yticks=_ticks(layers))
            axes.set_ylabel("layer" if index % columns == 0 else "")
            axes.grid(False)
            axes.spines[:].set_visible(False)
            if grid.size <= _WRITTEN:
                _write_numbers(axes, image)
            if is_gold:
                _bar(figure, image, [axes], "gold sparsity")
        compared = axes_grid[len(grids) - len(recalls) : len(grids)]
        if compared:
            _bar(figure, compared[-1].images[0], compared, "recall of gold edges")
        for axes in axes_grid[len(grids) :]:
            axes.remove()
    return figure


def attention_maps(gold: np.ndarray, predicted: Mapping[str, np.ndarray], causal: bool = False) -> Figure:
    """One head: its dense probabilities, and predicted graphs compared with their support. Rows are queries, columns are keys.

    Args:
        gold: ``(n, n)``, probabilities.
        predicted: Title → graph ``(n, n)`` bool.
        causal: Whether keys after the query are not allowed.
    """
    support = gold > 0
    allowed = np.tri(len(gold)).sum() if causal else gold.size
    with style():
        panels = 1 + len(predicted)
        figure = blank(2.65 * panels + 0.4, 3.5)
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        first.imshow(np.sqrt(gold), cmap="Greys", vmin=0, vmax=1, interpolation="none")
        first.set(title=f"dense entmax\n{support.sum() / allowed:.1%} of pairs are gold", ylabel="query position")
        for axes, (title, graph) in zip(others, predicted.items(), strict=True):
            kinds = np.select([graph & support, ~graph & support, graph & ~support], [1, 2, 3], default=0)
            colours = ListedColormap([NOTHING, HIT, MISS, FALSE_ALARM])
            axes.imshow(kinds, cmap=colours, vmin=0, vmax=3, interpolation="none")
            recall = (graph & support).sum() / max(1, support.sum())
            axes.set(title=f"{title}\nrecall {recall:.2f} with {graph.sum() / allowed:.1%} of pairs")
        for axes in (first, *others):
            axes.set_xlabel("key position")
            axes.grid(False)
            axes.spines[:].set_visible(True)
        words = {"hit: gold and predicted": HIT, "miss: gold only": MISS, "false alarm: predicted only": FALSE_ALARM}
        handles = [Patch(fc=colour, ec="#999999", lw=0.5, label=text) for text, colour in words.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _ticks(count: int) -> range:
    return range(0, count, max(1, count // 12))


def _bar(figure: Figure, image: AxesImage, beside: Sequence[Axes], label: str) -> None:
    aspect = 14 if image.get_size()[1] <= 8 else 32
    bar = figure.colorbar(image, ax=beside, location="bottom", label=label, aspect=aspect * len(beside), pad=0.03)
    bar.outline.set_visible(False)


def _write_numbers(axes: Axes, image: AxesImage) -> None:
    values = np.asarray(image.get_array(), dtype=float)
    for (layer, head), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
            axes.text(head, layer, text, ha="center", va="center", fontsize=6.5, color=ink)
