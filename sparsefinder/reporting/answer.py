"""What somebody who opens a report wants to know first: which method, what it costs, from which length on it is faster."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sparsefinder.analysis.frontiers import recall_table
from sparsefinder.analysis.iso_quality import NATS
from sparsefinder.analysis.method_families import BOUNDS, family_of
from sparsefinder.reporting.text_tables import loss_unit

LEVEL = 0.1  # share of the pairs at which the first question is asked


WHICH, COST, FASTER = (
    "Which method, with 10 % of the pairs?",
    "What does it cost in loss?",
    "From which length on is it faster?",
)


def answers(
    points: pd.DataFrame | None, variants: pd.DataFrame | None, compared: pd.DataFrame | None
) -> dict[str, str]:
    """The three questions with a sentence for each that the run can answer; for the others, the command that does.

    Args:
        points: `frontiers.points`.
        variants: ``evaluate/results``, as `frontiers.described` gives it.
        compared: ``compare/results``.
    """
    said: dict[str, str] = {}
    best = None if points is None else _best(points)
    if best is not None:
        pattern, united, recall = best
        name = f"{pattern}{f' with {united}' if united else ''}"
        said[WHICH] = f"{name} finds {recall:.3f} of the gold edges, the most of those that do not compare every pair."
        said[COST] = _cost(variants, pattern)
    elif points is not None:
        said[WHICH] = (
            "Of the patterns scored here that do not compare every pair, none comes to 10 %: pattern=all sweeps them."
        )
    if compared is not None and "speed" in compared:
        said[FASTER] = _faster(compared)
    elif said:
        said[FASTER] = (
            "Not measured in this run. `python scripts/run.py experiment=long` measures 512 to 8,192 tokens, in about an hour."
        )
    return {question: answer for question, answer in said.items() if answer}


def _best(points: pd.DataFrame) -> tuple[str, str, float] | None:
    table = recall_table(points, [LEVEL])
    if table.empty:
        return None
    usable = table[~table["quadratic"].astype(bool) & ~table["true_scores"].astype(bool)]
    usable = usable[usable["pattern"].map(family_of) != BOUNDS]
    rows = [row for row in usable.to_dict("records") if pd.notna(row["recall", LEVEL])]
    if not rows:
        return None
    row = max(rows, key=lambda row: float(row["recall", LEVEL]))
    return str(row["pattern"]), str(row["united_with"]), float(row["recall", LEVEL])


def _cost(variants: pd.DataFrame | None, pattern: str) -> str:
    elsewhere = (
        f"What {pattern} costs was not measured in this run: stage=[evaluate,report] does, where there is a model."
    )
    if variants is None:
        return elsewhere
    if "loss_minus_entmax" not in variants:
        return ""
    mine = variants[(variants["pattern"] == pattern) & (variants["attention"] != "dense")]
    mine = mine.dropna(subset=["sparsity", "loss_minus_entmax"])
    if mine.empty:
        return elsewhere
    away = (np.log((1 - mine["sparsity"]).clip(lower=1e-4) / LEVEL)).abs()
    row = mine.loc[away.idxmin()]
    unit = loss_unit(variants)
    text = f"In the model it costs {row['loss_minus_entmax']:+.4f} {unit} on {1 - row['sparsity']:.1%} of the pairs"
    others = mine[mine["united_with"] != row["united_with"]]  # of one graph, masked and bucketed differ by rounding
    if not others.empty and others["loss_minus_entmax"].min() < row["loss_minus_entmax"]:
        best = others.loc[others["loss_minus_entmax"].idxmin()]
        beside = f"united with {best['united_with']}" if best["united_with"] else "alone"
        text += f", and {best['loss_minus_entmax']:+.4f} on {1 - best['sparsity']:.1%} of them, {beside}"
    return f"{text}, against dense attention."


def _faster(compared: pd.DataFrame) -> str:
    timed = compared.dropna(subset=["speed", "loss_minus_dense"])
    timed = timed[~timed["arm"].isin(["dense", "softmax", "no attention"])]
    timed = timed[timed["arm"].map(family_of) != BOUNDS]  # nobody has the true scores before they are computed
    good = timed[timed["loss_minus_dense"] <= NATS]
    lengths = sorted(compared["length"].unique())
    faster = [length for length in lengths if (good.loc[good["length"] == length, "speed"] > 1).any()]
    from_here = [length for length in lengths if all(each in faster for each in lengths if each >= length)]
    if not from_here:
        return f"Up to {lengths[-1]:,} tokens nothing that loses at most {NATS:g} nats is faster than torch's softmax attention."
    at = good[good["length"] == from_here[0]]
    first = at.loc[at["speed"].idxmax()]
    text = (
        f"From {from_here[0]:,} tokens on an attention that loses at most {NATS:g} nats is faster than torch's softmax: "
        f"{first['arm']} by {first['speed']:.2f} ×"
    )
    if len(from_here) > 1:
        last = good[good["length"] == lengths[-1]]
        top = last.loc[last["speed"].idxmax()]
        text += f", at {lengths[-1]:,} tokens {top['arm']} by {top['speed']:.2f} ×"
    return f"{text}."
