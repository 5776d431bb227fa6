"""A model without a head is measured by what it turns texts into, beside its dense self."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModel

from sparsefinder import evaluate, models
from sparsefinder.attention import Bucketed, Masked
from sparsefinder.corpora import TextFiles
from sparsefinder.errors import UserError
from sparsefinder.evaluate import EvaluateSettings
from sparsefinder.evaluation.adapt import AdaptSettings
from sparsefinder.evaluation.tasks.embedding import pooled, rank_correlation, retrieval, titled, token_cosines
from sparsefinder.evaluation.variants import AttentionChoice
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.patterns.oracle_topk import OracleTopK
from sparsefinder.patterns.window import Window
from sparsefinder.reporting import loss_figures, text_tables
from sparsefinder.storage.store import Store
from tests.tiny_models import WORDS, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    folder = tmp_path_factory.mktemp("text")
    for part, name in enumerate(("train", "validation", "test")):
        documents = [
            f"{WORDS[i]} {WORDS[i + 1]}\n" + " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12 + 3 * i + part))
            for i in range(9)
        ]
        (folder / name).write_text("\n\n".join(documents))
    return TextFiles(*(str(folder / name) for name in ("train", "validation", "test")), documents="blank_line")


def settings(corpus: TextFiles, **others: object) -> EvaluateSettings:
    window, all_pairs = Configuration("window", Window(3)), Configuration("oracle_topk", OracleTopK(1.0))
    attentions = (AttentionChoice("masked", Masked), AttentionChoice("bucketed", Bucketed))
    chosen = {"samples": 8, "batch_size": 3, "measured": 2, **others}
    return EvaluateSettings(corpus, (window, all_pairs), attentions, **chosen)  # type: ignore[arg-type]


def test_measures_against_loops() -> None:
    torch.manual_seed(0)
    states, reference = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    valid = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    texts, others = pooled(states, valid), pooled(reference, valid)
    torch.testing.assert_close(texts[1], states[1, :3].mean(0))
    expected = states[2, 1] @ reference[2, 1] / states[2, 1].norm() / reference[2, 1].norm()
    torch.testing.assert_close(token_cosines(states, reference)[2, 1], expected)

    def similarities(x: torch.Tensor) -> list[float]:
        return [float(x[i] @ x[j] / x[i].norm() / x[j].norm()) for i in range(4) for j in range(i)]

    sides = [pd.Series(similarities(x)) for x in (texts, others)]
    ranks = [side.map(sorted(side).index) for side in sides]
    difference = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert rank_correlation(texts, others) == pytest.approx(1 - 6 * difference / (6 * (6**2 - 1)))
    assert rank_correlation(texts, 3 * texts) == pytest.approx(1.0)
    assert math.isnan(rank_correlation(texts[:2], others[:2]))


def test_retrieval_counts_what_is_more_similar() -> None:
    texts = torch.eye(3)
    assert retrieval(texts, texts) == (1.0, 1.0)
    accuracy, reciprocal = retrieval(torch.tensor([[1.0, 0, 0], [1.0, 0.5, 0], [3.0, 2.0, 1.0]]), texts)
    assert accuracy == pytest.approx(1 / 3)
    assert reciprocal == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


TITLES = {
    " = A title = \nThe text.": ("A title", "The text."),
    "# Heading\n\nMore.": ("Heading", "More."),
    "One sentence. Another one.": ("One sentence.", "Another one."),
    f"{'long ' * 50}end. And more.\nA line.": (f"{'long ' * 50}end.", "And more.\nA line."),
    "Nothing below": None,
    "": None,
}


@pytest.mark.parametrize("text", TITLES)
def test_a_title_is_no_part_of_the_text(text: str) -> None:
    assert titled(text) == TITLES[text]


def test_a_model_without_a_head_gets_none(encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = models.load_encoder(encoder)
    assert not models.has_head(model)
    assert "drawn anew" not in caplog.text
    tiny_model("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert models.has_head(models.load_encoder(tmp_path)[0])


def test_it_is_measured_by_its_states(
    encoder: Path, corpus: TextFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = Store(tmp_path, given={"model": encoder})
    evaluate.run(settings(corpus), store)
    assert "no head to guess words with" in caplog.text
    assert "drawn anew" not in caplog.text
    results = pd.read_parquet(store.run_dir / "evaluate" / "results.parquet")
    rows = {(row.attention, row.pattern): row for row in results.itertuples()}
    dense, all_pairs = rows["dense", "full"], rows["masked", "oracle_topk"]
    for row in (dense, all_pairs):
        assert row.token_cosine == pytest.approx(1.0, abs=1e-5)
        assert row.pooled_cosine == pytest.approx(1.0, abs=1e-5)
        assert row.similarity_spearman == pytest.approx(1.0, abs=0.02)
    masked, bucketed = rows["masked", "window"], rows["bucketed", "window"]
    assert masked.token_cosine == pytest.approx(bucketed.token_cosine, abs=1e-5)
    assert masked.token_cosine < 0.999
    assert masked.loss == pytest.approx(1 - masked.token_cosine)
    assert masked.retrieval_accuracy <= masked.retrieval_mrr <= 1.0
    blocks = pd.read_parquet(store.run_dir / "evaluate" / "blocks.parquet")
    assert blocks["tokens"].gt(0).all()
    assert blocks["right"].le(blocks["tokens"]).all()

    lines = text_tables.variant_lines(results)
    assert {"1 − token cosine", "pooled cosine", "text found by its title"} <= {*lines}
    assert "loss, nats" not in lines
    assert loss_figures.loss_name(results) == "1 − cosine of token states"


def test_what_it_cannot_do_is_said(encoder: Path, corpus: TextFiles, tmp_path: Path) -> None:
    store = Store(tmp_path, given={"model": encoder})
    with pytest.raises(UserError, match="adapt_steps trains on a loss"):
        evaluate.run(settings(corpus, adapt=AdaptSettings(steps=1)), store)


def test_a_model_with_a_head_may_be_asked_the_same(corpus: TextFiles, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("roberta").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    store = Store(tmp_path / "run", given={"model": folder})
    evaluate.run(settings(corpus, task="embedding"), store)
    results = pd.read_parquet(store.run_dir / "evaluate" / "results.parquet")
    assert results["token_cosine"].iloc[0] == pytest.approx(1.0, abs=1e-5)
