"""Intervals, error budgets and families: against figures that can be worked out by hand, and against slow loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import make_scored

from sparsefinder import score
from sparsefinder.analysis import bootstrap, comparisons, frontiers
from sparsefinder.analysis.bootstrap import Replicas
from sparsefinder.analysis.method_families import BOUNDS, DEPENDENT, FIXED, OURS, PUBLISHED, family_of
from sparsefinder.errors import UserError
from sparsefinder.evaluation.other_seeds import other_seeds
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.window import Window
from sparsefinder.reporting import frontier_figures, text_tables
from sparsefinder.storage.samples import load_samples
from sparsefinder.storage.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_scored(tmp_path_factory.mktemp("runs") / "scored")


@pytest.fixture(scope="module")
def points(store: Store) -> pd.DataFrame:
    return frontiers.points(pd.read_parquet(store.path("score") / "metrics.parquet"))


@pytest.fixture(scope="module")
def counts(points: pd.DataFrame) -> pd.DataFrame:
    """Counts of six documents that differ, whose mean over documents is that of the points' own count."""
    generator = np.random.default_rng(0)
    rows = []
    for configuration in points["configuration"]:
        for sample in range(6):
            for head in range(4):
                gold, far = generator.integers(20, 40), generator.integers(0, 3)
                hits, far_hits = generator.integers(0, gold), generator.integers(0, far + 1)
                row = {"configuration": configuration, "layer": head // 2, "head": head % 2, "sample": sample}
                row |= {"allowed": 400, "predicted": generator.integers(40, 90), "gold": gold, "hits": hits}
                rows.append(row | {"far_gold": far, "far_hits": far_hits})
    return pd.DataFrame(rows)


class TestReplicas:
    def test_they_are_macro_means_of_the_drawn_documents(self, points: pd.DataFrame, counts: pd.DataFrame) -> None:
        """A slow loop: draw documents by name, average over them, then over heads, where defined."""
        found = Replicas.of(points, counts, replicas=7, seed=3)
        drawn = bootstrap.draws(6, 7, seed=3)
        columns = {
            "density": ("predicted", "allowed"),
            "recall": ("hits", "gold"),
            "recall_far": ("far_hits", "far_gold"),
        }
        for place, configuration in list(enumerate(points["configuration"]))[:3]:
            own = counts[counts["configuration"] == configuration].set_index(["sample", "layer", "head"])
            for replica in range(7):
                names = np.repeat(np.arange(6), drawn[replica].astype(int))
                for measure, (above, below) in columns.items():
                    heads = []
                    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        each = [own.loc[(name, layer, head)] for name in names]
                        ratios = [row[above] / row[below] for row in each if row[below]]
                        heads.append(np.mean(ratios) if ratios else np.nan)
                    assert getattr(found, measure)[replica, place] == pytest.approx(np.nanmean(heads)), measure

    def test_replicas_lie_around_the_points(self, store: Store, points: pd.DataFrame) -> None:
        found = Replicas.of(points, pd.read_parquet(store.path("score") / "counts.parquet"))
        for measure in ("density", "recall"):
            values = getattr(found, measure)
            assert values.mean(0) == pytest.approx(points[measure].to_numpy(), abs=0.02)
            assert (values.min(0) <= points[measure] + 1e-6).all()
            assert (values.max(0) >= points[measure] - 1e-6).all()

    def test_several_seeds_widen_the_interval(self, points: pd.DataFrame, counts: pd.DataFrame) -> None:
        """Two seeds that differ everywhere: the interval spans both, where one seed spans its documents alone."""
        one = points.iloc[[0]].reset_index(drop=True)
        two = one.assign(members=[(0, 1)])
        flat = counts[counts["configuration"] == 0].assign(hits=10, gold=20)
        both = pd.concat([flat, flat.assign(configuration=1, hits=18)])
        alone = Replicas.of(one.assign(members=[(0,)]), both).recall
        together = Replicas.of(two, both).recall
        assert np.ptp(alone) == pytest.approx(0)
        assert set(together[:, 0].round(6)) == {0.5, 0.7, 0.9}

    def test_seeds_and_documents_are_drawn_apart(self) -> None:
        """As many seeds as documents, each right for one document: the mean is 1/6, and 1.8 times that if drawn alike."""
        rows = [
            {"configuration": own, "sample": sample, "layer": 0, "head": 0, "allowed": 9, "predicted": 3}
            | {"gold": 1, "hits": int(own == sample), "far_gold": 1, "far_hits": int(own == sample)}
            for own in range(6)
            for sample in range(6)
        ]
        found = Replicas.of(pd.DataFrame({"members": [list(range(6))]}), pd.DataFrame(rows))
        assert found.recall.mean() == pytest.approx(1 / 6, rel=0.1)
        assert found.recall_far.mean() == pytest.approx(1 / 6, rel=0.1)

    def test_a_few_documents_have_no_interval(self, points: pd.DataFrame, counts: pd.DataFrame) -> None:
        assert Replicas.of(points, counts[counts["sample"] < 4]) is None
        assert np.isnan(bootstrap.ratio_difference(*np.ones((3, 4)))).all()

    def test_the_same_seed_gives_the_same_interval(self, points: pd.DataFrame, counts: pd.DataFrame) -> None:
        first, second = (Replicas.of(points, counts, replicas=50) for _ in range(2))
        assert np.array_equal(first.recall, second.recall)


def test_an_interval_holds_95_percent() -> None:
    low, high = bootstrap.interval(np.linspace(0, 1, 1001)[:, None])
    assert (low[0], high[0]) == pytest.approx((0.025, 0.975))
    some = np.full((100, 2), np.nan)
    some[:95, 0], some[:50, 1] = 1.0, 1.0
    low, high = bootstrap.interval(some)
    assert np.isnan(low).tolist() == [False, True], "half of the replicas say nothing"


@pytest.mark.parametrize("away", [0.0, 0.3])
def test_paired_differences_lose_what_documents_have_in_common(away: float) -> None:
    """Documents are of very different difficulty, but the same for both: the interval is that of the difference alone."""
    generator = np.random.default_rng(0)
    weights = generator.integers(5, 20, 60).astype(float)
    difficulty = generator.normal(4, 2, 60) * weights
    noise = generator.normal(0, 0.05, 60) * weights
    low, high = bootstrap.ratio_difference(difficulty + noise + away * weights, difficulty, weights)
    assert low < away < high
    assert high - low < 0.06


def _sweep(name: str, recalls: list[float], around: int = 0) -> list[dict[str, object]]:
    rows = []
    for level, recall in zip((0.05, 0.1, 0.2, 0.4), recalls, strict=True):
        rows.append({"pattern": name, "sparsity": 1 - level, "recall": recall, "recall_far": recall, "window": around})
    return rows


@pytest.fixture
def many() -> pd.DataFrame:
    rows = [
        *_sweep("oracle_topk", [0.5, 0.8, 0.95, 1.0]),
        *_sweep("lowrank", [0.45, 0.7, 0.9, 1.0]),
        *_sweep("routed", [0.4, 0.65, 0.85, 0.95]),
        *_sweep("routed", [0.3, 0.7, 0.9, 0.97], around=5),
        *_sweep("routed_budget", [0.4, 0.6, 0.8, 0.9]),
        *_sweep("distance", [0.3, 0.5, 0.7, 0.8]),
        *_sweep("kmeans", [0.2, 0.45, 0.72, 0.85]),
        *(
            row
            for name in ("longformer", "bigbird", "quest", "reformer", "sinks")
            for row in _sweep(name, [0.1, 0.2, 0.4, 0.5])
        ),
        *_sweep("random", [0.05, 0.1, 0.2, 0.4]),
    ]
    quadratic = {"oracle_topk", "lowrank", "distance", "random"}
    table = pd.DataFrame(rows).assign(layer=0, head=0)
    table["configuration"] = range(len(table))
    table["quadratic"] = table["pattern"].isin(quadratic)
    return frontiers.points(table)


class TestComparisons:
    def test_an_error_budget_is_made_of_differences(self, many: pd.DataFrame) -> None:
        budget = comparisons.error_budget(many, levels=[0.1, 0.2]).set_index(["method", "step", "density"])["change"]
        assert budget["routed", "true scores → rank R", 0.1] == pytest.approx(-0.1)
        assert budget["routed", "keys → clusters of keys", 0.1] == pytest.approx(-0.05)
        assert budget["routed", "margin → budget for every query", 0.2] == pytest.approx(-0.05)
        assert budget["routed", "window and global tokens", 0.1] == pytest.approx(0.05)
        assert budget["distance", "true scores → distance of learned projections", 0.1] == pytest.approx(-0.3)
        assert budget["kmeans", "distance → clusters of queries and keys", 0.2] == pytest.approx(0.02)
        assert "quantize" not in budget.index.get_level_values("method"), "it was not scored"

    def test_ours_against_published(self, many: pd.DataFrame) -> None:
        found = comparisons.ours_minus_rival(many, None, [0.1, 0.2])
        assert list(found["ours"]) == ["routed + window 5"] * 2, "lowrank compares every pair"
        assert list(found["rival"]) == ["distance", "kmeans"]
        assert list(found["change"]) == pytest.approx([0.2, 0.18])
        assert comparisons.ours_minus_rival(many[many["pattern"] == "kmeans"], None, [0.1]).empty

    def test_the_interval_of_a_difference_is_paired(self, points: pd.DataFrame, store: Store) -> None:
        replicas = Replicas.of(points, pd.read_parquet(store.path("score") / "counts.parquet"))
        budget = comparisons.error_budget(points, replicas, [0.3, 0.5]).dropna()
        assert len(budget)
        assert (budget["change_low"] <= budget["change"] + 1e-9).all()
        assert (budget["change"] <= budget["change_high"] + 1e-9).all()
        written = pd.read_csv(store.path("score") / "error_budget.csv")
        assert list(written.columns) == list(comparisons.COLUMNS)


class TestManyPatterns:
    def test_families(self) -> None:
        of = {
            "routed_budget": OURS,
            "refined": OURS,
            "kmeans": PUBLISHED,
            "longformer": FIXED,
            "routing": DEPENDENT,
            "oracle_head": BOUNDS,
        }
        assert {name: family_of(name) for name in of} == of

    def test_highlighted_are_the_published_and_the_best_of_each_kind(self, many: pd.DataFrame) -> None:
        chosen = frontier_figures.highlighted(many)
        assert {"distance", "kmeans", "routed", "lowrank"} < chosen
        assert len(chosen) == 5, "and the best of the others"
        few = many[many["pattern"].isin(["distance", "sinks", "random"])]
        assert frontier_figures.highlighted(few) == {"distance", "sinks"}

    def test_every_point_is_drawn(self, many: pd.DataFrame) -> None:
        axes = frontier_figures.recall_sparsity(many).axes[0]
        drawn = {tuple(np.round(xy, 6)) for line in axes.lines for xy in line.get_xydata() if line.get_marker() != ""}
        alone = many[many["united_with"] == ""]
        assert {tuple(pair) for pair in alone[["density", "recall"]].round(6).to_numpy()} <= drawn

    def test_the_bounds_are_drawn_even_where_they_were_not_run(self, many: pd.DataFrame) -> None:
        """The gold graph as a star at its density, chance as the line on which recall is the density."""
        few = many[many["pattern"] == "kmeans"].assign(gold_sparsity=0.93)
        axes = frontier_figures.recall_sparsity(few).axes[0]
        (star,) = [line for line in axes.lines if line.get_marker() == "*"]
        assert star.get_xydata().tolist() == pytest.approx(np.array([[0.07, 1.0]]))
        assert any(np.allclose(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata()) > 2)

    def test_a_panel_for_each_family(self, many: pd.DataFrame) -> None:
        titles = [axes.get_title() for axes in frontier_figures.recall_by_family(many).axes]
        assert titles == [OURS, PUBLISHED, FIXED, DEPENDENT]


class TestSeeds:
    def test_only_what_draws_numbers_is_repeated(self, store: Store, tmp_path: Path) -> None:
        configurations = (
            Configuration("oracle", Oracle()),
            Configuration("window", Window(3)),
            Configuration("distance", Distance("l2", 1.0, seed=5)),
            *(Configuration("random", Distance("random", share, seed=5)) for share in (0.0, 0.2, 0.5)),
        )
        learned = Learned.load(store, ("projections",))
        held_out = load_samples(store.path("qk_validation"))
        settings = score.ScoreSettings(configurations, seeds=3)
        added = other_seeds(configurations, held_out, learned, settings.seeds, settings.causal)
        assert [(c.name, c.pattern.threshold, c.pattern.seed) for c in added] == [
            ("random", 0.2, 6),
            ("random", 0.2, 7),
            ("random", 0.5, 6),
            ("random", 0.5, 7),
        ]
        assert other_seeds(configurations, held_out, learned, 1, False) == ()
        given = Store(tmp_path, {name: store.path(name) for name in ("qk_validation", "projections")})
        score.run(settings, given)
        points = frontiers.points(pd.read_parquet(tmp_path / "score" / "metrics.parquet"))
        assert list(points.loc[points["pattern"] == "random", "members"].map(len)) == [1, 3, 3]
        lines = text_tables.recall_lines(points, [0.2], None)
        assert (lines["configurations"] == "3").sum() == 1, "seeds are not configurations"

    def test_wrong_settings(self) -> None:
        with pytest.raises(UserError, match="seeds"):
            score.ScoreSettings((), seeds=0)
