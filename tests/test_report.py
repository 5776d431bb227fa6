"""The report: every number on it comes from the tables, whatever was run, and the same tables give the same bytes."""

from __future__ import annotations

import ast
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from small_runs import RESULTS, make_evaluated, make_scored, variant

from sparsefinder import report, score
from sparsefinder.analysis import frontiers
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.window import Window
from sparsefinder.report import ReportSettings
from sparsefinder.reporting import captions, frontier_figures, heatmaps, html, style, text_tables
from sparsefinder.storage.manifests import plain
from sparsefinder.storage.store import Store
from tests.conftest import ROOT

FIGURES = {"recall_sparsity", "loss_sparsity", "layer_heads", "shared_buckets", "attention_map"}
FAST = ReportSettings(dpi=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run of everything, with its report."""
    store = make_evaluated(make_scored(tmp_path_factory.mktemp("runs") / "whole"))
    store.note("model", validation_loss=4.25, unigram_entropy=6.5, gold_sparsity=0.86)
    (store.run_dir / "model").mkdir()
    store.finish("model", "finetune", {"alpha": 1.5}, {}, 3)
    report.run(FAST, store)
    store.finish("report", "report", {}, {}, None)
    return store


@pytest.fixture(scope="module")
def metrics(run: Store) -> pd.DataFrame:
    return pd.read_parquet(run.path("score") / "metrics.parquet")


def _page(store: Store) -> str:
    return (store.run_dir / "report" / "index.html").read_text(encoding="utf-8")


def _files(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store.run_dir / "report").iterdir()}


def _drawn(store: Store) -> set[str]:
    return {name.removesuffix(".png") for name in _files(store) if name.endswith(".png")}


# ---- the page ----


def test_report_has_every_figure_twice_and_a_page(run: Store) -> None:
    names = {path.name for path in (run.run_dir / "report").iterdir()}
    drawn = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert names == {"index.html", "recall.csv", "recall.parquet"} | drawn
    assert (run.run_dir / "report" / "recall_sparsity.png").read_bytes().startswith(b"\x89PNG")


def test_page_needs_nothing_else(run: Store) -> None:
    text = _page(run)
    found = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,30})""", text)
    links = [link for link in found if not link.startswith("#")]  # but those within the page
    assert len(links) == len(FIGURES)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not re.search(r"<script [^>]*src|<link|@import|url\(", text)


def test_page_is_well_formed(run: Store) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img", "input"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(_page(run))
    assert not open_tags


def test_page_tells_what_the_manifests_say(run: Store) -> None:
    text = _page(run)
    for fact in ("4.250 nats", "6.500 nats", "0.860", "test split", run.manifest("score").content[:8], "torch 2."):
        assert fact in text


def test_page_escapes_names(tmp_path: Path) -> None:
    store = make_evaluated(Store(tmp_path), (*RESULTS, variant("<b>bold</b>", "masked", 5.0, sparsity=0.5, recall=0.5)))
    report.run(FAST, store)
    assert "&lt;b&gt;bold" in _page(store)
    assert "<b>" not in _page(store)


def test_every_part_escapes_what_comes_in() -> None:
    """And is not escaped again when it becomes part of the document."""
    odd = """<b a="'">&amp;"""
    frame = pd.DataFrame({odd: [odd, "–"], "n": [1, 2.5]})
    parts = {
        "note": html.note(odd),
        "figure": html.figure("<svg/>", odd),
        "table": html.table(frame, [odd]),
        "facts": html.facts([(odd, odd)]),
        "warning": html.warning([odd]),
        "folded": html.folded(odd, {"setting": odd}),
    }
    text = html.document(odd, odd, [(odd, part) for part in parts.values()])
    assert "<b " not in text
    for part in parts.values():
        assert str(part) in text
    assert '<td class="words none">–</td>' in parts["table"]
    assert unescape(parts["note"]) == f'<p class="note">{odd}</p>'


# ---- whatever was run ----


def test_nothing_to_report_names_the_stages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run stage=score, stage=evaluate or stage=compare first"):
        report.run(FAST, Store(tmp_path))
    assert not (tmp_path / "report").exists()


def test_evaluate_without_score(tmp_path: Path) -> None:
    store = make_evaluated(Store(tmp_path))
    report.run(FAST, store)
    assert _drawn(store) == {"loss_sparsity"}
    assert "bucketed kmeans" in report.summary(store)


def test_score_of_one_pattern_without_evaluate(tmp_path: Path) -> None:
    store = make_scored(tmp_path / "run", (Configuration("window", Window(5)),))
    report.run(FAST, store)
    first = _files(store)
    assert _drawn(store) == {"recall_sparsity", "layer_heads", "attention_map"}
    assert "window" in report.summary(store)
    report.run(FAST, store)
    assert _files(store) == first  # the same tables give the same bytes


def test_score_of_dense_attention_alone(tmp_path: Path) -> None:
    store = make_scored(tmp_path / "run", (Configuration("full", Full()),))
    report.run(FAST, store)
    assert _drawn(store) == {"recall_sparsity"}


def test_columns_may_be_missing(run: Store, tmp_path: Path, metrics: pd.DataFrame) -> None:
    few = metrics[["configuration", "pattern", "layer", "head", "sparsity", "recall"]]
    folder = tmp_path / "score"
    folder.mkdir()
    few.to_parquet(folder / "metrics.parquet")
    store = Store(tmp_path)
    store.finish("score", "score", {}, {}, None)
    report.run(FAST, store)
    assert _drawn(store) == {"recall_sparsity", "layer_heads"}


def test_pattern_without_a_graph_is_not_defined(metrics: pd.DataFrame) -> None:
    pooled = metrics[metrics["pattern"] == "kmeans"].assign(pattern="pooled", sparsity=np.nan, recall=np.nan)
    pooled["configuration"] += 1000
    points = frontiers.points(pd.concat([metrics, pooled]))
    lines = text_tables.recall_lines(points, [0.2])
    assert set(lines.loc[lines["pattern"] == "pooled", "recall at 20 %"]) == {"not defined"}
    frontier_figures.recall_sparsity(points)


def test_variant_without_a_graph_is_not_defined(run: Store) -> None:
    lines = text_tables.variant_lines(frontiers.described(pd.read_parquet(run.path("evaluate") / "results.parquet")))
    pooled = lines.set_index("variant").loc["pooled"]
    assert (pooled["sparsity"], pooled["recall"], pooled["predictor's share"]) == ("not defined", "not defined", "–")
    assert "sparsity is not defined: pooled (loss 4.400)" in _page(run)


def test_settings_check_themselves() -> None:
    assert ReportSettings(levels=[0.1]).levels == (0.1,)  # type: ignore[arg-type]
    for wrong in ({"levels": (0.0,)}, {"levels": ()}, {"dpi": 0}):
        with pytest.raises(UserError, match="report"):
            ReportSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [report, text_tables, frontiers, html])
def test_matplotlib_is_imported_only_to_draw(module: ModuleType) -> None:
    """The command line imports the report whatever it was asked to do."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in imported if re.search("matplotlib|drawing|figures|heatmaps|illustrations", line)]


# ---- frontiers ----


def _points(*pairs: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"density": [1 - s for s, _ in pairs], "sparsity": [s for s, _ in pairs], "recall": [r for _, r in pairs]}
    )


def test_frontier_is_what_nobody_beats() -> None:
    generator = np.random.default_rng(0)
    pairs = [tuple(pair) for pair in generator.integers(0, 8, (60, 2)) / 8]
    found = frontiers.frontier(_points(*pairs))

    def beaten(s: float, r: float) -> bool:
        return any(s2 >= s and r2 >= r and (s2, r2) != (s, r) for s2, r2 in pairs)

    assert set(zip(found["sparsity"], found["recall"], strict=True)) == {pair for pair in pairs if not beaten(*pair)}
    assert found["sparsity"].is_monotonic_increasing
    assert found["recall"].is_monotonic_decreasing


def test_recall_at_equal_density() -> None:
    points = _points((0.9, 0.2), (0.8, 0.6), (0.7, 0.5))
    levels = [
        0.15,
        0.2,
        0.05,
        0.3,
    ]  # no configuration is so sparse as the third, none on the frontier so dense as the last
    assert frontiers.recalls_at(points, levels) == pytest.approx([0.4, 0.6, np.nan, np.nan], nan_ok=True)
    assert frontiers.recalls_at(_points((0.95, 1.0)), [0.3]) == [1.0]  # more pairs cannot lose an edge


def test_recall_at_equal_density_is_interpolation_on_the_frontier() -> None:
    generator = np.random.default_rng(1)
    levels = [0.05, 0.1, 0.25, 0.5, 0.9]
    for _ in range(30):
        points = _points(*[tuple(pair) for pair in generator.random((8, 2))])
        front = frontiers.frontier(points).iloc[::-1]
        slow = [np.interp(level, front["density"], front["recall"], left=np.nan, right=np.nan) for level in levels]
        assert frontiers.recalls_at(points, levels) == pytest.approx(slow, nan_ok=True)


def test_points_are_means_over_layers_and_heads(metrics: pd.DataFrame) -> None:
    points = frontiers.points(metrics)
    assert len(points) == metrics["configuration"].nunique()
    for row in points.itertuples():
        own = metrics[metrics["configuration"] == row.configuration]
        assert row.recall == pytest.approx(sum(own["recall"]) / len(own))
    labels = set(points["label"])
    assert {"oracle", "kmeans top_clusters=2", "quantize bucket_size=4 + window 3 + 1 global"} <= labels
    assert len(labels) == len(points)


def test_seeds_are_one_point_and_no_sweep(metrics: pd.DataFrame) -> None:
    random = metrics[metrics["pattern"] == "random"]
    again = random.assign(configuration=random["configuration"] + 1000, seed=1, recall=random["recall"] + 0.1)
    points = frontiers.points(pd.concat([metrics, again]))
    assert len(points) == metrics["configuration"].nunique()
    for row in points[points["pattern"] == "random"].itertuples():
        assert row.members == (row.configuration, row.configuration + 1000)
        own = random[random["configuration"] == row.configuration]
        assert row.recall == pytest.approx(own["recall"].mean() + 0.05)
        assert "seed" not in row.label
    assert set(points.loc[points["pattern"] != "random", "members"].map(len)) == {1}


def test_the_heat_map_of_a_point_over_seeds_is_their_mean(
    metrics: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every map under its label and density: the mean over its layers and heads is the recall of the point."""
    random = metrics[metrics["pattern"] == "random"]
    again = random.assign(configuration=random["configuration"] + 1000, seed=1, recall=random["recall"] + 0.1)
    both = pd.concat([metrics, again])
    points = frontiers.points(both)
    drawn: dict[str, pd.DataFrame] = {}
    draw = heatmaps.layer_heads
    monkeypatch.setattr(heatmaps, "layer_heads", lambda gold, recalls: drawn.update(recalls) or draw(gold, recalls))
    captions.of_score(both, points, tmp_path)
    means = {f"{row.label}\n{row.density:.1%} of pairs": row.recall for row in points.itertuples()}
    assert any(label.startswith("random") for label in drawn)
    assert {label: grid.to_numpy().mean() for label, grid in drawn.items()} == pytest.approx(
        {label: means[label] for label in drawn}
    )


@pytest.mark.parametrize("many", [False, True])
def test_the_caption_tells_colours_apart_only_where_there_is_grey(
    metrics: pd.DataFrame, tmp_path: Path, many: bool
) -> None:
    """However many bounds there are: they always have a look of their own."""
    names = [f"other{number}" for number in range(frontier_figures.FEW)] if many else []
    oracle, window = (metrics[metrics["pattern"] == name] for name in ("oracle", "window"))
    copies = [oracle.assign(pattern=name) for name in ("oracle_topk", "oracle_topp", "oracle_head")]
    copies += [window.assign(pattern=name) for name in names]
    copies = [copy.assign(configuration=copy["configuration"] + 1000 * i) for i, copy in enumerate(copies, 1)]
    table = pd.concat([metrics, *copies])
    drawn = {each.name: each for each in captions.of_score(table, frontiers.points(table), tmp_path)}
    assert ("In colour" in drawn["recall_sparsity"].caption) == many
    assert ("recall_by_family" in drawn) == many


def test_joined_runs_keep_their_configurations_apart(metrics: pd.DataFrame) -> None:
    joined = pd.concat([metrics.assign(run="a"), metrics.assign(run="b", recall=0.5)])
    points = frontiers.points(joined)
    assert len(points) == 2 * metrics["configuration"].nunique()
    assert set(points.loc[points["run"] == "b", "recall"]) == {0.5}


def test_random_distance_is_random_wherever_it_was_asked_for() -> None:
    rows = [("distance", "l2"), ("distance", "random"), ("window", None)]
    table = pd.DataFrame([{"pattern": pattern, "distance": distance} for pattern, distance in rows])
    assert list(frontiers.described(table)["pattern"]) == ["distance", "random", "window"]


def test_compared_patterns_have_similar_density(metrics: pd.DataFrame) -> None:
    chosen = frontiers.comparable(frontiers.points(metrics))
    assert chosen["pattern"].is_unique
    assert not {"oracle", "full", "random"} & set(chosen["pattern"])
    assert set(chosen["united_with"]) == {""}
    advantage = chosen["recall"] - chosen["density"]
    assert advantage.is_monotonic_decreasing


# ---- what to look at twice ----


def _sweep(*recalls: float) -> pd.DataFrame:
    rows = [
        {"configuration": place, "pattern": "dialled", "dial": place, "sparsity": 0.2 * place, "recall": recall}
        for place, recall in enumerate(recalls)
    ]
    return frontiers.points(pd.DataFrame(rows))


def test_a_curve_that_is_not_monotone_is_reported() -> None:
    assert frontiers.broken_curves(_sweep(0.9, 0.7, 0.4, 0.1)) == []
    assert frontiers.broken_curves(_sweep(0.9, 0.7, 0.705, 0.1)) == []
    (warning,) = frontiers.broken_curves(_sweep(0.9, 0.5, 0.7, 0.1))
    assert "along dial" in warning
    assert "0.200 more than the one of sparsity 0.200" in warning


def test_two_settings_are_two_curves_not_one_broken_curve() -> None:
    better, worse = _sweep(0.9, 0.8, 0.7), _sweep(0.6, 0.5, 0.4)
    worse["sparsity"] -= 0.05
    both = pd.concat([better.assign(kind="a"), worse.assign(kind="b")], ignore_index=True)
    assert frontiers.broken_curves(both) == []


@pytest.mark.parametrize(
    ("row", "warning"),
    [
        (variant("v", "masked", 3.9, sparsity=0.5), "lower loss than dense attention by 0.100 nats"),
        (variant("v", "masked", 3.995, sparsity=0.5), None),
        (
            variant("v", "masked", 4.1, sparsity=0.0),
            "computes every pair and still differs from dense attention by +0.1",
        ),
        (variant("v", "masked", 4.1, sparsity=0.0, alpha=1.0), None),
        (
            variant("v", "bucketed", 4.1, sparsity=0.5, latency_ms=40.0),
            "slower than exact dense entmax on this machine: v (0.50",
        ),
        (variant("v", "masked", 4.1, sparsity=0.5, latency_ms=40.0), None),  # by definition
        (variant("v", "lsg", 4.1), None),
    ],
)
def test_warnings_about_variants(row: dict[str, object], warning: str | None, tmp_path: Path) -> None:
    store = make_evaluated(Store(tmp_path), (*RESULTS[:2], row))
    found = text_tables.warnings(None, pd.read_parquet(store.path("evaluate") / "results.parquet"), {})
    assert [warning in line for line in found] == ([True] if warning else [])


def test_a_model_that_learned_nothing_is_reported(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "model").mkdir()
    store.note("model", validation_loss=7.0, unigram_entropy=6.5)
    store.finish("model", "finetune", {}, {}, 0)
    (warning,) = text_tables.warnings(None, None, text_tables.read_manifests(store))
    assert "unigram entropy" in warning


# ---- the summary and the figures ----


def test_summary_is_an_aligned_table_of_the_main_numbers(run: Store) -> None:
    text = report.summary(run)
    for number in ("4.250 nats", "4.2000", "0.700", "oracle *"):
        assert number in text
    block = next(part for part in text.split("\n\n") if part.startswith("In the model"))
    header, *rows = block.splitlines()[1:]
    end = header.index("loss, nats") + len("loss, nats")
    assert all(row[:end].endswith(("0000", "000")) for row in rows)


def test_every_pattern_has_a_look_of_its_own() -> None:
    names = [path.stem for path in (ROOT / "conf" / "pattern").glob("*.yaml") if path.stem != "all"]
    looks = {name: (style.colour_of(name), style.marker_of(name)) for name in names}
    assert len(set(looks.values())) == len(names), [n for n in names if [*looks.values()].count(looks[n]) > 1]


def test_colours_are_fixed_and_every_name_has_one() -> None:
    assert style.colour_of("kmeans") == "#009E73"
    assert style.colour_of("a pattern of tomorrow") == style.colour_of("a pattern of tomorrow")
    assert re.fullmatch("#[0-9A-F]{6}", style.colour_of("another"))


def test_drawing_leaves_no_trace() -> None:
    before = dict(matplotlib.rcParams)
    grid = pd.DataFrame(np.linspace(0.1, 0.9, 144).reshape(12, 12))
    heatmaps.layer_heads(grid, {"a": grid, "b": grid})
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()


def test_attention_map_counts_hits_and_pairs() -> None:
    gold = np.array([[0.5, 0.5], [0.0, 1.0]])
    graph = np.array([[True, False], [True, True]])
    titles = [axes.get_title() for axes in heatmaps.attention_maps(gold, {"p": graph}).axes]
    assert titles == ["dense entmax\n75.0% of pairs are gold", "p\nrecall 0.67 with 75.0% of pairs"]
    causal = heatmaps.attention_maps(np.tril(gold), {"p": np.tril(graph)}, causal=True).axes[1].get_title()
    assert causal == "p\nrecall 1.00 with 100.0% of pairs"


def test_a_choice_of_distance_and_bins_for_what_sharing_a_bucket_means(tmp_path: Path) -> None:
    store = make_scored(tmp_path / "run")
    default = pd.read_parquet(store.path("score") / "shared_buckets.parquet")
    chosen = score.ScoreSettings(
        tuple(Configuration("quantize", Quantize(size)) for size in (2, 4)), bucket_distance="cos", bucket_bins=7
    )
    score.run(chosen, store)
    store.finish("score", "score", plain(chosen), {}, 0)
    folder = store.path("score")
    shared, histogram = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("shared_buckets", "distance_histogram")
    )
    first = default[(default["bucket_size"] == 2)].reset_index(drop=True)
    mine = shared[shared["bucket_size"] == 2].reset_index(drop=True)
    assert mine["pairs"].tolist() == first["pairs"].tolist()
    assert mine["distance"].between(0, 2).all()
    assert not np.allclose(mine["distance"], first["distance"])
    for (place, number), bins in histogram.groupby(["configuration", "shared"]):
        alike = shared[(shared["configuration"] == place) & (shared["shared"] == number)]
        assert len(bins) == 7
        assert bins["pairs"].sum() == alike["pairs"].sum()
        middle = ((bins["low"] + bins["high"]) / 2 * bins["pairs"]).sum()  # each pair is at most half a bin away
        total = (alike["distance"] * alike["pairs"]).sum()
        assert abs(middle - total) <= bins["pairs"].sum() * (bins["high"] - bins["low"]).max() / 2 + 1e-6
    report.run(FAST, store)
    assert "distance_histogram" in _drawn(store)
    assert "distance (cos) of a projected query and key" in _page(store)


@pytest.mark.parametrize("wrong", [{"bucket_distance": "far"}, {"bucket_bins": -1}])
def test_a_distance_or_bins_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"score.{next(iter(wrong))}"):
        score.ScoreSettings((), **wrong)
