"""What a report says in words and tables: recall at equal density, variants, facts of the run, and what to look at twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from sparsefinder.frontiers import broken_curves, recall_table
from sparsefinder.store import ARTEFACTS, Manifest

NOISE = 0.01  # nats; two variants on the same masked positions that differ by less are not told apart
SAME = 1e-3  # nats; attention over every pair that differs by more from dense attention is not the same attention

_FACTS: dict[tuple[str, str], tuple[str, Callable[[Any], str]]] = {
    ("model", "validation_loss"): ("validation loss", lambda value: f"{value:.3f} nats"),
    ("model", "unigram_entropy"): ("unigram entropy of the validation tokens", lambda value: f"{value:.3f} nats"),
    ("model", "gold_sparsity"): ("gold sparsity after finetuning", lambda value: f"{value:.3f}"),
    ("score", "samples"): ("held-out samples scored", str),
    ("score", "gold_sparsity"): ("gold sparsity of the scored samples", lambda value: f"{value:.3f}"),
    ("evaluate", "split"): ("text evaluated on", lambda value: f"{value} split"),
    ("evaluate", "blocks"): ("text blocks evaluated", str),
    ("evaluate", "masked_tokens"): ("masked positions, the same for every variant", str),
}


def recall_lines(table: pd.DataFrame, densities: Sequence[float]) -> pd.DataFrame:
    """`frontiers.points` → recall of each pattern's frontier at equal density, as text; in brackets the far recall."""
    numbers = recall_table(table, densities)
    gold = gold_density(table)
    lines = pd.DataFrame(
        {
            "pattern": numbers["pattern"] + numbers["quadratic"].map({True: " *", False: ""}),
            "united with": numbers["surroundings"].replace("", "–"),
            "configurations": numbers["configurations"].astype(str),
        }
    )
    for density in densities:
        name = f"{_percent(density)} (gold)" if density in gold else _percent(density)
        lines[f"recall at {name}"] = [_recall(row, density) for row in numbers.to_dict("records")]
    return lines


def gold_density(table: pd.DataFrame) -> list[float]:
    """The mean density of the gold graph, as a list of one; empty where it is unknown."""
    known = table["gold_sparsity"].dropna() if "gold_sparsity" in table else pd.Series(dtype=float)
    return [1 - float(known.mean())] if len(known) else []


def variant_lines(results: pd.DataFrame) -> pd.DataFrame:
    """``evaluate/results`` as text; what has no token graph says so."""
    columns: dict[str, tuple[str, Callable[[float], str], str]] = {
        "loss": ("loss, nats", "{:.4f}".format, "–"),
        "loss_minus_entmax": ("Δ dense entmax", "{:+.4f}".format, "–"),
        "loss_minus_softmax": ("Δ dense softmax", "{:+.4f}".format, "–"),
        "perplexity": ("perplexity", "{:.2f}".format, "–"),
        "accuracy": ("accuracy", "{:.4f}".format, "–"),
        "accuracy_minus_entmax": ("Δ accuracy", "{:+.4f}".format, "–"),
        "sparsity": ("sparsity", "{:.3f}".format, "not defined"),
        "recall": ("recall", "{:.3f}".format, "not defined"),
        "computed_density": ("computed pairs", "{:.1%}".format, "not measured"),
        "output_error": ("output error", "{:.3f}".format, "not measured"),
        "latency_ms": ("latency, ms", "{:.1f}".format, "not measured"),
        "speed_against_dense": ("speed against dense", "{:.2f} ×".format, "not measured"),
        "predictor_share": ("predictor's share", "{:.0%}".format, "–"),
        "peak_memory_mb": ("peak memory, MB", "{:.0f}".format, "not measured"),
    }
    lines = pd.DataFrame({"variant": results["variant"]})
    if "adapt_steps" in results and (results["adapt_steps"] > 0).any():
        lines["trained on"] = [f"{row.adapt_steps} steps of {row.finetune_part}" for row in results.itertuples()]
    for name, (title, form, missing) in columns.items():
        if name in results:
            lines[title] = [missing if pd.isna(value) else form(float(value)) for value in results[name]]
    return lines


def fact_lines(manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """The figures that a run noted about itself, named and with units; those unknown here under the name they have."""
    lines = []
    for artefact, manifest in manifests.items():
        for name, value in manifest.facts.items():
            if isinstance(value, (dict, list)) or value is None:
                continue
            text, form = _FACTS.get((artefact, name), (f"{artefact}: {name.replace('_', ' ')}", _short))
            lines.append((text, form(value)))
        history = manifest.facts.get("history")
        if isinstance(history, list) and history and {"recall", "sparsity"} <= history[-1].keys():
            last = history[-1]
            lines.append(
                ("held-out recall of the projections", f"{last['recall']:.3f} at sparsity {last['sparsity']:.3f}")
            )
    return lines


def artefact_lines(manifests: Mapping[str, Manifest]) -> pd.DataFrame:
    """Where every artefact came from: its stage, seed, content and parents (hashes cut to 8 letters)."""
    return pd.DataFrame(
        {
            "artefact": name,
            "stage": manifest.stage,
            "seed": "–" if manifest.seed is None else str(manifest.seed),
            "content": manifest.content[:8],
            "made from": ", ".join(f"{parent} {content[:8]}" for parent, content in manifest.parents.items()) or "–",
        }
        for name, manifest in manifests.items()
    )


def read_manifests(store: Any) -> dict[str, Manifest]:
    """The manifests that are there, in the order of the stages, without that of the report itself."""
    found = {name: store.manifest(name) for name in ARTEFACTS if name != "report"}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def warnings(table: pd.DataFrame | None, results: pd.DataFrame | None, manifests: Mapping[str, Manifest]) -> list[str]:
    """What a reader should look at twice before believing a number, one sentence each."""
    found: list[str] = []
    model = manifests["model"].facts if "model" in manifests else {}
    if model.get("validation_loss", 0.0) >= model.get("unigram_entropy", float("inf")):
        found.append(
            "the model's validation loss is not below the unigram entropy: it has learned nothing from the context, and "
            "neither has its attention"
        )
    if table is not None:
        found += broken_curves(table)
        wrong = table[(table["sparsity"] == 0) & (table["recall"] < 1)]
        found += [f"{label} names every pair and still misses gold edges" for label in wrong["label"]]
    if results is not None:
        found += _about_variants(results)
    return found


def _about_variants(results: pd.DataFrame) -> list[str]:
    found: list[str] = []
    slower: list[str] = []
    for row in results[results["attention"] != "dense"].to_dict("records"):
        away, speed = row.get("loss_minus_entmax"), row.get("speed_against_dense")
        if pd.notna(away) and away < -NOISE and row.get("sparsity") != 0:
            found.append(
                f"{row['variant']} has a lower loss than dense attention by {-away:.3f} nats, more than {NOISE} nats of noise: "
                "a sparse approximation should not be better than what it approximates"
            )
        same_normalizer = row.get("alpha") == results["alpha"].iloc[0] if "alpha" in results else False
        if row.get("sparsity") == 0 and same_normalizer and pd.notna(away) and abs(away) > SAME:
            found.append(
                f"{row['variant']} computes every pair and still differs from dense attention by {away:+.4f} nats"
            )
        if pd.notna(speed) and speed < 1:
            slower.append(f"{row['variant']} ({speed:.2f} × its speed)")
    if slower:
        found.append(f"slower than dense attention on this machine: {'; '.join(slower)}")
    return found


def _recall(row: Mapping[Any, Any], density: float) -> str:
    if not row["defined"]:
        return "not defined"
    recall, far = row["recall", density], row["recall_far", density]
    if pd.isna(recall):
        return "not reached"
    return f"{recall:.3f} ({far:.3f})" if row["surroundings"] and pd.notna(far) else f"{recall:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
