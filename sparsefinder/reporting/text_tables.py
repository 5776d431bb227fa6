"""What a report says in words and tables: recall at equal density, variants, facts of the run, and what to look at twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from sparsefinder.analysis import frontiers
from sparsefinder.analysis.bootstrap import Replicas, with_intervals
from sparsefinder.analysis.comparisons import ours_minus_rival
from sparsefinder.analysis.frontiers import broken_curves, recall_table
from sparsefinder.analysis.method_families import PUBLISHED
from sparsefinder.analysis.seeds import with_deviations
from sparsefinder.storage.manifests import Manifest
from sparsefinder.storage.store import ARTEFACTS

_NAMED = 4  # of many that have the same to say, so many are named
SLOW = ("dense", "masked")  # attentions that compute every pair and say nothing about time
TRUE_SCORES = " (the true scores)"  # behind the name of a prediction that is just those
SAME = 1e-3  # nats; attention over every pair that differs by more from dense attention is not the same attention

_FACTS: dict[tuple[str, str], tuple[str, Callable[[Any], str]]] = {
    ("model", "validation_loss"): ("validation loss", lambda value: f"{value:.3f} nats"),
    ("model", "unigram_entropy"): ("unigram entropy of the validation tokens", lambda value: f"{value:.3f} nats"),
    ("model", "loss_without_source"): (
        "validation loss without a look at the text that is read",
        lambda value: f"{value:.3f} nats",
    ),
    ("model", "gold_sparsity"): ("gold sparsity after finetuning", lambda value: f"{value:.3f}"),
    ("calibration", "samples"): ("training samples calibrated on", str),
    ("calibration", "samples_validation"): ("held-out samples that the calibration was checked on", str),
    ("score", "samples"): ("held-out samples scored", str),
    ("score", "gold_sparsity"): ("gold sparsity of the scored samples", lambda value: f"{value:.3f}"),
    ("evaluate", "split"): ("text evaluated on", lambda value: f"{value} split"),
    ("evaluate", "blocks"): ("text blocks evaluated", str),
    ("evaluate", "task"): ("task", lambda value: str(value).replace("_", " ")),
    ("evaluate", "classes"): ("classes to tell apart", str),
    ("evaluate", "learned_examples"): ("examples that its head has learned from", str),
    ("evaluate", "texts"): ("texts that were embedded", str),
    ("evaluate", "full_texts"): ("of these as long as the limit", "{:.0%}".format),
    ("evaluate", "masked_tokens"): ("masked positions, the same for every variant", str),
}


def recall_lines(
    table: pd.DataFrame,
    densities: Sequence[float],
    replicas: Replicas | None = None,
    far: bool = True,
    runs: Sequence[pd.DataFrame] = (),
) -> pd.DataFrame:
    """Recall of each pattern's frontier at equal density, as text.

    Args:
        table: `frontiers.points`.
        densities: Shares of the allowed pairs.
        replicas: Of the points: half the width of the 95 % interval stands after ±; None leaves it out.
        far: Whether far recall stands in brackets.
        runs: The points of each run, where the table is their mean: one deviation over them stands after ±.
    """
    numbers = with_intervals(recall_table(table, densities), replicas, densities)
    if runs:
        numbers = with_deviations(numbers, runs, densities)
    gold = gold_density(table)
    lines = pd.DataFrame(
        {
            "pattern": [_named(row) for row in numbers.to_dict("records")],
            "united with": numbers["united_with"].replace("", "–"),
            "configurations": numbers["configurations"].astype(str),
        }
    )
    for density in densities:
        name = f"{_percent(density)} (gold)" if density in gold else _percent(density)
        lines[f"recall at {name}"] = [_recall(row, density, far) for row in numbers.to_dict("records")]
    return lines


def one_each(table: pd.DataFrame) -> bool:
    """Whether each pattern, with what it is united with, has one configuration: a point, no frontier to read recall from."""
    return not table.duplicated(["pattern", "united_with"]).any()


def measured_lines(table: pd.DataFrame) -> pd.DataFrame:
    """`frontiers.points` → one line for each configuration: its density, and what its graph finds there."""
    columns = {
        "density": "density",
        "recall": "recall",
        "recall_far": "far recall",
        "precision": "precision",
        "exact": "exact queries",
        "kept_mass": "kept mass",
    }
    lines = pd.DataFrame({"configuration": table["label"]})
    for name, title in columns.items():
        if name in table:
            lines[title] = ["not defined" if pd.isna(value) else f"{value:.3f}" for value in table[name]]
    for density in gold_density(table):
        lines["gold density"] = f"{density:.3f}"
    return lines


def recall_numbers(table: pd.DataFrame, densities: Sequence[float], replicas: Replicas | None) -> pd.DataFrame:
    """The numbers of `recall_lines`: one row per pattern × what it is united with × density, with the ends of the intervals."""
    numbers = with_intervals(recall_table(table, densities), replicas, densities)
    measures = [f"{name}{end}" for name in ("recall", "recall_far") for end in ("", "_low", "_high")]
    rows = [
        {"pattern": row["pattern"], "surroundings": row["united_with"]}  # the column's name in files from the beginning
        | {name: row[name] for name in ("quadratic", "configurations")}
        | {"density": density}
        | {name: row.get((name, density), float("nan")) for name in measures}
        for row in numbers.to_dict("records")
        for density in densities
    ]
    columns = ["pattern", "surroundings", "quadratic", "configurations", "density", *measures]
    return pd.DataFrame(rows, columns=columns)


def advantage_lines(
    table: pd.DataFrame,
    replicas: Replicas | None,
    levels: Sequence[float],
    rivals: Sequence[str] = (PUBLISHED,),
    axis: str = "pairs",
) -> pd.DataFrame:
    """The best sub-quadratic pattern of ours minus the best rival at equal density, or at equal cost, in words.

    Args:
        table: `frontiers.points`, or `frontiers.by_cost` of them.
        replicas: Of these points; None where there are no intervals.
        levels: Shares of the allowed pairs, or of the cost of dense attention.
        rivals: Families of patterns.
        axis: What the levels are shares of.
    """
    numbers = ours_minus_rival(table, replicas, levels, rivals)
    far = ours_minus_rival(table, replicas, levels, rivals, "recall_far")
    if numbers.empty:
        return pd.DataFrame()
    return pd.DataFrame(
        {
            axis: [_percent(level) for level in numbers["density"]],
            "ours": numbers["ours"],
            "best published" if tuple(rivals) == (PUBLISHED,) else "best other": numbers["rival"],
            "recall": [f"{row.recall_after:.3f} against {row.recall_before:.3f}" for row in numbers.itertuples()],
            "difference": [_change(row) for row in numbers.to_dict("records")],
            "of the far recall": [_change(row) for row in far.to_dict("records")],
        }
    )


def budget_lines(budget: pd.DataFrame) -> pd.DataFrame:
    """``score/error_budget`` with a row for each step and a column for each density."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in budget.to_dict("records"):
        line = lines.setdefault((row["method"], row["step"]), {"method": row["method"], "step": row["step"]})
        line[f"at {_percent(row['density'])}"] = _change(row)
    return pd.DataFrame(list(lines.values()))


def calibration_lines(dials: pd.DataFrame) -> pd.DataFrame:
    """``calibration/dials`` with a row for each pattern and what it is united with: what was asked for, and what came."""
    rows = []
    named = frontiers.described(dials)
    for (pattern, united_with, parameter, _), group in named.groupby(
        ["pattern", "united_with", "dial", "settings"], sort=False
    ):
        least, most = group["value"].min(), group["value"].max()
        rows.append(
            {
                "pattern": pattern,
                "united with": united_with or "–",
                "target": group["target"].iloc[0],
                "dial": f"{parameter} = {least:.4g}" + (f" … {most:.4g}" if most > least else ""),
                "density": f"{group['density'].mean():.3f}",
                "held out": f"{group['density_held_out'].mean():.3f}",
                "recall": f"{group['recall'].mean():.3f}",
                "recall, held out": f"{group['recall_held_out'].mean():.3f}",
                "heads that reach it": f"{group['reached'].sum()} of {len(group)}",
            }
        )
    return pd.DataFrame(rows)


def _named(row: Mapping[Any, Any]) -> str:
    what = TRUE_SCORES if row["true_scores"] else ""
    return f"{row['pattern']}{what}{' *' if row['quadratic'] else ''}"


def gold_density(table: pd.DataFrame) -> list[float]:
    """The mean density of the gold graph, as a list of one; empty where it is unknown."""
    known = table["gold_sparsity"].dropna() if "gold_sparsity" in table else pd.Series(dtype=float)
    return [1 - float(known.mean())] if len(known) else []


def variant_lines(results: pd.DataFrame, true_scores: Collection[str] = ()) -> pd.DataFrame:
    """``evaluate/results`` as text; what has no token graph says so, and so do ``true_scores``, patterns that are those."""
    columns: dict[str, tuple[str, Callable[[float], str], str]] = {
        "loss": (loss_title(results), "{:.4f}".format, "–"),
        "pooled_cosine": ("pooled cosine", "{:.4f}".format, "–"),
        "token_cosine": ("token cosine", "{:.4f}".format, "–"),
        "similarity_spearman": ("rank correlation of similarities", "{:.4f}".format, "–"),
        "retrieval_accuracy": ("text found by its title", "{:.3f}".format, "–"),
        "retrieval_mrr": ("reciprocal rank", "{:.3f}".format, "–"),
        "loss_minus_entmax": ("Δ dense entmax", "{:+.4f}".format, "–"),
        "loss_minus_softmax": ("Δ dense softmax", "{:+.4f}".format, "–"),
        "latency_ms": ("latency, ms", "{:.1f}".format, "not measured"),
        "perplexity": ("perplexity", "{:.2f}".format, "–"),
        "accuracy": ("accuracy", "{:.4f}".format, "–"),
        "accuracy_minus_entmax": ("Δ accuracy", "{:+.4f}".format, "–"),
        "macro_f1": ("macro-F1", "{:.4f}".format, "–"),
        "macro_f1_minus_entmax": ("Δ macro-F1", "{:+.4f}".format, "–"),
        "exact_match": ("exact match", "{:.4f}".format, "–"),
        "exact_match_minus_entmax": ("Δ exact match", "{:+.4f}".format, "–"),
        "answer_f1": ("F1 of answers", "{:.4f}".format, "–"),
        "answer_f1_minus_entmax": ("Δ F1 of answers", "{:+.4f}".format, "–"),
        "sparsity": ("sparsity", "{:.3f}".format, "not defined"),
        "recall": ("recall", "{:.3f}".format, "not defined"),
        "computed_density": ("computed pairs", "{:.1%}".format, "not measured"),
        "output_error": ("output error", "{:.3f}".format, "not measured"),
        "speed_against_dense": ("speed against dense entmax", "{:.2f} ×".format, "not measured"),
        "speed_against_softmax": ("speed against softmax (SDPA)", "{:.2f} ×".format, "not measured"),
        "predictor_share": ("predictor's share", "{:.0%}".format, "–"),
        "peak_memory_mb": ("peak memory, MB", "{:.0f}".format, "not measured"),
    }
    names = results["variant"].where(~results["pattern"].isin(true_scores), results["variant"] + TRUE_SCORES)
    lines = pd.DataFrame({"variant": names})
    if "adapt_steps" in results and (results["adapt_steps"] > 0).any():
        lines["trained on"] = [f"{row.adapt_steps} steps of {row.finetune_part}" for row in results.itertuples()]
    for name, (title, form, missing) in columns.items():
        if name in results:
            lines[title] = [missing if pd.isna(value) else form(float(value)) for value in results[name]]
    if "loss_minus_entmax_low" in results and "Δ dense entmax" in lines:
        ends = zip(results["loss_minus_entmax_low"], results["loss_minus_entmax_high"], strict=True)
        words = ["–" if pd.isna(low) else f"{low:+.4f} to {high:+.4f}" for low, high in ends]
        lines.insert(list(lines).index("Δ dense entmax") + 1, "its 95 % interval", words)
    return lines


def loss_title(results: pd.DataFrame) -> str:
    """What the column ``loss`` holds, with its unit."""
    return "1 − token cosine" if of_states(results) else "loss, nats"


def loss_unit(results: pd.DataFrame) -> str:
    """What differences of the column ``loss`` are counted in."""
    return "of 1 − token cosine" if of_states(results) else "nats"


def of_states(results: pd.DataFrame) -> bool:
    """Whether variants were compared by what they turn texts into."""
    return "task" in results and results["task"].iloc[0] == "embedding"


def asked(results: pd.DataFrame) -> str:
    """What every variant was asked, in words."""
    if of_states(results):
        return "texts, whose states are compared with the dense model's"
    return "masked positions" if "task" not in results else f"examples of {results['task'].iloc[0].replace('_', ' ')}"


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
            what = f"held-out recall of {artefact.replace('_', ' ')}"
            lines.append((what, f"{last['recall']:.3f} at sparsity {last['sparsity']:.3f}"))
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
    manifests = {name: store.manifest(name) for name in ARTEFACTS if name != "report"}
    return {name: manifest for name, manifest in manifests.items() if manifest is not None}


def warnings(table: pd.DataFrame | None, results: pd.DataFrame | None, manifests: Mapping[str, Manifest]) -> list[str]:
    """What a reader should look at twice before believing a number, one sentence each."""
    lines: list[str] = []
    model = manifests["model"].facts if "model" in manifests else {}
    if model.get("validation_loss", 0.0) >= model.get("unigram_entropy", float("inf")):
        lines.append(
            "the model's validation loss is not below the unigram entropy: it has learned nothing from the context, and "
            "neither has its attention"
        )
    if table is not None:
        lines += broken_curves(table)
        wrong = table[(table["sparsity"] == 0) & (table["recall"] < 1)]
        lines += [f"{label} names every pair and still misses gold edges" for label in wrong["label"]]
    if results is not None:
        lines += _about_variants(results)
    return lines


def _about_variants(results: pd.DataFrame) -> list[str]:
    lines: list[str] = []
    slower: list[tuple[float, str]] = []
    for row in results[results["attention"] != "dense"].to_dict("records"):
        away, speed = row.get("loss_minus_entmax"), row.get("speed_against_dense")
        high = row.get("loss_minus_entmax_high")
        if pd.notna(high) and high < 0 and row.get("sparsity") != 0:
            lines.append(
                f"{row['variant']} has a lower loss than dense attention by {-away:.3f} nats, and by at least {-high:.3f} at "
                "95 % over blocks of text: a sparse approximation should not be better than what it approximates"
            )
        same_normalizer = row.get("alpha") == results["alpha"].iloc[0] if "alpha" in results else False
        if row.get("sparsity") == 0 and same_normalizer and pd.notna(away) and abs(away) > SAME:
            lines.append(
                f"{row['variant']} computes every pair and still differs from dense attention by {away:+.4f} nats"
            )
        if pd.notna(speed) and speed < 1 and row["attention"] not in SLOW:
            slower.append((speed, f"{row['variant']} ({speed:.2f} × its speed)"))
    if slower:
        slowest = "; ".join(words for _, words in sorted(slower)[:_NAMED])
        rest = f"; and {len(slower) - _NAMED} more, see speed_against_dense" if len(slower) > _NAMED else ""
        lines.append(f"slower than exact dense entmax on this machine: {slowest}{rest}")
    return lines


def _recall(row: Mapping[Any, Any], density: float, show_far: bool) -> str:
    if not row["defined"]:
        return "not defined"
    recall, far = row["recall", density], row["recall_far", density]
    if pd.isna(recall):
        return "not reached"
    low, high = (row.get((f"recall_{end}", density)) for end in ("low", "high"))
    text = f"{recall:.3f}" if low is None or pd.isna(low) else f"{recall:.3f} ±{(high - low) / 2:.3f}"
    return f"{text} ({far:.3f})" if show_far and row["united_with"] and pd.notna(far) else text


def _change(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["change"]):
        return "–"
    if pd.isna(row["change_low"]):
        return f"{row['change']:+.3f}"
    return f"{row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
