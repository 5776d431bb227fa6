"""Extract and evaluate inside tiny models: what is recorded, what is measured, and what adaptation changes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sparsefinder import calibrate, evaluate, extract, kmeans_centroids, models, pipeline, quantization, report
from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.calibrate import CalibrateSettings
from sparsefinder.corpora import TextFiles, token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.errors import UserError
from sparsefinder.evaluate import EvaluateSettings
from sparsefinder.evaluation.adapt import AdaptSettings, adapt
from sparsefinder.evaluation.converted import BigBird, Longformer, Nystromformer
from sparsefinder.evaluation.loss_difference import LossDifference, MaskedText
from sparsefinder.evaluation.variants import AttentionChoice, Conversion
from sparsefinder.experiment.calibration import calibrated
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.experiment.targets import Swept
from sparsefinder.extract import ExtractSettings
from sparsefinder.finetune import FinetuneSettings, NewModel
from sparsefinder.finetune import run as finetune
from sparsefinder.graphs import QK
from sparsefinder.models.transformers_internals import attention_name
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.window import Window
from sparsefinder.storage.samples import load_samples
from sparsefinder.storage.store import ARTEFACTS, Store

SENTENCE = "Every query of this small model attends to few keys, and nobody knows which before looking. "
MASKED, BUCKETED = AttentionChoice("masked", Masked), AttentionChoice("bucketed", Bucketed)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    folder = tmp_path_factory.mktemp("text")
    for name, count in (("train", 40), ("validation", 14), ("test", 12)):
        (folder / name).write_text("\n\n".join(SENTENCE * (1 + i % 4) + f"{name} {i}." for i in range(count)))
    return TextFiles(*(str(folder / name) for name in ("train", "validation", "test")))


@pytest.fixture(scope="module")
def store(corpus: TextFiles, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with a model of two layers, its queries and keys, projections and centroids."""
    store = Store(tmp_path_factory.mktemp("run"))
    tiny = NewModel(
        vocabulary_size=300,
        max_length=32,
        layers=2,
        heads=2,
        hidden_size=16,
        intermediate_size=24,
        initializer_range=0.5,
    )
    stages: dict[str, Any] = {
        "finetune": (
            finetune,
            FinetuneSettings(corpus=corpus, model=tiny, steps=4, batch_size=4, eval_blocks=4, learning_rate=1e-2),
        ),
        "extract": (extract.run, ExtractSettings(corpus, nsamples=10)),
        "project": (quantization.run, quantization.ProjectSettings(rounds=3)),
        "cluster": (kmeans_centroids.run, kmeans_centroids.ClusterSettings(n_clusters=4)),
    }
    for stage, (run, settings) in stages.items():
        run(settings, store)
        for name, artefact in ARTEFACTS.items():
            if artefact.stage == stage:
                store.finish(name, stage, {}, {}, 0)
    return store


class TestExtract:
    def test_samples_are_what_the_model_computes_for_a_block_alone(self, store: Store, corpus: TextFiles) -> None:
        model, tokenizer = models.load_masked_lm(store.path("model"))
        blocks = token_blocks(corpus, tokenizer, "train", 32)
        samples = load_samples(store.path("qk"))
        chosen = draw(len(blocks), 10, 0, "train")
        assert samples.lengths == [len(blocks[index]) for index in chosen]
        assert len(set(samples.lengths)) > 1, "ragged"
        for place, index in list(enumerate(chosen))[:3]:
            seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

            def keep(q, k, v, valid, layer, seen=seen):
                seen[layer] = (q, k)
                return Masked(Configuration("oracle", Oracle()).build())(q, k, v, valid, layer)

            with torch.no_grad(), models.plugged(model, keep):
                model.base_model(input_ids=blocks[index][None])
            for layer, (q, k) in seen.items():
                torch.testing.assert_close(samples.q[place][layer], q[0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(samples.k[place][layer], k[0], atol=1e-5, rtol=1e-5)

    def test_a_larger_draw_contains_a_smaller_one(self) -> None:
        assert set(draw(100, 10, 3, "x")) < set(draw(100, 20, 3, "x"))
        assert draw(100, 10, 3, "x") != draw(100, 10, 4, "x")

    def test_more_samples_than_text(self, store: Store, corpus: TextFiles, tmp_path: Path) -> None:
        given = Store(tmp_path, {"model": store.path("model")})
        with pytest.raises(UserError, match="nsamples=10000, but the train split of the corpus has only"):
            extract.run(ExtractSettings(corpus, nsamples=10000), given)
        assert not list(tmp_path.glob("*.pt"))

    def test_half_precision_files(self, store: Store, corpus: TextFiles, tmp_path: Path) -> None:
        given = Store(tmp_path, {"model": store.path("model")})
        extract.run(ExtractSettings(corpus, nsamples=2, dtype="float16"), given)
        assert torch.load(tmp_path / "qk_enc-attn.pt", weights_only=True)["q"][0].dtype == torch.float16
        assert load_samples(tmp_path / "qk_enc-attn.pt").layer(0, 0).q.dtype == torch.float32

    @pytest.mark.parametrize("changes", [{"nsamples": 0}, {"nsamples": -1}, {"batch_size": 0}, {"dtype": "int8"}])
    def test_wrong_settings(self, corpus: TextFiles, changes: dict[str, Any]) -> None:
        with pytest.raises(UserError):
            ExtractSettings(corpus, **changes)


CONFIGURATIONS = (
    Configuration("kmeans", KMeans(2)),
    Configuration("quantize", Quantize(4), window=3, global_tokens=1),
    Configuration("distance", Distance("l2", 0.5), window=3),
    Configuration("oracle", Oracle()),
)


@pytest.fixture(scope="module")
def tables(store: Store, corpus: TextFiles) -> tuple[pd.DataFrame, pd.DataFrame]:
    settings = EvaluateSettings(
        corpus,
        CONFIGURATIONS,
        (MASKED, BUCKETED),
        (
            Conversion("longformer", Longformer(8)),
            Conversion("bigbird", BigBird(2, 1)),
            Conversion("nystromformer", Nystromformer(8)),
        ),
        samples=8,
        measured=3,
        batch_size=4,
    )
    evaluate.run(settings, store)
    return tuple(pd.read_csv(store.run_dir / "evaluate" / f"{name}.csv") for name in ("results", "layers"))


class TestEvaluate:
    def test_one_row_for_each_variant(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        results, layers = tables
        assert list(results.variant[:2]) == ["dense full", "dense full (softmax)"]
        assert results.variant.is_unique
        assert len(results) == 2 + 4 + 2 + 3, "distance and oracle have no bucketed form"
        assert results.masked_tokens.nunique() == 1
        assert (layers.groupby("variant").size() == 2 * 2).all()

    def test_bucketed_is_masked(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        results = tables[0].set_index("variant")
        for label in (CONFIGURATIONS[0].label, CONFIGURATIONS[1].label):
            for name in ("loss", "accuracy", "sparsity", "recall", "precision", "exact", "output_error"):
                a, b = (results.loc[f"{attention} {label}", name] for attention in ("masked", "bucketed"))
                assert a == pytest.approx(b, rel=1e-4, abs=1e-6), (label, name)

    def test_the_oracle_changes_nothing(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        results = tables[0].set_index("variant")
        oracle = results.loc["masked oracle"]
        assert oracle.loss == pytest.approx(results.loc["dense full", "loss"], abs=1e-5)
        assert (oracle.recall, oracle.exact) == (1, 1)
        assert oracle.output_error < 1e-5
        assert oracle.sparsity == pytest.approx(oracle.gold_sparsity)

    def test_differences_are_to_the_dense_rows(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        results = tables[0]
        for place, name in enumerate(("entmax", "softmax")):
            expected = results.loss - results.loss[place]
            pd.testing.assert_series_equal(results[f"loss_minus_{name}"], expected, check_names=False)

    def test_dense_is_exact_entmax_and_softmax_is_that_of_transformers(
        self,
        tables: tuple[pd.DataFrame, pd.DataFrame],
        store: Store,
        corpus: TextFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        results = tables[0]
        assert results.speed_against_dense[0] == results.speed_against_softmax[1] == 1
        ratio = results.latency_ms[1] / results.latency_ms
        pd.testing.assert_series_equal(results.speed_against_softmax, ratio, check_names=False)
        timed = []

        def measured(model: Any, attention: Any, *others: Any) -> Any:
            timed.append((attention, attention_name(model.config), models.get_normalizer(model)))
            return quality_and_cost(model, attention, *others)

        quality_and_cost = evaluate.quality_and_cost
        monkeypatch.setattr(evaluate, "quality_and_cost", measured)
        settings = EvaluateSettings(corpus, (CONFIGURATIONS[3],), (MASKED,), samples=2, measured=1)
        evaluate.run(settings, Store(tmp_path, {"model": store.path("model")}))
        assert timed[0][0] == Dense(timed[0][2])
        assert timed[1] == (None, "sdpa", Normalizer(1.0))

    def test_losses_of_blocks_are_kept_and_give_an_interval(
        self, tables: tuple[pd.DataFrame, pd.DataFrame], store: Store
    ) -> None:
        results = tables[0].set_index("variant")
        blocks = pd.read_parquet(store.run_dir / "evaluate" / "blocks.parquet")
        assert (blocks.groupby("variant").size() == 8).all()
        sums = blocks.groupby("variant")[["masked", "loss", "right"]].sum()
        for name, row in sums.iterrows():
            assert row.masked == results.loc[name, "masked_tokens"]
            assert row.loss / row.masked == pytest.approx(results.loc[name, "loss"])
            assert row.right / row.masked == pytest.approx(results.loc[name, "accuracy"])
        assert (results.loss_minus_entmax_low <= results.loss_minus_entmax + 1e-9).all()
        assert (results.loss_minus_entmax <= results.loss_minus_entmax_high + 1e-9).all()
        assert results.loc["dense full", ["loss_minus_entmax_low", "loss_minus_entmax_high"]].tolist() == [0, 0]

    def test_calibrated_patterns_are_run_at_their_values(self, store: Store, corpus: TextFiles, tmp_path: Path) -> None:
        names = ("model", "qk", "qk_validation", "projections", "centroids")
        given = Store(tmp_path, {name: store.path(name) for name in names})
        kinds = (Configuration("kmeans", KMeans(1)), Configuration("window", Window(3)))
        dialled = (Swept(kinds[0], (1, 2, 3)), Swept(kinds[1], (1, 3, 9)))
        calibrate.run(CalibrateSettings(dialled, "density=0.4", samples=3), given)
        given.finish("calibration", "calibrate", {}, {}, 0)
        configurations = (*kinds, Configuration("oracle", Oracle()))
        evaluate.run(
            EvaluateSettings(corpus, configurations, (MASKED, BUCKETED), target="density=0.4", samples=4, measured=2),
            given,
        )
        results = pd.read_csv(tmp_path / "evaluate" / "results.csv").set_index("variant")
        expected = {f"masked {name}" for name in ("oracle", "kmeans at density=0.4", "window at density=0.4")}
        assert expected | {"bucketed kmeans at density=0.4"} <= set(results.index)
        masked, bucketed = (results.loc[f"{kind} kmeans at density=0.4"] for kind in ("masked", "bucketed"))
        assert masked.loss == pytest.approx(bucketed.loss, rel=1e-4)
        assert masked.target == "density=0.4"

    def test_a_loss_is_a_target(self, store: Store, corpus: TextFiles, tmp_path: Path) -> None:
        """What the stage says the model loses is what it loses with those values on that text."""
        names = ("model", "qk", "qk_validation", "projections", "centroids")
        given = Store(tmp_path, {name: store.path(name) for name in names})
        dialled = (Swept(Configuration("quantize", Quantize(4)), (1, 4, 16)),)
        text = MaskedText(blocks=6)
        for wanted in (1e-9, 1.0):
            settings = CalibrateSettings(dialled, f"loss={wanted}", samples=3, corpus=corpus, text=text)
            assert {"model", "qk"} <= {*settings.needs}
            calibrate.run(settings, given)
            given.finish("calibration", "calibrate", {}, {}, 0)
            table = pd.read_csv(tmp_path / "calibration" / "dials.csv")
            (said,) = set(table["loss_minus_dense"])
            assert table["reached"].all() == (said <= wanted)
            (made,) = calibrated([dialled[0].configuration], tmp_path / "calibration", f"loss={wanted}")
            learned = Learned.load(given, ("projections",))
            assert LossDifference.of(given, corpus, text)(made, learned) == pytest.approx(said, abs=1e-6)
        assert table["density"].mean() < 0.5, "a nat more is easily lost"
        with pytest.raises(UserError, match="a loss is measured on text"):
            CalibrateSettings(dialled, "loss=0.1")

    def test_costs_are_measured(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        results = tables[0].set_index("variant")
        assert (results.latency_ms > 0).all()
        with_pattern = results[results.attention.isin(["masked", "bucketed"])]
        assert with_pattern.predictor_share.between(0, 1).all()
        assert (results[results.attention == "masked"].computed_density >= 1).all(), "padding is multiplied too"

    def test_converted_models_have_no_graph_of_ours(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        results = tables[0].set_index("variant")
        softmax = results.loc["dense full (softmax)", "loss"]
        for name in ("longformer", "bigbird", "nystromformer"):
            row = results.loc[f"converted {name} (softmax)"]
            assert pd.isna(row.recall)
            assert row.loss == pytest.approx(softmax, abs=0.5)

    @pytest.mark.parametrize("changes", [{"samples": 0}, {"mask_probability": 1.5}, {"alpha": 3.0}, {"measured": 0}])
    def test_wrong_settings(self, corpus: TextFiles, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"evaluate|alpha"):
            EvaluateSettings(corpus, CONFIGURATIONS, (MASKED,), **changes)

    def test_conversions_read_shorter_blocks_and_are_refused_first(
        self, store: Store, corpus: TextFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        given = Store(tmp_path, {name: store.path(name) for name in ("model", "projections", "centroids")})
        converted = (Conversion("longformer", Longformer(8)), Conversion("nystromformer", Nystromformer(8)))
        settings = EvaluateSettings(corpus, CONFIGURATIONS[:1], (MASKED,), conversions=converted, length=16, samples=2)
        evaluate.run(settings, given)
        results = pd.read_csv(given.run_dir / "evaluate" / "results.csv").set_index("variant")
        assert results.index.str.contains("former").sum() == 2
        assert results["loss"].notna().all()
        caplog.clear()
        refused = replace(settings, conversions=(Conversion("nystromformer", Nystromformer(7)),))
        with caplog.at_level("INFO"), pytest.raises(UserError, match="num_landmarks=7 does not divide"):
            evaluate.run(refused, given)
        assert "loss" not in caplog.text, "before any work"

    def test_a_causal_run_leaves_it_out(self, corpus: TextFiles) -> None:
        assert not EvaluateSettings(corpus, CONFIGURATIONS, (MASKED,)).left_out
        assert "reads both ways" in EvaluateSettings(corpus, CONFIGURATIONS, (MASKED,), causal=True).left_out


class TestAdapt:
    def changed(self, before: Any, after: Any) -> set[str]:
        after_state = after.state_dict()
        return {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after_state[name])}

    @pytest.mark.parametrize("part", ["head", "all_but_projections", "all"])
    def test_only_the_chosen_part_is_trained(self, part: str, store: Store, corpus: TextFiles) -> None:
        from sparsefinder.corpora import masked_batches
        from sparsefinder.predictors.projections import load_projections

        model, tokenizer = models.load_masked_lm(store.path("model"))
        trained, projections = copy.deepcopy(model), load_projections(store.path("projections"))
        before = copy.deepcopy(projections)
        blocks = token_blocks(corpus, tokenizer, "train", 32, limit=8)
        batches = masked_batches(blocks, tokenizer, batch_size=4)
        pattern = Configuration("quantize", Quantize(4), window=3).build(Learned({"projections": projections}))
        adapt(trained, Bucketed(pattern), batches, AdaptSettings(2, part, learning_rate=1e-2), projections)
        changed = self.changed(model, trained)
        encoder = {name for name in changed if name.startswith("roberta.encoder")}
        assert changed
        assert bool(encoder) == (part != "head")
        assert bool(self.changed(before.layers[0], projections.layers[0])) == (part == "all")
        assert all(parameter.requires_grad for parameter in trained.parameters())
        assert not any(parameter.requires_grad for parameter in projections.layers[0].parameters())
        assert not trained.training

    def test_projections_go_on_learning_from_their_own_loss(self, store: Store, corpus: TextFiles) -> None:
        from sparsefinder.corpora import masked_batches
        from sparsefinder.predictors.projections import load_projections

        model, tokenizer = models.load_masked_lm(store.path("model"))
        batches = masked_batches(token_blocks(corpus, tokenizer, "train", 32, limit=4), tokenizer, batch_size=4)
        learned = []
        for own in ({}, {"loss": "row"}, {"distance": "min"}, {"block_size": 2}):
            projections = load_projections(store.path("projections"))
            attention = Bucketed(Configuration("quantize", Quantize(4)).build(Learned({"projections": projections})))
            settings = AdaptSettings(2, "all", projection_learning_rate=1e-2, **own)
            adapt(copy.deepcopy(model), attention, batches, settings, projections)
            learned.append(projections.layers[0].q.state_dict()["w"].clone())
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(learned, 2))
        with pytest.raises(UserError, match="cubic"):
            AdaptSettings(loss="cubic")

    def test_evaluate_adapts_copies(self, store: Store, corpus: TextFiles, tmp_path: Path) -> None:
        names = ("model", "projections", "centroids")
        given = Store(tmp_path, {name: store.path(name) for name in names})
        settings = EvaluateSettings(corpus, CONFIGURATIONS[:2], (BUCKETED,), samples=4, measured=1)
        evaluate.run(settings, given)
        plain = pd.read_csv(tmp_path / "evaluate" / "results.csv")
        evaluate.run(replace(settings, adapt=AdaptSettings(steps=4, learning_rate=1e-2, batch_size=4)), given)
        adapted = pd.read_csv(tmp_path / "evaluate" / "results.csv")
        assert (adapted.loss < plain.loss).all()
        evaluate.run(settings, given)
        again = pd.read_csv(tmp_path / "evaluate" / "results.csv")
        pd.testing.assert_series_equal(again.loss, plain.loss)

    def test_wrong_settings(self) -> None:
        with pytest.raises(UserError, match="head, all_but_projections, all"):
            AdaptSettings(1, "everything")


def test_computed_pairs_are_a_share_of_all_examples_together() -> None:
    """Two tokens beside ten: 200 pairs are multiplied and 104 are allowed, whatever each example's own share is."""
    observer = evaluate.Observer(Masked(Window(3)), None, Normalizer(1.5))
    x = torch.randn(2, 1, 10, 4, generator=torch.Generator().manual_seed(0))
    observer(0, QK(x, x, torch.arange(10) < torch.tensor([[10], [2]])), x, x)
    assert observer.rows()[0]["computed_density"] == pytest.approx(200 / 104)


class TestGrowing:
    """What was measured in the model stays, as what was scored does."""

    def run(self, store: Store, corpus: TextFiles, *configurations: Configuration) -> pd.DataFrame:
        settings = EvaluateSettings(corpus, configurations, (MASKED,), samples=8, measured=2, batch_size=4)
        pipeline.run_stages([pipeline.STAGES["evaluate"]], {"evaluate": settings}, store, 0)
        return pd.read_parquet(store.path("evaluate") / "results.parquet")

    def test_rows_are_added_and_named_apart(
        self, store: Store, corpus: TextFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        given = Store(tmp_path, {name: store.path(name) for name in ("model", "projections", "centroids")})
        first = self.run(given, corpus, CONFIGURATIONS[0], CONFIGURATIONS[2])
        grown = self.run(given, corpus, CONFIGURATIONS[3], replace(CONFIGURATIONS[2], pattern=Distance("cos", 0.5)))
        added = ["masked oracle", "masked distance threshold=0.5 + window 3 (2)"]
        assert list(grown.variant) == [*first.variant, *added]
        kept = grown.iloc[2:4].reset_index(drop=True)
        for column in ("loss", "recall", "latency_ms", "loss_minus_entmax_low"):
            assert list(kept[column]) == list(first[column].iloc[2:])
        assert list(grown.loss[:2]) == list(first.loss[:2])
        for name in ("layers", "blocks"):
            assert set(pd.read_parquet(tmp_path / "evaluate" / f"{name}.parquet").variant) == set(grown.variant)
        assert "evaluate: 2 measured and added to 2 in evaluate that stay" in caplog.text
        self.run(given, corpus, CONFIGURATIONS[0])
        assert "evaluate: done and unchanged, skipped" in caplog.text
        oracle = EvaluateSettings(corpus, (CONFIGURATIONS[3],), (MASKED,), samples=8, measured=2, batch_size=4)
        one = report.summary(given, None, {"evaluate": oracle})
        assert "masked oracle" in one
        assert "masked kmeans" not in one
