"""How figures look and how they are written: one colour and marker per pattern, the same bytes for the same numbers."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Of the colours of Okabe & Ito (2008) and Tol (2021), muted, distinguished by colour-blind readers: one and a marker for each
# pattern, no pair of them twice
_LOOKS = {
    "full": ("#000000", "s"),
    "oracle": ("#000000", "*"),
    "oracle_topk": ("#000000", "."),
    "oracle_topp": ("#000000", "+"),
    "oracle_head": ("#000000", "1"),
    "random": ("#8C8C8C", "x"),
    "window": ("#E69F00", "D"),
    "dilated": ("#E69F00", "v"),
    "sinks": ("#E69F00", "P"),
    "longformer": ("#56B4E9", "v"),
    "bigbird": ("#CC79A7", "P"),
    "block_local": ("#56B4E9", "s"),
    "openai_fixed": ("#999933", "h"),
    "openai_strided": ("#999933", "<"),
    "lsg": ("#44AA99", "X"),
    "lsg_local": ("#44AA99", "o"),
    "lsg_norm": ("#44AA99", "s"),
    "lsg_pooling": ("#44AA99", "^"),
    "lsg_lsh": ("#44AA99", "v"),
    "lsg_stride": ("#44AA99", "D"),
    "lsg_block_stride": ("#44AA99", "P"),
    "lsg_bos_pooling": ("#44AA99", "8"),
    "distance": ("#0072B2", "o"),
    "quantize": ("#D55E00", "s"),
    "kmeans": ("#009E73", "^"),
    "dotproduct_entmax": ("#0072B2", "X"),
    "routed": ("#882255", "p"),
    "routed_budget": ("#CC6677", "h"),
    "routed_bilinear": ("#AA4499", "p"),
    "refined": ("#CC6677", "d"),
    "routed_reranked": ("#882255", "*"),
    "lowrank": ("#332288", "d"),
    "bilinear": ("#AA4499", "8"),
    "reformer": ("#332288", "<"),
    "magicpig": ("#332288", "v"),
    "indexer": ("#332288", "P"),
    "hashattention": ("#332288", "X"),
    "routing": ("#117733", ">"),
    "routing_learned": ("#117733", "<"),
    "routing_nearest": ("#117733", "d"),
    "routing_trained": ("#117733", "P"),
    "clustered": ("#999933", "v"),
    "multipole": ("#999933", "o"),
    "quest": ("#56B4E9", "D"),
    "block_pool": ("#56B4E9", "h"),
    "pages": ("#CC79A7", "o"),
    "xattention": ("#CC79A7", "X"),
    "twilight": ("#CC79A7", "d"),
    "topk_norm": ("#CC6677", "<"),
}
_OTHER_COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#CC6677", "#882255", "#AA4499"]
_OTHER_MARKERS = "<>hpdX8H"

FEW = 8  # patterns besides the bounds that can be distinguished in one figure
GREY = "#BDBDBD"  # of what is shown for comparison, without a name
HIT, MISS, FALSE_ALARM, NOTHING = "#0072B2", "#D55E00", "#E3D9A8", "#FFFFFF"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "sparsefinder",  # ids inside the file do not change from run to run
    "svg.fonttype": "path",  # letters as outlines: readable where the font is missing
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for a ``with`` block; nothing global stays changed."""
    with rc_context(_STYLE):
        yield


def colour_of(pattern: str) -> str:
    """The colour of a pattern: fixed for the known ones, derived from the name for all others."""
    return look_of(pattern)[0]


def marker_of(pattern: str) -> str:
    """The marker of a pattern, chosen as its colour is."""
    return look_of(pattern)[1]


def look_of(pattern: str) -> tuple[str, str]:
    """Colour and marker of a pattern, the same in every figure; a pair that no known pattern has."""
    if pattern in _LOOKS:
        return _LOOKS[pattern]
    free = [(c, m) for c in _OTHER_COLOURS for m in _OTHER_MARKERS if (c, m) not in _LOOKS.values()]
    return free[int.from_bytes(_digest(pattern)[:4], "big") % len(free)]


def panels_of(table: pd.DataFrame) -> list[str]:
    """What patterns are united with in a table, a panel for each; nothing first."""
    names = list(dict.fromkeys(table["united_with"]))
    return sorted(names, key=lambda words: words != "") or [""]


def panel_title(united_with: str, panels: int) -> str:
    """The words above one of so many panels."""
    if united_with:
        return f"united with {united_with}"
    return "without window or global tokens" if panels > 1 else ""


def blank(width: float, height: float) -> Figure:
    """An empty figure (inches) that belongs to nobody's list of open windows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG, without a date."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def save_png(figure: Figure, path: Path, dpi: int) -> None:
    """The figure as PNG, without the name of the program that drew it."""
    with style():
        figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
