"""What a reader asks first is answered by the page: a sentence, a frontier to hover, runs that differ in their seed as one."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from small_runs import make_evaluated, make_scored

from sparsefinder import report
from sparsefinder.analysis import frontiers, seeds
from sparsefinder.errors import UserError
from sparsefinder.report import ReportSettings
from sparsefinder.reporting import html, interactive, style
from sparsefinder.reporting.answer import COST, FASTER, WHICH, answers
from sparsefinder.reporting.text_tables import variant_lines
from sparsefinder.storage.store import Store


def scored(pattern: str, density: float, recall: float, **more: object) -> dict[str, object]:
    row = {"run": "a", "configuration": f"{pattern}{density}", "pattern": pattern, "layer": 0, "head": 0, "point": ""}
    return row | {"sparsity": 1 - density, "recall": recall, "quadratic": False, "level": density} | more


METRICS = pd.DataFrame(
    [
        *(scored("routed", d, r) for d, r in ((0.05, 0.6), (0.15, 0.8))),
        *(scored("distance", d, r, quadratic=True) for d, r in ((0.05, 0.9), (0.15, 0.95))),
        *(scored("kmeans", d, r) for d, r in ((0.05, 0.3), (0.2, 0.6))),
        scored("oracle", 0.05, 1.0, quadratic=True),
    ]
)
VARIANTS = pd.DataFrame(
    {
        "variant": ["dense full", "bucketed routed", "bucketed routed + window"],
        "attention": ["dense", "bucketed", "bucketed"],
        "pattern": ["full", "routed", "routed"],
        "united_with": ["", "", "window 3"],
        "level": [None, 0.15, 0.15],
        "sparsity": [0.0, 0.85, 0.7],
        "loss_minus_entmax": [0.0, 0.1, 0.004],
    }
)
COMPARED = pd.DataFrame(
    [
        {"arm": arm, "length": length, "speed": speed, "loss_minus_dense": loss}
        for length, fast in ((512, 0.8), (2048, 1.4), (8192, 3.0))
        for arm, speed, loss in (("softmax", 1.0, 0.0), ("routed level=0.2", fast, 0.002), ("window", 9.0, 0.5))
    ]
)


def test_the_three_questions_are_answered_first() -> None:
    said = answers(frontiers.points(METRICS), VARIANTS, COMPARED)
    assert list(said) == [WHICH, COST, FASTER]
    which, cost, faster = said.values()
    assert which.startswith("routed finds 0.700 of the gold edges")
    assert "+0.1000 nats on 15.0% of the pairs" in cost
    assert "+0.0040 on 30.0% of them, united with window 3" in cost
    assert faster.startswith("From 2,048 tokens on")
    assert "at 8,192 tokens routed level=0.2 by 3.00 ×" in faster, "what is faster but loses half a nat does not count"


def test_one_graph_that_is_run_twice_costs_what_it_costs_once() -> None:
    again = VARIANTS.iloc[[0, 1, 1]].assign(loss_minus_entmax=[0.0, 0.1, 0.09999])
    cost = answers(frontiers.points(METRICS), again.reset_index(drop=True), COMPARED)[COST]
    assert cost.count("nats") == 1
    assert ", and " not in cost


def test_what_was_not_measured_is_said() -> None:
    which, cost, faster = answers(frontiers.points(METRICS), None, None).values()
    assert "0.700" in which
    assert "stage=[evaluate,report]" in cost
    assert faster.startswith("Not measured in this run. `python scripts/run.py experiment=long`")
    slow = COMPARED.assign(speed=0.5)
    assert answers(None, None, slow) == {
        FASTER: "Up to 8,192 tokens nothing that loses at most 0.01 nats is faster than torch's softmax attention."
    }
    assert answers(None, None, None) == {}
    oracles = frontiers.points(METRICS[METRICS["pattern"] == "oracle"])
    assert "pattern=all" in answers(oracles, None, None)[WHICH]


def test_the_true_scores_are_faster_than_nothing() -> None:
    """Who knows them has computed them; and what holds at one length alone is said once."""
    known = COMPARED.replace({"arm": {"routed level=0.2": "oracle_topk share=0.05"}})
    assert "nothing" in answers(None, None, known)[FASTER]
    last = answers(None, None, COMPARED[COMPARED["length"] == 2048])[FASTER]
    assert last.count("1.40 ×") == 1


def test_the_true_scores_under_another_name_are_not_marked_the_best() -> None:
    lines = variant_lines(VARIANTS, {"routed"})
    assert lines["variant"].tolist()[1] == "bucketed routed (the true scores)"
    assert "best" not in html.table(lines, ["variant"], {"Δ dense entmax": "min"})


def test_the_frontier_as_data() -> None:
    data = interactive.frontier_data(frontiers.points(METRICS), VARIANTS)
    kinds = {pattern["name"]: pattern["kind"] for pattern in data["patterns"]}
    assert kinds == {"routed": "usable", "distance": "quadratic", "kmeans": "usable", "oracle": "oracle"}
    for pattern in data["patterns"]:
        assert (pattern["colour"], pattern["marker"]) == style.look_of(pattern["name"]), "as in every other figure"
    of_routed = {point[2]: point[6] for point in data["points"] if point[0] == 0}
    assert of_routed == {0.05: None, 0.15: 0.1}


def test_no_name_ends_the_script() -> None:
    page = html.frontier({"patterns": [{"name": "</script><b>"}]}, "<svg/>", "<b>")
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert json.loads(text)["patterns"][0]["name"] == "</script><b>"
    assert "<b>" not in page


def test_the_best_is_marked_among_those_that_compete() -> None:
    frame = pd.DataFrame({"pattern": ["oracle *", "a", "b", "c *"], "r": ["1.000", "0.700 ±0.1", "0.800", "0.900"]})
    assert re.findall(r'<td class="best">(.*?)</td>', html.table(frame, ["pattern"], {"r": "max"})) == ["0.800"]
    assert "best" not in html.table(frame, ["pattern"])


def test_runs_that_differ_in_their_seed_are_one_with_a_deviation() -> None:
    other = METRICS.assign(run="b", recall=METRICS["recall"] - 0.1)
    both = pd.concat(
        [METRICS.assign(point="seed=0 window=3"), other.assign(point="seed=1 window=3")], ignore_index=True
    )
    points = frontiers.points(both)
    merged = seeds.over_runs(points)
    assert len(merged) == len(METRICS)
    assert merged["runs"].tolist() == [2] * len(METRICS)
    assert merged["recall"].tolist() == pytest.approx((METRICS["recall"] - 0.05).tolist())
    assert merged["recall_deviation"].tolist() == pytest.approx([0.1 / 2**0.5] * len(METRICS))
    by_run = [group for _, group in points.groupby("run")]
    found = seeds.with_deviations(frontiers.recall_table(merged, [0.1]), by_run, [0.1])
    row = found[found["pattern"] == "routed"].iloc[0]
    assert row["recall_high", 0.1] - row["recall", 0.1] == pytest.approx(0.1 / 2**0.5)
    random = METRICS[METRICS["pattern"] == "kmeans"].assign(pattern="random", seed=0)
    drawn = pd.concat(
        [random.assign(point="seed=0"), random.assign(point="seed=1", run="b", seed=1)], ignore_index=True
    )
    again = seeds.over_runs(frontiers.points(drawn))
    assert len(again) == len(random), "a pattern that draws numbers has the seed of its run among its settings"
    assert not again["label"].str.contains("seed").any()
    apart = seeds.over_runs(
        frontiers.points(both.assign(point=["window=3"] * len(METRICS) + ["window=5"] * len(METRICS)))
    )
    assert len(apart) == 2 * len(METRICS), "what a sweep set beside the seed keeps them apart"


def test_a_report_over_runs(tmp_path: Path) -> None:
    """Two runs: their tables are read, and the page says mean ± deviation."""
    for name in ("one", "two"):
        make_evaluated(make_scored(tmp_path / name))
    store = Store(tmp_path / "both")
    settings = ReportSettings(dpi=30, runs=(str(tmp_path / "one"), str(tmp_path / "two")))
    assert len(settings.inputs) == 4
    report.run(settings, store)
    page = unescape((tmp_path / "both" / "report" / "index.html").read_text(encoding="utf-8"))
    assert "±0.000" in page
    assert "±: one deviation over the runs" in page
    assert "interval" not in page[page.index("The answer") : page.index("Recall against sparsity")]
    assert "Loss against sparsity" in page
    with pytest.raises(UserError, match="no finished"):
        report.run(ReportSettings(runs=(str(tmp_path / "both"),)), store)
