"""Every attention at every length: the same words are asked for, and what is compared is what was run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_models import save_tiny, tiny_model
from torch import nn

from sparsefinder import compare, models, report
from sparsefinder.analysis.iso_quality import alarms, at_equal_quality
from sparsefinder.attention import Bucketed, Masked
from sparsefinder.compare import CompareSettings
from sparsefinder.corpora import Masking, NextWords, TextFiles
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError
from sparsefinder.evaluation import speed
from sparsefinder.evaluation.arms import Arm, Reading
from sparsefinder.evaluation.long_texts import long_texts
from sparsefinder.evaluation.variants import AttentionChoice
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.finetune import NewModel
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.clustered import Clustered
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.window import Window
from sparsefinder.report import ReportSettings
from sparsefinder.storage.store import Store

BUCKETED, MASKED = AttentionChoice("bucketed", Bucketed), AttentionChoice("masked", Masked)
LSG = AttentionChoice("lsg_local", LSGAttention, {"sparsity_type": "none", "block_size": 4, "num_global_tokens": 1})
ARMS = (
    Arm("window", BUCKETED, Configuration("window", Window(5))),
    Arm("oracle", MASKED, Configuration("oracle", Oracle())),
    Arm("full", MASKED, Configuration("full", Full())),
    Arm("lsg", LSG),
    Arm("chunks of 8", reading=Reading("chunks", 8)),
    Arm("truncated of 8", reading=Reading("truncated", 8)),
)
WORDS = "a model attends to the keys that its query needs and ignores most others "


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with a model of random weights whose positions are relative, and texts of a hundred words."""
    store = Store(tmp_path_factory.mktemp("run"))
    model = tiny_model("modernbert", layer_types=["full_attention"] * 2, num_hidden_layers=2)
    models.set_normalizer(model, Normalizer(1.5))
    with store.writing("model") as folder:
        save_tiny(folder, model)
    store.finish("model", "finetune", {}, {}, 0)
    return store


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CompareSettings:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "test"):
        (folder / split).write_text(f"{split} {WORDS * 60}")
    corpus = TextFiles(str(folder / "train"), str(folder / "test"), documents="file")
    return CompareSettings(corpus, ARMS, lengths=(8, 16, 32), samples=6, quadratic_up_to=16, rounds=1, step_rounds=1)


@pytest.fixture(scope="module")
def results(store: Store, settings: CompareSettings) -> pd.DataFrame:
    compare.run(settings, store)
    store.finish("compare", "compare", {}, {"model": store.content("model")}, 0)
    return pd.read_parquet(store.run_dir / "compare" / "results.parquet").set_index(["arm", "length"])


def test_the_same_words_are_asked_for_at_every_length() -> None:
    ids = torch.cat([torch.tensor([0]), torch.arange(10, 40), torch.tensor([2])])
    masking = Masking(4, 60, (0, 1, 2, 3, 4), fraction=0.5)
    (text,) = long_texts([ids], (8, 16, 32), masking, seed=1)
    asked = {}
    for length in (8, 16, 32):
        batch = text.pieces(length)
        assert batch["input_ids"].shape == (32 // length, length)
        assert (batch["input_ids"][:, 0] == 0).all()
        assert (batch["input_ids"][:, -1] == 2).all()
        asked[length] = batch["labels"].flatten()
        chosen = asked[length] != IGNORED
        assert torch.equal(asked[length][chosen], ids[chosen])
        untouched = ~chosen & (torch.arange(32) % length > 0) & (torch.arange(32) % length < length - 1)
        assert torch.equal(batch["input_ids"].flatten()[untouched], ids[untouched])
    assert torch.equal(asked[8], asked[32])
    assert (asked[8].view(-1, 8)[:, [0, -1]] == IGNORED).all()
    kept, cut = text.beginnings(16, 8)
    assert kept["input_ids"].shape == (2, 8)
    assert (kept["input_ids"][:, -1] == 2).all()
    assert int((kept["labels"] != IGNORED).sum()) + len(cut) == int((asked[8] != IGNORED).sum())


def test_the_next_words_are_asked_for_at_every_length_too() -> None:
    ids = torch.cat([torch.tensor([0]), torch.arange(10, 40), torch.tensor([2])])
    (text,) = long_texts([ids], (8, 16, 32), NextWords(), seed=1)
    for length in (8, 16, 32):
        batch = text.pieces(length)
        assert (batch["input_ids"][:, 0] == 0).all()
        labels, inside = batch["labels"].flatten(), torch.arange(32) % 8 < 7
        assert (labels[~inside] == IGNORED).all()
        assert torch.equal(labels[inside], ids.roll(-1)[inside])
        real = (torch.arange(32) % length > 0) & (torch.arange(32) % length < length - 1)
        assert torch.equal(batch["input_ids"].flatten()[real], ids[real])


def test_every_arm_is_measured_at_every_length(results: pd.DataFrame) -> None:
    names = ["dense", "softmax", "no attention", "window", "oracle", "full", "lsg", "chunks of 8", "truncated of 8"]
    assert set(results.index.get_level_values("arm")) == set(names)
    assert (results["masked_tokens"] == results["masked_tokens"].iloc[0]).all()
    assert ("oracle", 32) not in results.index  # a matrix too large
    assert ("chunks of 8", 8) not in results.index  # which is the whole text
    assert (results["latency_ms"] > 0).all()
    assert results.loc["window", "step_ms"].gt(0).all()
    for name in ("oracle", "full"):  # what must not change the answer
        for length in (8, 16):
            assert abs(results.loc[(name, length), "loss_minus_dense"]) < 1e-5
    for length in (16, 32):  # which is how they read
        assert results.loc[("chunks of 8", length), "loss"] == pytest.approx(
            results.loc[("dense", 8), "loss"], abs=1e-6
        )
    sizes = results.loc["window"]["sparsity"]
    assert sizes[8] < sizes[16] < sizes[32]
    assert (results.loc["dense", "loss_minus_dense_high"] == 0).all()
    assert (results.loc["softmax", "speed"] == 1).all()
    assert results.loc["no attention", "recall"].isna().all()


@pytest.fixture(scope="module")
def decoder(settings: CompareSettings, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with a small Llama of random weights whose heads share their keys, and a tokenizer of its own."""
    store = Store(tmp_path_factory.mktemp("decoder"), which="dec")
    new = NewModel("llama", 300, max_length=32, layers=2, key_heads=2, hidden_size=32, intermediate_size=48)
    torch.manual_seed(0)
    model, tokenizer = new.make(settings.corpus, store.scratch("corpus"))
    models.set_normalizer(model, Normalizer(1.5))
    with store.writing("model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    store.finish("model", "finetune", {}, {}, 0)
    return store


def test_a_decoder_is_asked_for_the_next_words(
    decoder: Store, settings: CompareSettings, caplog: pytest.LogCaptureFixture
) -> None:
    causal = {"causal": True}
    bucketed, masked = AttentionChoice("bucketed", Bucketed, causal), AttentionChoice("masked", Masked, causal)
    arms = (
        Arm("window", bucketed, Configuration("window", Window(5))),
        Arm("all", bucketed, Configuration("window", Window(99))),
        Arm("full", masked, Configuration("full", Full())),
        Arm("clustered", bucketed, Configuration("clustered", Clustered())),
        Arm("chunks of 8", reading=Reading("chunks", 8)),
    )
    settings = dataclasses.replace(settings, arms=arms, causal=True)
    with caplog.at_level("INFO"):
        compare.run(settings, decoder)
    assert "clustered is left out of a causal model: it reads ahead" in caplog.text
    decoder.finish("compare", "compare", {}, {"model": decoder.content("model")}, 0)
    results = pd.read_parquet(decoder.run_dir / "compare" / "results.parquet").set_index(["arm", "length"])
    texts = compare._prepared(settings, decoder).texts
    assert (results["next_tokens"] == sum(28 for _ in texts)).all()
    assert "masked_tokens" not in results
    for name in ("all", "full"):
        for length in (8, 16):
            assert abs(results.loc[(name, length), "loss_minus_dense"]) < 1e-5
    assert results.loc[("chunks of 8", 32), "loss"] == pytest.approx(results.loc[("dense", 8), "loss"], abs=1e-6)
    assert results.loc[("window", 32), "sparsity"] > 0.5
    assert results["latency_ms"].gt(0).all()
    report.run(ReportSettings(dpi=30), decoder)
    assert "Loss against time, at every length" in (decoder.run_dir / "report" / "index.html").read_text()


def test_the_attention_and_the_model_must_both_be_causal(
    store: Store, decoder: Store, settings: CompareSettings
) -> None:
    with pytest.raises(UserError, match="causal=true is not for a modernbert: give causal=false"):
        compare.run(dataclasses.replace(settings, causal=True), store)
    with pytest.raises(UserError, match="causal=false is not for a llama: give causal=true"):
        compare.run(settings, decoder)


def test_what_the_report_says(store: Store, results: pd.DataFrame) -> None:
    report.run(ReportSettings(dpi=30), store)
    page = (store.run_dir / "report" / "index.html").read_text()
    assert (store.run_dir / "report" / "loss_by_time.png").is_file()
    for words in ("Loss against time, at every length", "truncated of 8", "share of the bound", "exact rows"):
        assert words in page
    assert "Every attention at every length" in report.summary(store)


def test_losses_are_those_of_the_model_itself(store: Store, settings: CompareSettings, results: pd.DataFrame) -> None:
    """The plain reference: transformers' own loss of the same pieces."""
    made = compare._prepared(settings, store)
    total = count = 0.0
    for text in made.texts:
        batch = text.pieces(16)
        with torch.no_grad():
            logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"))
        count += int((batch["labels"] != IGNORED).sum())
    assert results.loc[("dense", 16), "loss"] == pytest.approx(total / count, abs=1e-5)


def test_what_is_cut_off_costs_what_its_frequency_says(store: Store, settings: CompareSettings) -> None:
    made = compare._prepared(settings, store)
    counts = pd.Series(
        [token for text in made.texts for token in text.labels[text.labels != IGNORED].tolist()]
    ).value_counts()
    rare, common = counts.index[-1], counts.index[0]
    assert made.frequencies[rare] >= made.frequencies[common] - 0.1
    arm = Arm("beginning", reading=Reading("truncated", 8))
    whole, cut = made.losses(arm, 8), made.losses(arm, 32)
    assert (whole["masked"] == cut["masked"]).all()
    kept, outside = made.texts[0].beginnings(32, 8)
    with torch.no_grad():
        logits = made.model(input_ids=kept["input_ids"]).logits[0]
    inside = float(nn.functional.cross_entropy(logits, kept["labels"][0], reduction="sum"))
    inside = 0.0 if inside != inside else inside
    assert cut["loss"][0] == pytest.approx(inside + float(made.frequencies[outside].sum()), rel=1e-5)


def test_a_killed_run_goes_on_and_times_are_taken_again(
    store: Store, settings: CompareSettings, results: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(compare._Run, "losses", never)
    monkeypatch.setattr(compare._Run, "graph", never)
    compare.run(dataclasses.replace(settings, rounds=1, step_rounds=0), store)
    again = pd.read_parquet(store.run_dir / "compare" / "results.parquet").set_index(["arm", "length"])
    pd.testing.assert_series_equal(again["loss"], results["loss"])
    assert again["latency_ms"].gt(0).all()
    with pytest.raises(AssertionError, match="measured again"):  # other words
        compare.run(dataclasses.replace(settings, seed=1), store)


def test_a_run_killed_between_two_arms_measures_the_others_alone(
    store: Store, settings: CompareSettings, results: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run measures what the first one did not come to, and its table is that of a run in one go."""
    mine = Store(tmp_path, {"model": store.path("model")})
    asked = dataclasses.replace(settings, rounds=0)
    measured: list[tuple[str, int]] = []
    losses = compare._Run.losses

    def until(most: int) -> Any:
        def watched(self: Any, arm: Arm, length: int) -> Any:
            if len(measured) == most:
                raise KeyboardInterrupt
            measured.append((arm.name, length))
            return losses(self, arm, length)

        return watched

    monkeypatch.setattr(compare._Run, "losses", until(10))
    with pytest.raises(KeyboardInterrupt):
        compare.run(asked, mine)
    assert not (tmp_path / "compare").exists()
    monkeypatch.setattr(compare._Run, "losses", until(-1))
    compare.run(asked, mine)
    assert len(measured) == len({*measured}) == len(results)  # each once, in one run or the other
    again = pd.read_parquet(tmp_path / "compare" / "results.parquet").set_index(["arm", "length"])
    for column in ("loss", "recall", "output_error", "computed_density"):
        pd.testing.assert_series_equal(again[column], results[column])


def test_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(speed, "_forward", lambda model, it: order.append(it.batch) or float(len(order)))
    monkeypatch.setattr(speed, "_memory", lambda model, it: None)
    contestants = {name: speed.Contestant(None, name, learns=False) for name in "abc"}  # type: ignore[arg-type]
    found = speed.race(None, contestants, rounds=3, step_rounds=2)
    assert "".join(order) == "abc" * 4
    assert found["a"]["latency_ms"] == 7000.0  # of rounds 2 to 4, at 4, 7 and 10
    assert found["b"]["step_ms"] is None


def row(arm: str, length: int, loss: float, ms: float, **more: Any) -> dict[str, Any]:
    ends = {"loss_minus_dense_low": loss - 0.002, "loss_minus_dense_high": loss + 0.002}
    return {"arm": arm, "length": length, "loss_minus_dense": loss, "latency_ms": ms, "speed": 100 / ms, **ends, **more}


def test_the_fastest_of_equal_quality() -> None:
    table = pd.DataFrame([
        row("dense", 512, 0.0, 80), row("softmax", 512, 0.3, 100), row("no attention", 512, 1.0, 20),
        row("window width=65", 512, 0.02, 25), row("window width=129", 512, 0.009, 50), row("routed", 512, 0.01, 40),
    ])  # fmt: skip
    (best,) = at_equal_quality(table).to_dict("records")
    assert (best["arm"], best["speed"], best["bound"], best["share_of_bound"]) == ("routed", 2.5, 5.0, 0.5)
    assert (best["window"], best["window_speed"]) == ("window width=129", 2.0)


def test_alarms() -> None:
    table = pd.DataFrame([
        row("dense", 512, 0.0, 80), row("softmax", 512, -0.3, 80), row("better", 512, -0.01, 1),
        row("noise", 512, -0.001, 1), row("all", 512, 0.002, 1, sparsity=0.0), row("sparse", 512, 0.01, 1, sparsity=0.5),
        row("rounded", 512, -2e-6, 1) | {"loss_minus_dense_high": -1e-6},
    ])  # fmt: skip
    found = alarms(table)
    assert len(found) == 2
    assert found[0].startswith("better at 512 tokens loses less than dense attention, by 0.0100 nats")
    assert found[1].startswith("all at 512 tokens names every pair and differs from dense attention by +0.0020")


def test_wrong_settings(settings: CompareSettings, store: Store, tmp_path: Path) -> None:
    for changes, words in (
        ({"lengths": (512, 700)}, r"compare\.lengths=\[512, 700\]: .* so 512 must divide 700"),
        ({"lengths": ()}, "give lengths of 8 tokens or more"),
        ({"samples": 0}, r"compare\.samples must be 1 or more"),
        ({"measured_queries": 0}, r"compare\.measured_queries must be 1 or more"),
        ({"rounds": -1}, r"compare\.rounds must not be negative"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(settings, **changes)
    for name in ("some", "other"):
        (tmp_path / name).write_text("\n".join([f"{name} {WORDS}"] * 9))
    short = TextFiles(str(tmp_path / "some"), str(tmp_path / "other"), documents="line")
    with pytest.raises(UserError, match="no text of the test split fills 32 tokens"):
        compare.run(dataclasses.replace(settings, corpus=short), store)
    with pytest.raises(UserError, match="reading=halves is unknown"):
        Reading("halves", 8)
    assert CompareSettings(settings.corpus).left_out
