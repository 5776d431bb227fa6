"""The figure of the README: one head, its gold edges, and what predictions with about a tenth of the pairs find of them.

    python benchmarks/readme_figure.py --run runs/tiny        # writes docs/figures/attention_map.png, in seconds

The head of median gold sparsity of the first held-out text, as in the report; of each pattern the value of its sparsity parameter
whose mean density over all texts and heads is nearest to 10 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from sparsefinder.analysis import frontiers
from sparsefinder.experiment import named
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.reporting import heatmaps, style
from sparsefinder.storage.samples import load_samples
from sparsefinder.storage.store import Store

PATTERNS = ("window", "kmeans", "distance", "routed")
OUT = Path(__file__).parent.parent / "docs" / "figures" / "attention_map.png"


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    store = Store(given.run)
    points = frontiers.points(pd.read_parquet(store.path("score") / "metrics.parquet"))
    gold = load_file(store.path("score") / "maps.safetensors")["gold"]  # (L, H, n, n)
    edges = (gold > 0).sum((-2, -1))
    layer, head = map(int, np.unravel_index(np.argsort(edges, axis=None, kind="stable")[edges.size // 2], edges.shape))
    qk, tokens = load_samples(store.path("qk_validation")).layer(0, layer=layer), gold.shape[-1]
    predicted = {}
    for name in PATTERNS:
        rows = points[(points["pattern"] == name) & (points["united_with"] == "")]
        row = rows.loc[np.log(rows["density"] / 0.1).abs().idxmin()]
        kind, settings, _ = named.filled("pattern", name, {"alpha": 1.5, "seed": 0, "causal": False})
        parameter = kind.sparsity_parameter
        pattern = kind(**{**settings, parameter: type(settings[parameter])(row[parameter])})
        graph = Configuration(name, pattern).build(Learned.load(store, pattern.needs))(qk, layer)
        predicted[f"{name} {parameter}={row[parameter]:g}"] = graph[0, head, :tokens, :tokens].numpy()
        print(f"{name} {parameter}={row[parameter]:g}: {row['density']:.1%} of all pairs, recall {row['recall']:.3f}")
    style.save_png(heatmaps.attention_maps(gold[layer, head], predicted), given.out, 110)
    print(f"{given.out}: layer {layer}, head {head}")


if __name__ == "__main__":
    main()
