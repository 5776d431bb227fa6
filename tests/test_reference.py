"""The stage `score` against the numbers of the published Sparsefinder: 1,080 rows, each to 1e-4."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from torch import Tensor

from sparsefinder import score
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.graphs import QK
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.storage.store import Store
from tests.conftest import GRAPH

METRICS = ("sparsity", "recall", "exact")


@dataclass(frozen=True)
class Nothing:
    """No edge at all: what the published ``window`` unites its window with."""

    sparsity_parameter: ClassVar[None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, qk: QK, layer: int) -> Tensor:
        return torch.zeros_like(qk.allowed).expand(-1, qk.q.shape[1], -1, -1)


def pattern_of(row: dict[str, Any]) -> Any:
    return {
        "gold": Oracle,
        "window": Nothing,
        "distance": lambda: Distance(row["distance"], row["threshold"]),
        "quantize": lambda: Quantize(row["bucket_size"], row["same_size"]),
        "kmeans": lambda: KMeans(row["top_clusters"]),
    }[row["method"]]()


def settings_of(row: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k not in (*METRICS, "layer", "head", "projections", "causal")})


@pytest.mark.parametrize("projections", ["shared", "indep"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_row_of_the_reference(projections: str, causal: bool, tmp_path: Path) -> None:
    rows = json.loads((GRAPH / "golden_graph_metrics.json").read_text())
    expected: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["projections"] == projections and row["causal"] == causal:
            expected[settings_of(row)].append(row)
    configurations = tuple(
        Configuration(row["method"], pattern_of(row), row["window"], row["global_tokens"])
        for row in map(json.loads, expected)
    )
    file = {"shared": "golden_projections.pickle", "indep": "golden_projections_indep.pickle"}[projections]
    store = Store(
        tmp_path,
        {
            "qk_validation": GRAPH / "golden_enc-attn.pt",
            "projections": GRAPH / file,
            "centroids": GRAPH / "golden_centroids.pickle",
        },
    )
    score.run(score.ScoreSettings(configurations, causal=causal), store)
    found = pd.read_csv(tmp_path / "score" / "metrics.csv").set_index(["configuration", "layer", "head"])
    checked = 0
    for place, group in enumerate(expected.values()):
        for row in group:
            for name in METRICS:
                assert found.loc[(place, row["layer"], row["head"]), name] == pytest.approx(row[name], abs=1e-4), row
            checked += 1
    assert checked == len(found) > 200
