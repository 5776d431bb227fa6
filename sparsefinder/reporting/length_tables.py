"""What `compare` found, as tables of texts."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sparsefinder.analysis.iso_quality import NATS

EQUAL = f"The fastest attention of each length that loses no more than {NATS:g} nats more than dense attention"
COLUMNS = (
    "Recall and exact rows are those of the executed graph (of its exact part, where there is a tail) against the support of the "
    "model's own attention, estimated on drawn queries; pairs are all that are multiplied. –: not defined, or not measured. "
    "Speed: of the whole model, in that of torch's softmax. Bound: the time that the model takes with attention left out, in "
    "this one's."
)


def arm_lines(results: pd.DataFrame) -> pd.DataFrame:
    """A line for each length and arm."""
    return pd.DataFrame([_arm(row) for row in results.to_dict("records")])


def quality_lines(table: pd.DataFrame) -> pd.DataFrame:
    """``compare/equal_quality`` in words."""
    return pd.DataFrame(
        [
            {
                "length": f"{row['length']:,}",
                "fastest": row["arm"],
                "ms": _number(row["latency_ms"], ".0f"),
                "Δ dense": _number(row["loss_minus_dense"], "+.4f"),
                "speed": _number(row["speed"], ".2f"),
                "bound": _number(row["bound"], ".2f"),
                "share of the bound": _number(row["share_of_bound"], ".2f"),
                "fastest window": f"{row['window']} ({row['window_speed']:.2f})"
                if pd.notna(row.get("window"))
                else "–",
            }
            for row in table.to_dict("records")
        ]
    )


def _arm(row: dict[Any, Any]) -> dict[str, str]:
    half = (row["loss_minus_dense_high"] - row["loss_minus_dense_low"]) / 2
    difference = _number(row["loss_minus_dense"], "+.4f") + (f" ± {half:.4f}" if pd.notna(half) else "")
    return {
        "attention": row["arm"],
        "length": f"{row['length']:,}",
        "loss, nats": _number(row["loss"], ".4f"),
        "Δ dense": difference,
        "pairs": _number(row.get("computed_density"), ".1%"),
        "recall": _number(row.get("recall"), ".3f"),
        "exact rows": _number(row.get("exact"), ".3f"),
        "ms": _number(row.get("latency_ms"), ".1f"),
        "speed": _number(row.get("speed"), ".2f"),
        "bound": _number(row.get("share_of_bound"), ".2f"),
        "step, ms": _number(row.get("step_ms"), ".0f"),
        "step speed": _number(row.get("step_speed"), ".2f"),
        "MB": _number(row.get("peak_memory_mb"), ".0f"),
    }


def _number(value: Any, form: str) -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)
