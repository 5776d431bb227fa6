"""The figures of a report with the words under them: what is drawn, over how many samples, and how it was averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from sparsefinder.analysis.bootstrap import Replicas
from sparsefinder.analysis.frontiers import comparable, references
from sparsefinder.analysis.iso_quality import NATS
from sparsefinder.analysis.method_families import BOUNDS, TOP_K, family_of
from sparsefinder.reporting import frontier_figures, heatmaps, length_figures, loss_figures
from sparsefinder.storage.manifests import Manifest


@dataclass(frozen=True)
class Illustration:
    """A figure, the name of its files, its heading and its caption."""

    name: str
    heading: str
    figure: Figure
    caption: str


def of_score(
    metrics: pd.DataFrame,
    points: pd.DataFrame,
    folder: Path | None,
    replicas: Replicas | None = None,
    distance: str = "l2",
) -> list[Illustration]:
    """What the artefact ``score`` shows; figures whose data are not there are left out.

    Args:
        metrics: ``score/metrics``.
        points: `frontiers.points` of them.
        folder: Of the artefact, for the tables and maps beside; None leaves out what is drawn from them.
        replicas: Of the points; None leaves out the bands.
        distance: The one that was measured against the number of shared buckets.
    """
    if points[["sparsity", "recall"]].dropna().empty:
        return []
    layers, heads = metrics["layer"].nunique(), metrics["head"].nunique()
    over = f"{_samples(metrics)}, then over {layers} layers × {heads} heads"
    illustrations = [_recall(points, over, replicas)]
    if _not_all_coloured(points):
        illustrations.append(_families(points, over, replicas))
    chosen = comparable(points)
    if not chosen.empty:
        compared = pd.concat([chosen, references(points, float(chosen["density"].median()))])
        illustrations.append(_layer_heads(metrics, compared))
    if folder is None:
        return illustrations
    shared = folder / "shared_buckets.parquet"
    if shared.is_file() and len(table := pd.read_parquet(shared)):
        illustrations.append(_shared(table, layers, distance))
    histogram = folder / "distance_histogram.parquet"
    if histogram.is_file() and len(table := pd.read_parquet(histogram)):
        illustrations.append(_histogram(table, distance))
    maps = folder / "maps.safetensors"
    if maps.is_file() and not chosen.empty:
        drawn = load_file(maps)
        mapped = [f"predicted_{configuration}" in drawn for configuration in points["configuration"]]
        illustrations.append(_map(metrics, comparable(points[mapped]), drawn))
    return illustrations


def of_evaluate(results: pd.DataFrame, manifest: Manifest | None) -> list[Illustration]:
    """What the artefact ``evaluate`` shows.

    Args:
        results: ``evaluate/results``, as `frontiers.described` gives it.
        manifest: Of the artefact, for numbers of blocks and tokens; None leaves them out.

    Returns:
        One figure, or none where no variant has a token graph.
    """
    if "sparsity" not in results or results.loc[results["attention"] != "dense", "sparsity"].dropna().empty:
        return []
    facts = {} if manifest is None else manifest.facts
    settings = {} if manifest is None else manifest.settings
    masked = facts.get("masked_tokens", results["masked_tokens"].iloc[0] if "masked_tokens" in results else None)
    loss = loss_figures.loss_name(results)
    caption = (
        f"{loss[0].upper()}{loss[1:]} of the model with each variant plugged in, above that of its dense attention, against the "
        "sparsity of the graph that was really run. Linear up to 0.01, logarithmic above; each panel has its own range. "
        "Filled: run by its buckets, or with a graph of its own; open: as a mask. Horizontal lines: dense attention."
    )
    if masked is not None:
        caption += f" Loss: mean over the same {masked} masked positions for every variant"
        caption += (
            f" in {facts['blocks']} blocks of the {facts.get('split', 'held-out')} split." if "blocks" in facts else "."
        )
    elif "blocks" in facts:
        caption += f" Loss: mean over the same {facts['blocks']} examples for every variant."
    if "measured" in settings:
        caption += f" Sparsity: mean over layers, heads and at most {settings['measured']} blocks."
    undefined = results[results["sparsity"].isna()]
    if len(undefined):
        undrawn = "; ".join(f"{row.variant} (loss {row.loss:.3f})" for row in undefined.itertuples())
        caption += f" Not drawn, because without a token graph sparsity is not defined: {undrawn}."
    return [Illustration("loss_sparsity", "Loss against sparsity", loss_figures.loss_sparsity(results), caption)]


def of_compare(results: pd.DataFrame) -> Illustration:
    """What the artefact ``compare`` shows, where it was timed.

    Args:
        results: ``compare/results``.
    """
    words = results[next(name for name in ("masked_tokens", "next_tokens") if name in results)]
    caption = (
        f"Loss above dense attention's on the same {int(words.iloc[0]):,} words, with its 95 % interval over "
        "texts drawn again, against the median time of a whole forward pass over one text of that length, all arms in turn. "
        f"Dotted: {NATS:g} nats, up to which an attention counts as being as good as dense. Settings of one pattern are joined; "
        "open markers lose more than the panel shows. Left of the grey line, the model with attention left out, nothing can be."
    )
    return Illustration(
        "loss_by_time", "Loss against time, at every length", length_figures.loss_by_time(results), caption
    )


def _recall(points: pd.DataFrame, over: str, replicas: Replicas | None) -> Illustration:
    caption = (
        f"Every configuration is a point, averaged over {over}. A line joins the configurations of a pattern that no other "
        "one of it beats; paler points are beaten. Up and to the right is better. The dotted vertical is the mean density of the "
        "gold graph, the star that graph itself, and random what chance recalls."
    )
    if TOP_K in set(points["pattern"]):
        caption += f" {TOP_K}: the keys of largest true score, as many for every query."
    if replicas is not None:
        caption += " Bands: 95 % intervals of the frontier over documents drawn again."
    if points["quadratic"].any():
        caption += " Open markers and dashed lines: predicting compares every pair, so it saves no work by itself."
    if _not_all_coloured(points):
        caption += (
            " In colour: the published patterns, the best of ours and of the others, the best that compares every pair."
        )
    if (points["united_with"] != "").any():
        caption += " A window and global tokens count as predicted, so they raise recall and lower sparsity together."
        if (points["united_with"] == "").any():
            caption += " Patterns that were run only without them are repeated in every panel."
    figure = frontier_figures.recall_sparsity(points, replicas)
    return Illustration("recall_sparsity", "Recall against sparsity", figure, caption)


def _not_all_coloured(points: pd.DataFrame) -> bool:
    """Whether there are so many patterns, bounds apart, that some of them are drawn in grey."""
    patterns = points.loc[points["pattern"].map(family_of) != BOUNDS, "pattern"].nunique()
    return len(frontier_figures.highlighted(points)) < patterns


def _families(points: pd.DataFrame, over: str, replicas: Replicas | None) -> Illustration:
    caption = (
        f"Every pattern beside its family, averaged over {over}, without window or global tokens where it was run so. "
        "Points, lines and bands as above; the bounds are the same in every panel."
    )
    figure = frontier_figures.recall_by_family(points, replicas)
    return Illustration("recall_by_family", "Every pattern, by family", figure, caption)


def _layer_heads(metrics: pd.DataFrame, chosen: pd.DataFrame) -> Illustration:
    recalls = {}
    for row in chosen.to_dict("records"):
        recalls[f"{row['label']}\n{row['density']:.1%} of pairs"] = _grid(_rows_of(metrics, row), "recall")
    gold = None
    if "gold_sparsity" in metrics:
        gold = _grid(_rows_of(metrics, chosen.iloc[0].to_dict()), "gold_sparsity")
    caption = (
        f"Gold sparsity of every head, and the recall of {_count(len(recalls))} at the density where the patterns lie closest "
        f"together, chance and the true scores among them where they were run; means over {_samples(metrics)}. A "
        "threshold names more pairs in some heads than in others: the density given is the mean over all heads."
    )
    return Illustration("layer_heads", "Layer by layer, head by head", heatmaps.layer_heads(gold, recalls), caption)


def _in_words(distance: str) -> str:
    return {"l2": "squared Euclidean distance", "euclidean": "Euclidean distance"}.get(
        distance, f"distance ({distance})"
    )


def _histogram(histogram: pd.DataFrame, distance: str) -> Illustration:
    drawn = histogram[histogram["configuration"] == histogram["configuration"].iloc[0]]
    caption = (
        f"How the {_in_words(distance)} of a projected query and key is distributed, for each number of buckets that the two "
        f"share: the share of such pairs in each of {drawn['low'].nunique()} equally wide bins, over all allowed pairs of all "
        f"layers and heads of the first held-out samples. Bucket size {drawn['bucket_size'].iloc[0]}; the table has the others."
    )
    figure = loss_figures.distance_histogram(drawn, _in_words(distance))
    return Illustration("distance_histogram", "Distances of pairs that share buckets", figure, caption)


def _shared(shared: pd.DataFrame, layers: int, distance: str) -> Illustration:
    caption = (
        f"Mean {_in_words(distance)} of a projected query and key (left) and the share of such pairs that are gold edges "
        "(right), by the number of buckets that the two share. Where quantization does what it should, the first falls and the "
        f"second rises. A line for each quantization, over all allowed pairs of {layers} layers and all heads of the first "
        "held-out samples, "
        f"{int(shared.groupby('configuration')['pairs'].sum().max()):,} pairs. Points at the right may stand for few pairs."
    )
    return Illustration(
        "shared_buckets", "What sharing a bucket means", loss_figures.bucket_sharing(shared, distance), caption
    )


def _map(metrics: pd.DataFrame, chosen: pd.DataFrame, maps: Mapping[str, np.ndarray]) -> Illustration:
    gold = maps["gold"]
    layer, head = _median_head(gold)
    predicted = {
        row["label"]: maps[f"predicted_{row['configuration']}"][layer, head]
        for row in chosen.to_dict("records")
        if f"predicted_{row['configuration']}" in maps
    }
    causal = "causal" in metrics and bool(metrics["causal"].fillna(False).any())
    caption = (
        f"Layer {layer}, head {head}, the one of median gold sparsity: the first {gold.shape[-1]} tokens of the first held-out "
        "sample. Left: dense probabilities (darkness is their square root). Then each predicted graph against their support. "
        "Recall and share of pairs are those of this map alone."
    )
    figure = heatmaps.attention_maps(gold[layer, head], predicted, causal)
    return Illustration("attention_map", "One attention map", figure, caption)


def _median_head(gold: np.ndarray) -> tuple[int, int]:
    edges = (gold > 0).sum((-2, -1))
    median = np.argsort(edges, axis=None, kind="stable")[edges.size // 2]
    layer, head = np.unravel_index(median, edges.shape)
    return int(layer), int(head)


def _rows_of(metrics: pd.DataFrame, point: Mapping[Any, Any]) -> pd.DataFrame:
    rows = metrics[metrics["configuration"].isin(point["members"])]
    return rows[rows["run"] == point["run"]] if "run" in rows else rows


def _grid(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A line for each layer and a column for each head; the mean over the seeds, where there are several."""
    return rows.groupby(["layer", "head"])[measure].mean().unstack("head")


def _samples(metrics: pd.DataFrame) -> str:
    if "samples" not in metrics:
        return "the held-out samples"
    least, most = metrics["samples"].min(), metrics["samples"].max()
    if least != most:
        return f"{least} to {most} held-out samples"
    return "one held-out sample" if most == 1 else f"{most} held-out samples"


def _count(patterns: int) -> str:
    return "one pattern" if patterns == 1 else f"{patterns} patterns"
