"""An encoder-decoder through the stages: what it is asked, what is recorded of its attentions, and what is learned of them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_models import tiny_tokenizer
from torch import Tensor

from sparsefinder import extract, models, score
from sparsefinder.attention import Masked
from sparsefinder.corpora import TokenBlocks
from sparsefinder.errors import UserError
from sparsefinder.evaluation import asking
from sparsefinder.evaluation.loss_difference import masked_loss
from sparsefinder.experiment.configuration import Configuration, Learned, between_texts
from sparsefinder.extract import ExtractSettings, Reading
from sparsefinder.finetune import NewModel
from sparsefinder.models.masked_lm import gold_sparsity, loss_without_source, validation_loss
from sparsefinder.models.objectives import asked_batches
from sparsefinder.models.observed_attention import Recorder, Watched
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.block_pool import BlockPool
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.window import Window
from sparsefinder.predictors.all_layers import stacked_sample
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.contrastive import Contrast, contrastive_loss
from sparsefinder.predictors.fit_centroids import Clustering, fit_centroids
from sparsefinder.predictors.gold_pairs import gold_pairs
from sparsefinder.predictors.projections import Identity, LayerProjections, Projections
from sparsefinder.storage.samples import Samples, join, load_samples
from sparsefinder.storage.store import Store
from tests.models.test_decoders import tiny
from tests.nursery import Nursery
from tests.small_runs import text_files

TOKENIZER = tiny_tokenizer()
CORPUS: Any = None  # nobody reads it


def blocks(*lengths: int) -> TokenBlocks:
    ids = [torch.cat([torch.tensor([0]), torch.arange(5, 3 + length), torch.tensor([2])]) for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return TokenBlocks(torch.cat(ids).int(), starts)


@pytest.mark.parametrize("family", ["bart", "t5"])
@torch.no_grad()
def test_the_loss_is_that_of_the_whole_text_given_the_words_before(family: str) -> None:
    model = tiny(family, decoder_start_token_id=2)
    batches = asked_batches(model, blocks(17, 9, 12), TOKENIZER, batch_size=2)
    sums = [model(**batch).loss * (batch["labels"] >= 0).sum() for batch in batches]
    expected = float(sum(sums)) / (17 + 9 + 12)
    assert math.isclose(validation_loss(model, batches), expected, rel_tol=1e-5)
    assert math.isclose(masked_loss(model, Masked(Full(), Normalizer(1.0)), batches, "cross"), expected, rel_tol=1e-5)


@torch.no_grad()
def test_gold_sparsity_is_that_of_every_attention() -> None:
    for family in ("bart", "t5"):
        model = tiny(family, decoder_start_token_id=2)
        models.set_normalizer(model, Normalizer(2.0))
        batches = asked_batches(model, blocks(17, 9), TOKENIZER)
        assert 0.0 < gold_sparsity(model, batches) < 1.0


@pytest.mark.parametrize("which", ["enc", "dec", "cross"])
def test_what_is_recorded(tmp_path: Path, which: str) -> None:
    model, some = tiny("bart", decoder_start_token_id=2), blocks(17, 9, 12)
    settings = ExtractSettings(CORPUS, nsamples=3, batch_size=2)
    reading = Reading(model, TOKENIZER, which)
    extract.record(reading, some, [0, 1, 2], settings, tmp_path)
    join(tmp_path, tmp_path / "qk")
    content = torch.load(tmp_path / "qk", weights_only=True)
    written = [17, 9, 12]
    read = [int(reading.batch(some, [index], 0)["attention_mask"].sum()) for index in range(3)]
    assert read != written
    assert content["length_src"].tolist() == (written if which == "dec" else read)
    assert ("length_tgt" in content) == (which == "cross")
    samples = load_samples(tmp_path / "qk")
    assert samples.shape == (2 if which == "enc" else 3, 4, 8)
    assert samples.query_lengths == (read if which == "enc" else written)
    alone = reading.batch(some, [1], 0)
    recorder = Recorder()
    with (
        models.plugged(model, Watched(Masked(Full(), Normalizer(1.0), which == "dec"), recorder), which),
        torch.no_grad(),
    ):
        model(**alone)
    torch.testing.assert_close(samples.layer(1, 1).q, recorder.layers[1].q, rtol=0, atol=1e-5)
    torch.testing.assert_close(samples.layer(1, 1).k, recorder.layers[1].k, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padded_words_of_the_written_text_are_no_queries() -> None:
    model, recorder = tiny("bart", decoder_start_token_id=2), Recorder()
    [batch] = asked_batches(model, blocks(17, 9), TOKENIZER)
    with models.plugged(model, Watched(Masked(Full()), recorder), "cross"):
        model(**batch)
        assert torch.equal(recorder.layers[0].queries_valid, batch["decoder_attention_mask"])
        batch.pop("decoder_attention_mask")
        model(**batch)
        assert recorder.layers[0].queries_valid.all(), "what is not said to be padding is none"


# ---- learning from two texts ----


def two_texts() -> Samples:
    generator = torch.Generator().manual_seed(0)
    sides = [[2 * torch.randn(2, 2, tokens, 8, generator=generator) for tokens in each] for each in ((9, 14), (12, 5))]
    return Samples(*sides, between_texts=True)


def test_pairs_of_two_texts() -> None:
    samples = two_texts()
    for index, (queries, keys) in enumerate(((9, 12), (14, 5))):
        whole = stacked_sample(samples, index, causal=True)
        assert tuple(whole.graph_shape) == (1, 4, queries, keys)
        pairs, graph = gold_pairs(whole, 1.5), Normalizer(1.5)(whole.scores())[0] > 0
        expected = graph.reshape(-1, keys).nonzero()
        assert torch.equal(torch.stack([pairs.rows, pairs.columns], 1), expected)
        assert torch.equal(pairs.zeros, keys - graph.reshape(-1, keys).sum(-1))
        kept, negatives = pairs.draw_negatives(torch.Generator().manual_seed(0))
        assert not graph.reshape(-1, keys)[pairs.rows[kept], negatives].any()
        chunks = gold_pairs(whole, 1.5, block_size=2)
        padded = torch.nn.functional.pad(graph, (0, keys % 2, 0, queries % 2))
        of_chunks = padded.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).any(4).any(2)
        assert torch.equal(torch.stack([chunks.rows, chunks.columns], 1), of_chunks.flatten(0, 1).nonzero())
    with pytest.raises(UserError, match="one projection for both sides compares positions"):
        gold_pairs(whole, 1.5, symmetric=True)


def test_the_contrastive_loss_of_two_texts() -> None:
    whole = stacked_sample(two_texts(), 0, causal=False)
    pairs = gold_pairs(whole, 1.5)
    loss = contrastive_loss(whole, pairs, Contrast(), torch.Generator().manual_seed(3))
    kept, negatives = pairs.draw_negatives(torch.Generator().manual_seed(3))
    hinges: list[list[Tensor]] = [[] for _ in range(4)]
    for pair, negative in zip(kept.tolist(), negatives.tolist(), strict=True):
        head, query = divmod(int(pairs.rows[pair]), 9)
        near, far = (
            (whole.q[0, head, query] - whole.k[0, head, key]).square().sum() for key in (pairs.columns[pair], negative)
        )
        hinges[head].append((1 + near - far).relu())
    torch.testing.assert_close(loss, torch.stack([torch.stack(each).mean() for each in hinges]).mean())


def test_the_closed_form_of_two_texts_with_a_full_rank_is_exact() -> None:
    samples = two_texts()
    lowrank = fit_lowrank(samples, 8)
    qk = samples.layer(0, 1)
    projected = lowrank(qk, 1)
    torch.testing.assert_close(projected.scores(), qk.scores(), rtol=1e-3, atol=1e-3)


def test_points_of_two_texts_are_all_clustered() -> None:
    nothing = Projections([LayerProjections(Identity(), Identity())] * 2)
    centroids = fit_centroids(two_texts(), nothing, Clustering(n_clusters=40, jobs=1))  # as many as there are points
    points = torch.cat([side for one in two_texts() for side in (one[0].q[0], one[0].k[0])], dim=1)
    assert torch.cdist(points, centroids.layers[0][:, 0]).amin(-1).max() < 1e-2
    fewer = Clustering(n_clusters=4, max_points=20, jobs=1)
    assert fit_centroids(two_texts(), nothing, fewer).layers[0].shape == (2, 1, 4, 8)


def test_patterns_of_one_text_are_left_out() -> None:
    window, pooled = Configuration("window", Window(3)), Configuration("block_pool", BlockPool())
    near = Configuration("block_pool", BlockPool(), window=3)
    assert between_texts((window, pooled, near), Learned(), 2, 8) == (pooled,)
    with pytest.raises(UserError, match="compares positions within one text"):
        between_texts((window,), Learned(), 2, 8)


# ---- settings ----


@pytest.mark.parametrize(
    ("which", "task", "causal", "message"),
    [
        ("cross", "masked_lm", False, "give evaluate.task=seq2seq_lm causal=false"),
        ("dec", "seq2seq_lm", False, "give evaluate.task=seq2seq_lm causal=true"),
        ("enc", "seq2seq_lm", True, "give evaluate.task=seq2seq_lm causal=false"),
    ],
)
def test_another_task_is_refused(which: str, task: str, causal: bool, message: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="bart"))
    with pytest.raises(UserError, match=f"is not for which={which} of a bart: {message}"):
        asking.check_kind(SimpleNamespace(task=task, causal=causal, which=which), model)


@pytest.mark.parametrize("family", models.ENCODER_DECODERS)
def test_a_new_model_of_every_family(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    settings: dict[str, Any] = {"max_length": 24, "layers": 2, "heads": 4, "hidden_size": 32, "intermediate_size": 48}
    monkeypatch.setattr("sparsefinder.finetune.train_tokenizer", lambda *_: TOKENIZER)
    corpus: Any = SimpleNamespace(documents=lambda *_: iter(()))
    model, _ = NewModel(family, **settings).make(corpus, Path())
    shape = models.describe(model, "cross")
    assert (shape.layers, shape.heads, shape.head_size) == (2, 4, 8)
    assert shape.max_length == 24 or family == "t5"
    assert (model.config.decoder_start_token_id, model.config.vocab_size) == (2, len(TOKENIZER))
    [batch] = asked_batches(model, blocks(15, 9), TOKENIZER)
    assert model(**batch).loss.isfinite()


@torch.no_grad()
def test_without_a_look_at_the_source_it_does_not_matter() -> None:
    model = tiny("bart")
    [batch] = asked_batches(model, blocks(15, 9), TOKENIZER)
    blind = loss_without_source(model, [batch])
    other = {**batch, "input_ids": batch["input_ids"].flip(-1)}
    assert validation_loss(model, [other]) != validation_loss(model, [batch])
    assert loss_without_source(model, [other]) == blind
    for layer in model.model.decoder.layers:
        layer.encoder_attn.v_proj.weight.zero_()
        layer.encoder_attn.v_proj.bias.zero_()
    assert math.isclose(validation_loss(model, [batch]), blind, rel_tol=1e-6)


def test_the_experiment_in_short(runs: Nursery, tmp_path: Path) -> None:
    text = text_files(tmp_path)
    small = ("model.vocabulary_size=300", "model.max_length=64", "model.layers=1", "finetune.batch_size=2")
    short = ("finetune.length=32", "finetune.steps=3", "finetune.longer_steps=1", "finetune.longer_length=64")
    few = (*short, "finetune.eval_blocks=2", "nsamples=2", "extract.nsamples_validation=1")
    less = (
        "evaluate.samples=2",
        "route.n_clusters=8",
        "project.epochs=1",
        "patterns=[window,block_pool,routed,distance]",
    )
    stages = "stage=[finetune,extract,project,route,score,evaluate]"
    run = tmp_path / "run"
    done = runs.run("experiment=seq2seq", *text, *small, *few, *less, stages, f"run_dir={run}")
    assert done.status == 0, done.output
    assert re.search(r"window width=\d+ and \d+ more are left out: Window compares positions", done.output)
    assert done.output.count("Window compares positions within one text") < 10  # once a pattern, not once a value
    assert re.search(r"without a look at the text that it repairs it loses \d\.\d+: -?\d\.\d+ nats more", done.output)
    recorded = load_samples(run / "qk_cross-attn.pt")
    assert (recorded.shape, recorded.crosses, len(recorded)) == ((1, 4, 32), True, 2)
    results = pd.read_csv(run / "evaluate" / "results.csv").set_index("variant")
    assert results.loc["dense full", "loss_minus_entmax"] == 0.0
    assert results["target_tokens"].min() > 20
    assert "bucketed routed level=0.2" in results.index
    refused = runs.run("stage=evaluate", *text, "which=cross", f"run_dir={run}", "pattern=block_pool").refused()
    assert "evaluate.task=masked_lm with causal=false is not for which=cross of a bart: give" in refused


def test_files_of_a_translation_model_are_scored(tmp_path: Path) -> None:
    """As fairseq's models leave them: lengths as floats, queries divided by √D, sentences of uneven length."""
    generator = torch.Generator().manual_seed(0)
    read, written = (9, 17, 12), (14, 5, 20)
    lengths = {"dec": (written, written), "cross": (written, read)}
    for which, sides in lengths.items():
        q, k = ([2 * torch.randn(2, 2, tokens, 16, generator=generator) for tokens in side] for side in sides)
        content = {"q": [each / 4 for each in q], "k": k, "length_src": torch.tensor(sides[1]).float()}
        content |= {"length_tgt": torch.tensor(written).float()} if which == "cross" else {}
        torch.save(content, tmp_path / f"{which}.pt")
        run = Store(tmp_path / which, {"qk": tmp_path / f"{which}.pt"}, query_scale="sqrt_d", which=which)
        oracle, pooled = Configuration("oracle", Oracle()), Configuration("block_pool", BlockPool(0.3))
        score.run(score.ScoreSettings((oracle, pooled), causal=which == "dec"), run)
        metrics = pd.read_csv(tmp_path / which / "score" / "metrics.csv").groupby("pattern").mean(numeric_only=True)
        assert metrics.loc["oracle", "recall"] == 1.0
        assert 0.0 < metrics.loc["block_pool", "recall"] < 1.0
        allowed = [q[2] @ k[2].mT / 4]  # the last one is held out
        if which == "dec":
            allowed[0] = allowed[0].masked_fill(~torch.ones(20, 20).tril().bool(), -math.inf)
        gold = (Normalizer(1.5)(allowed[0]) > 0).sum()
        pairs = 2 * 2 * (20 * 21 / 2 if which == "dec" else 20 * 12)
        assert math.isclose(metrics.loc["oracle", "gold_sparsity"], 1 - gold / pairs, rel_tol=1e-6)
