"""At equal quality: the fastest attention at every length that loses no more than so much."""

from __future__ import annotations

import pandas as pd

NATS = 0.01  # more than dense attention loses, that count as the same quality
SAME = 1e-3  # nats by which an attention may differ from dense attention and still be the same, summed in another order
_CONTROLS = ("dense", "softmax", "no attention")


def at_equal_quality(results: pd.DataFrame, nats: float = NATS) -> pd.DataFrame:
    """The fastest arm of each length whose loss is no more than ``nats`` above dense attention's, and what is left to gain.

    Args:
        results: ``compare/results``.
        nats: How much more loss counts as the same quality.

    Returns:
        A row for each length, of those that were timed: the arm, its time and loss difference, ``speed`` in that of torch's
        softmax, ``bound``, the speed of the same model with attention left out, and the share of that bound that is reached.
        The same for the fastest ``window`` of that quality, the rival to beat.
    """
    if "latency_ms" not in results:
        return pd.DataFrame()
    rows = []
    for length, group in results.dropna(subset=["latency_ms"]).groupby("length"):
        same = group[(group["loss_minus_dense"] <= nats) & (group["arm"] != "no attention")]
        without = group.loc[group["arm"] == "no attention", "speed"]
        bound = float(without.iloc[0]) if len(without) else float("nan")
        best = same.loc[same["latency_ms"].idxmin()]
        windows = same[same["arm"].str.startswith("window")]
        row = {name: best[name] for name in ("arm", "latency_ms", "loss_minus_dense", "speed")}
        row |= {"length": length, "bound": bound, "share_of_bound": best["speed"] / bound}
        if len(windows):
            rival = windows.loc[windows["latency_ms"].idxmin()]
            row |= {"window": rival["arm"], "window_speed": rival["speed"]}
        rows.append(row)
    table = pd.DataFrame(rows)
    first = ["length", "arm"]
    return table[first + [name for name in table if name not in first]] if len(table) else table


def alarms(results: pd.DataFrame) -> list[str]:
    """What must not be: a sparse attention better than dense beyond noise, and one on all pairs that differs from it."""
    lines = []
    for row in results[~results["arm"].isin(_CONTROLS)].to_dict("records"):
        where = f"{row['arm']} at {row['length']} tokens"
        if row["loss_minus_dense_high"] < 0 and row["loss_minus_dense"] < -SAME:
            lines.append(
                f"{where} loses less than dense attention, by {-row['loss_minus_dense']:.4f} nats and at least "
                f"{-row['loss_minus_dense_high']:.4f} at 95 %: look twice"
            )
        if row.get("sparsity") == 0 and abs(row["loss_minus_dense"]) > SAME:
            lines.append(
                f"{where} names every pair and differs from dense attention by {row['loss_minus_dense']:+.4f} nats"
            )
    return lines
