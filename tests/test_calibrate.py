"""A sparsity parameter for each head: the combinator that runs it, and the stage that chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_runs import TRAINING, make_learned

from sparsefinder import calibrate, score
from sparsefinder.calibrate import CalibrateSettings
from sparsefinder.errors import UserError
from sparsefinder.experiment.calibration import calibrated
from sparsefinder.experiment.configuration import Configuration, Dials, Learned
from sparsefinder.experiment.targets import Measured, Swept, Target
from sparsefinder.graphs import Pattern
from sparsefinder.metrics import Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.combine import layout_of
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.per_head import PerHead
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.pipeline import STAGES, run_stages
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import Identity, LayerProjections, Linear, Projections
from sparsefinder.storage.store import Store
from sparsefinder.testing import CHECKS, Check, Subject, random_qk

HEADS, SIZE = 2, 8


def centroids(clusters: int = 6, size: int = SIZE) -> Centroids:
    generator = torch.Generator().manual_seed(0)
    return Centroids([torch.randn(HEADS, 1, clusters, size, generator=generator) / 2 for _ in range(2)])


# a pattern, a step of its sparsity parameter by which heads differ, values by which it grows
KINDS: dict[str, tuple[Any, Any, list[Any]]] = {
    "window": (Window(3), 2, [1, 5, 9]),
    "random": (Distance("random", 0.1), 0.2, [0.0, 0.2, 0.6]),
    "quantize": (Quantize(3), 2, [1, 4, 16]),
    "kmeans": (KMeans(1, centroids()), 1, [1, 2, 4]),
    "routed": (Routed("margin", 0.2, key_centroids=centroids()), 0.5, [0.0, 0.5, 2.0]),
    "routed_budget": (Routed("budget", 0.2, key_centroids=centroids()), 0.3, [0.1, 0.3, 0.6]),
}


def apart(pattern: Any, step: Any) -> Pattern:
    """The heads of the first layer at the sparsity parameter and one step above it, those of the second the other way round."""
    value = getattr(pattern, pattern.sparsity_parameter)
    return PerHead(pattern, ((value, value + step), (value + step, value)))


def cases() -> Iterator[Any]:
    for name in KINDS:
        for check in CHECKS:
            yield pytest.param(name, check, id=f"{name}-{check}")


@pytest.mark.parametrize(("name", "check"), list(cases()))
def test_it_keeps_every_promise_of_a_pattern(name: str, check: Check) -> None:
    pattern, step, sweep = KINDS[name]
    check(Subject(pattern, lambda each: apart(each, step), sweep, random=name == "random", heads=HEADS, size=SIZE))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_every_head_is_the_pattern_at_its_own_value(name: str, layer: int) -> None:
    pattern, step, _ = KINDS[name]
    qk = random_qk([17, 9], HEADS, SIZE)
    mixed = apart(pattern, step)
    value = getattr(pattern, pattern.sparsity_parameter)
    for head in range(HEADS):
        own = value + step * ((head + layer) % 2)
        alone = replace(pattern, **{pattern.sparsity_parameter: own})
        assert torch.equal(mixed(qk, layer)[:, head], alone(qk, layer)[:, head])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["routed", "routed_budget", "kmeans"])
def test_a_value_for_each_head_is_one_question(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of all heads at once beside one layout for each head: the same slots, and the values are checked."""
    pattern, step, _ = KINDS[name]
    qk = random_qk([33, 20], HEADS, SIZE, causal)
    value = getattr(pattern, pattern.sparsity_parameter)
    monkeypatch.setattr(
        type(pattern), "layout", lambda *_: pytest.fail("asked head by head")
    ) if name != "kmeans" else None
    together = layout_of(apart(pattern, step), qk, 1).buckets
    monkeypatch.undo()
    for head, own in enumerate((value + step, value)):
        alone = replace(pattern, **{pattern.sparsity_parameter: own}).layout(qk, 1).buckets
        assert together.count == alone.count
        assert torch.equal(together.k_ids[:, head, :, :1], alone.k_ids[:, head, :, :1])
        taken = together.q_ids[:, head].sort(-1, descending=True).values
        expected = alone.q_ids[:, head].sort(-1, descending=True).values
        assert torch.equal(taken[..., : expected.shape[-1]], expected)
        assert (taken[..., expected.shape[-1] :] == -1).all()
    with pytest.raises(UserError, match=r"share of the keys|1 or more"):
        apart(replace(pattern, rule="budget") if name != "kmeans" else pattern, -9).layout(qk, 1)


def test_a_window_that_differs_has_no_layout_and_one_that_does_not_has() -> None:
    qk = random_qk([6], HEADS, SIZE)
    with pytest.raises(UserError, match="attention=masked"):
        layout_of(PerHead(Window(3), ((3, 5),)), qk, 0)
    with pytest.raises(UserError, match="attention=masked"):
        layout_of(PerHead(GlobalTokens(1), ((1, 2),)), qk, 0)
    assert layout_of(PerHead(Window(3), ((5, 5),)), qk, 0).window == 5


def test_values_of_another_model_are_refused() -> None:
    qk = random_qk([6], HEADS, SIZE)
    for values in (((3, 3),), ((3, 3, 3), (3, 3, 3))):
        with pytest.raises(UserError, match="run stage=calibrate"):
            PerHead(Window(3), values)(qk, 1)
    with pytest.raises(UserError, match="no sparsity parameter"):
        PerHead(Oracle(), ((1, 1),))


def test_a_configuration_knows_whether_it_can_be_bucketed() -> None:
    space = Projections([LayerProjections(Linear(HEADS, SIZE, SIZE), Linear(HEADS, SIZE, SIZE)) for _ in range(2)])
    learned = Learned({"projections": space, "centroids": centroids()})
    dials = Dials("density=0.1", ((1, 3), (3, 1)))
    for pattern, expected in ((Window(3), False), (Quantize(2), True), (KMeans(1), True), (Distance("l2"), False)):
        configuration = Configuration("tested", pattern, window=3, dials=dials)
        assert configuration.bucketed(learned, SIZE) == expected
        assert configuration.columns[pattern.sparsity_parameter] is None
        assert configuration.columns["target"] == "density=0.1"
    assert Configuration("tested", Window(3)).bucketed(learned, SIZE)


def test_a_value_for_each_head_may_be_written_down() -> None:
    qk = random_qk([9, 6], HEADS, SIZE)
    dials = Dials.given(Distance("l2"), [[0.5, 9.0], [3, 1.0]])
    space = Projections([LayerProjections(Identity(), Identity()) for _ in range(2)])
    configuration = Configuration("tested", Distance("l2"), dials=dials).fitted(2, 2)
    graph = configuration.build(Learned({"projections": space}))(qk, 0)
    for head, threshold in enumerate((0.5, 9.0)):
        assert torch.equal(graph[:, head], Distance("l2", threshold)(qk, 0)[:, head])
    assert configuration.label == "tested at given dials"
    with pytest.raises(UserError, match="values for 2 layers of 2 heads, the model has 3 layers of 2: give a list"):
        configuration.fitted(3, 2)
    same = Configuration("tested", Distance("l2"), dials=Dials.given(Distance("l2"), [0.5, 9.0]))
    assert same.fitted(3, 2).dials == Dials("given dials", ((0.5, 9.0),) * 3)
    with pytest.raises(UserError, match="values for 2 heads, the model has 3 layers of 4"):
        same.fitted(3, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "or over layers of equally long ones"),
        ([1, [2]], "or over layers of equally long ones"),
        ([[1, 2], [1]], "or over layers of equally long ones"),
        ([[1, "x"]], "pattern.top_clusters must be int, got 'x'"),
        ([[1, None]], "pattern.top_clusters must be int, got None"),
        ([[1, 0]], "top_clusters must be 1 or more, got 0"),
    ],
)
def test_values_that_cannot_be_given(values: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Dials.given(KMeans(1), values)


DIALLED = (
    Swept(Configuration("distance", Distance("l2", 1.0)), (0.1, 1.0, 10.0)),
    Swept(Configuration("distance", Distance("l2", 1.0), window=3), (0.1, 1.0, 10.0)),
    Swept(Configuration("random", Distance("random", 0.2)), (0.05, 0.5)),
    Swept(Configuration("window", Window(3)), (1, 15)),
    Swept(Configuration("kmeans", KMeans(1)), (1, 2)),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_learned(tmp_path_factory.mktemp("runs") / "calibrated")


def calibrated_run(store: Store, target: str, **more: Any) -> pd.DataFrame:
    settings = CalibrateSettings(DIALLED, target, **{"samples": 6, **more})
    run_stages([STAGES["calibrate"]], {"calibrate": settings}, store, seed=0)
    return pd.read_csv(store.path("calibration") / "dials.csv")


class TestStage:
    def test_what_cannot_be_calibrated_is_refused(self, store: Store) -> None:
        settings = CalibrateSettings((), "density=0.2", samples=6)
        with pytest.raises(
            UserError, match="sets the sparsity parameter of patterns, and none of those chosen has one"
        ):
            run_stages([STAGES["calibrate"]], {"calibrate": settings}, store, seed=0)
        even = replace(DIALLED[0], configuration=Configuration("window", Window(3)), values=(2, 4))
        settings = CalibrateSettings((even,), "density=0.2", samples=6)
        with pytest.raises(UserError, match=r"none of its values \(2, 4\) can be had; give another sweep"):
            run_stages([STAGES["calibrate"]], {"calibrate": settings}, store, seed=0)

    def test_a_density_is_met_in_every_head(self, store: Store) -> None:
        table = calibrated_run(store, "density=0.2")
        assert len(table) == len(DIALLED) * 2 * 2
        continuous = table[table["pattern"].isin(["distance", "random"]) & (table["window"] == 0)]
        assert (continuous["density"] - 0.2).abs().max() < 0.02
        assert continuous["reached"].all()
        assert continuous["value"].nunique() > 4, "heads differ"
        assert (continuous["density_held_out"] - 0.2).abs().max() < 0.08
        assert (table.loc[table["pattern"] == "window", "value"] % 2 == 1).all(), "windows are odd"

    def test_what_the_table_says_is_what_the_configuration_does(self, store: Store) -> None:
        """A plain second measurement of the calibration samples, one by one."""
        table = calibrated_run(store, "density=0.2")
        learned = Learned.load(store, ("centroids", "projections"))
        configurations = [each.configuration for each in DIALLED]
        for configuration in calibrated(configurations, store.path("calibration"), "density=0.2"):
            own = table[(table["pattern"] == configuration.name) & (table["window"] == (configuration.window or 0))]
            pattern = configuration.build(learned)
            for layer in range(2):
                counts = []
                for index in range(len(TRAINING) - 6, len(TRAINING)):
                    qk = TRAINING.layer(index, layer)
                    probabilities = Normalizer(1.5)(qk.scores())
                    counts.append(count(pattern(qk, layer), Gold.of_matrix(probabilities), qk).macro())
                rows = own[own["layer"] == layer].sort_values("head")
                for name, sign in (("recall", 1), ("sparsity", -1)):
                    expected = torch.stack([each[name] for each in counts]).mean(0)
                    expected = expected if sign > 0 else 1 - expected
                    found = rows["recall" if sign > 0 else "density"].to_numpy()
                    torch.testing.assert_close(torch.from_numpy(found.copy()), expected, atol=1e-6, rtol=0)

    def test_a_recall_is_met_where_it_can_be(self, store: Store) -> None:
        table = calibrated_run(store, "recall=0.9")
        assert (table.loc[table["reached"], "recall"] >= 0.9).all()
        assert table.loc[table["pattern"] == "distance", "reached"].all()
        assert (table.loc[~table["reached"], "recall"] < 0.9).all()

    def test_what_cannot_be_reached_is_said(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("WARNING"):
            table = calibrated_run(store, "density=0.01")
        kmeans = table[table["pattern"] == "kmeans"]
        assert not kmeans["reached"].any()
        assert (kmeans["value"] == 1).all(), "the nearest"
        assert "kmeans at density=0.01 is not reached in 4 of 4 heads" in caplog.text

    def test_a_total_density_goes_where_it_keeps_most(self, store: Store) -> None:
        total, each = (calibrated_run(store, f"{name}=0.2") for name in ("density_total", "density"))
        for name, window in (("distance", 0), ("random", 0)):
            mine, equal = (t[(t["pattern"] == name) & (t["window"] == window)] for t in (total, each))
            assert abs(mine["density"].mean() - 0.2) < 0.02
            assert mine["reached"].all()
            assert mine["kept_mass"].mean() > equal["kept_mass"].mean() - 0.005
        distance = total[(total["pattern"] == "distance") & (total["window"] == 0)]
        assert distance["density"].std() > 0.01, "heads differ"

    def test_a_loss_takes_the_smallest_density_that_has_it(self) -> None:
        """Heads whose kept mass is the root of their density; the model loses what they do not keep."""
        configuration = Configuration("distance", Distance("l2", 1.0))
        values = torch.linspace(0.05, 1, 200).tolist()
        curves = {(layer, head): {v: Measured(v**2, v, v) for v in values} for layer in range(2) for head in range(2)}
        asked = []

        def loss(made: Configuration) -> float:
            assert made.dials is not None
            asked.append(made)
            return 1 - float(torch.tensor(made.dials.values).mean())

        for wanted, density in ((0.5, 0.25), (0.1, 0.81)):
            settings = CalibrateSettings((), f"density_total={wanted}", tolerance=0.01)
            made = calibrate.choice(configuration, curves, Target("loss", wanted), settings, loss)
            assert made.loss is not None
            assert made.loss <= wanted
            assert made.configuration.dials is not None
            found = torch.tensor(made.configuration.dials.values).square().mean()
            assert density * 0.99 < found < density * 1.03
        assert len(asked) < 40
        made = calibrate.choice(configuration, curves, Target("loss", 1e-9), settings, lambda _: 0.5)
        assert made.configuration.dials == Dials("density_total=0.1", ((1.0, 1.0), (1.0, 1.0))), "as much as there is"

    def test_without_a_target_it_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO"):
            run_stages([STAGES["calibrate"]], {"calibrate": CalibrateSettings(DIALLED)}, Store(tmp_path), seed=0)
        assert "calibrate: left out, there is no target" in caplog.text
        assert not (tmp_path / "calibration").exists()

    def test_score_has_each_pattern_once_more(self, store: Store) -> None:
        calibrated_run(store, "density=0.2")
        configurations = (
            Configuration("oracle", Oracle()),
            *(Configuration("distance", Distance("l2", threshold)) for threshold in (0.5, 2.0)),
            Configuration("distance", Distance("l2", 1.0), window=3),
        )
        score.run(score.ScoreSettings(configurations, "density=0.2"), store)
        table = pd.read_parquet(store.run_dir / "score" / "metrics.parquet")
        assert table["configuration"].nunique() == len(configurations) + 2
        mine = table[table["target"] == "density=0.2"]
        assert set(mine["window"].fillna(0)) == {0, 3}
        assert mine["threshold"].isna().all()
        alone = mine[mine["window"].isna()]
        dials = pd.read_csv(store.path("calibration") / "dials.csv")
        expected = dials[(dials["pattern"] == "distance") & (dials["window"] == 0)]
        assert alone["recall"].to_numpy() == pytest.approx(expected["recall_held_out"].to_numpy())

    def test_a_calibration_for_something_else_is_refused(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        calibrated_run(store, "density=0.2")
        folder = store.path("calibration")
        with pytest.raises(UserError, match=r"was made for target=density=0\.2, not recall"):
            calibrated([], folder, "recall=0.9")
        with pytest.raises(UserError, match="holds no dials"):
            calibrated([], folder.parent, "density=0.2")
        other = Configuration("distance", Distance("cos", 1.0))
        with caplog.at_level("WARNING"):
            assert calibrated([other], folder, "density=0.2") == ()
        assert "distance has no calibration with these settings" in caplog.text

    @pytest.mark.parametrize(
        "changes", [{"samples": 0}, {"refinements": -1}, {"target": "x=1"}, {"samples_validation": 0}]
    )
    def test_wrong_settings(self, changes: dict[str, Any]) -> None:
        with pytest.raises(UserError):
            CalibrateSettings(DIALLED, **changes)
