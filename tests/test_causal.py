"""A causal language model through the stages: what it is asked, what is recorded, and what evaluating it says."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from sparsefinder import models
from sparsefinder.corpora import NextWords, next_word_batches
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError
from sparsefinder.evaluation import asking, tasks
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.finetune import NewModel
from sparsefinder.graphs import reads_ahead
from sparsefinder.models.masked_lm import gold_sparsity, validation_loss
from sparsefinder.models.objectives import objective_of
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.clustered import Clustered
from sparsefinder.patterns.combine import Blocked, Causal, Projected, ShareInGroup, Union
from sparsefinder.patterns.per_head import PerHead
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import Identity, LayerProjections, Projections
from sparsefinder.storage.samples import Samples, load_samples
from sparsefinder.storage.store import Store
from tests.models.test_decoders import tiny
from tests.nursery import Nursery
from tests.small_runs import text_files


def test_every_position_is_asked_for_the_token_after_it() -> None:
    inputs, labels = NextWords()(torch.tensor([5, 6, 7]), 0, 0)
    assert inputs.tolist() == [5, 6, 7]
    assert labels.tolist() == [6, 7, IGNORED]
    batch, one = next_word_batches([torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([4])], 0, 2)
    assert batch["labels"].tolist() == [[6, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert one["labels"].tolist() == [[IGNORED]]
    with pytest.raises(UserError, match="no next word"):
        next_word_batches([torch.tensor([4])], 0)


@torch.no_grad()
def test_the_loss_is_transformers_own() -> None:
    model = tiny("llama")
    assert isinstance(objective_of(model, None), NextWords)
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    own = model(input_ids=ids, labels=ids).loss
    batches = next_word_batches([ids[0]], 0)
    assert math.isclose(validation_loss(model, batches), own, rel_tol=1e-5)
    judge = tasks.NextWords()
    sums, kept = judge.judge(model(input_ids=ids), batches[0])
    assert sums[0, 0] == 11
    assert math.isclose(sums[0, 1] / 11, own, rel_tol=1e-5)
    late = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, 6:11], ids[0, 7:])  # of 11 the last 5
    scores = judge.scores(pd.DataFrame({"tokens": [11], "loss": [11 * float(own)], "right": [2]}), kept)
    assert math.isclose(scores["loss_second_half"], late, rel_tol=1e-5)
    assert math.isclose(scores["perplexity"], math.exp(own), rel_tol=1e-5)
    assert tuple(scores) == judge.measures


@torch.no_grad()
def test_gold_sparsity_counts_allowed_pairs() -> None:
    model = tiny("llama")
    models.set_normalizer(model, Normalizer(1.5))
    batches = next_word_batches([torch.arange(3, 20), torch.arange(3, 9)], 0)
    sparsity = gold_sparsity(model, batches)
    assert 0.0 <= sparsity < 0.9
    models.set_normalizer(model, Normalizer(1.01))
    assert gold_sparsity(model, batches) < sparsity + 1e-9


def test_shared_keys_and_two_texts_on_disk(tmp_path: Path) -> None:
    q, k = [torch.randn(2, 4, n, 8) for n in (5, 7)], [torch.randn(2, 2, n, 8) for n in (5, 7)]
    Samples(q, k).save(tmp_path / "dec.pt")
    loaded = load_samples(tmp_path / "dec.pt")
    assert (loaded.group, loaded.shape, loaded.crosses) == (2, (2, 4, 8), False)
    qk = loaded.layer(1, 0, causal=True)
    assert qk.causal
    assert torch.equal(qk.k[0], k[1][0].repeat_interleave(2, dim=0))
    of_targets = [torch.randn(2, 2, n, 8) for n in (3, 7)]
    Samples(of_targets, k, between_texts=True).save(tmp_path / "cross.pt")
    content = torch.load(tmp_path / "cross.pt", weights_only=True)
    assert (content["length_src"].tolist(), content["length_tgt"].tolist()) == ([5, 7], [3, 7])
    loaded = load_samples(tmp_path / "cross.pt")
    assert loaded.part(1, 2).crosses, "also where both lengths are one"
    qk = loaded.layer(0, 1, causal=True)
    assert qk.crosses
    assert not qk.causal
    assert tuple(qk.graph_shape) == (1, 2, 3, 5)
    content.pop("length_tgt")
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="queries of another text need length_tgt"):
        load_samples(tmp_path / "wrong.pt")
    torch.save({**content, "length_tgt": [3, 6]}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="length_tgt disagrees"):
        load_samples(tmp_path / "wrong.pt")


def test_what_is_recorded_is_in_the_name(tmp_path: Path) -> None:
    with Store(tmp_path, which="dec").writing("qk") as path:
        path.write_text("x")
    assert (tmp_path / "qk_dec-attn.pt").is_file()
    with pytest.raises(UserError, match="which=left is no attention; choose one of enc, dec, cross"):
        Store(tmp_path, which="left")


@pytest.mark.parametrize(("task", "causal", "family"), [("masked_lm", True, "llama"), ("causal_lm", True, "bert")])
def test_a_task_of_another_kind_of_model_is_refused(task: str, causal: bool, family: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type=family))
    with pytest.raises(UserError, match=f"is not for which=.* of a {family}: give"):
        asking.check_kind(SimpleNamespace(task=task, causal=causal, which="dec" if family == "llama" else "enc"), model)


def test_patterns_that_read_ahead_say_what() -> None:
    assert not reads_ahead(Configuration("window", Window(3)).build())
    assert reads_ahead(Configuration("window", Window(3), last_token=True).build()) == "which token is the last"
    clustered = Clustered()
    nothing = Projections([LayerProjections(Identity(), Identity())])
    wrapped = (
        *(Union((Window(3), clustered)), Causal(clustered), Projected(clustered, nothing), Blocked(clustered, 1)),
        *(ShareInGroup(clustered, 2), PerHead(clustered, ((0.1,),)), Projected(Union((clustered, clustered)), nothing)),
    )
    assert {reads_ahead(each) for each in wrapped} == {clustered.reads_ahead}
    assert reads_ahead(Blocked(Window(3), 2)) == "the later tokens of its own chunk"
    assert not reads_ahead(Projected(Union((Window(3), GlobalTokens(1))), nothing))
    one = Centroids([torch.randn(2, 1, 4, 8)])
    tree = Centroids([torch.randn(2, 1, 8, 8)], coarser=(one,))
    for centroids, ahead in ((one, False), (tree, True)):
        learned = Learned({"lowrank": nothing, "key_centroids": centroids})
        assert bool(reads_ahead(Configuration("routed", Routed()).build(learned))) == ahead


def test_a_new_decoder_is_checked() -> None:
    with pytest.raises(UserError, match="heads of a gpt2 do not share keys"):
        NewModel("gpt2", key_heads=2)
    with pytest.raises(UserError, match=r"model.heads=4 is not a multiple of model.key_heads=3"):
        NewModel("llama", key_heads=3)


def test_the_experiment_in_short(runs: Nursery, tmp_path: Path) -> None:
    text = text_files(tmp_path)
    small = ("model.vocabulary_size=300", "length=64", "model.layers=1", "finetune.batch_size=2")
    short = ("finetune.length=32", "finetune.steps=3", "finetune.longer_steps=1", "finetune.longer_length=64")
    few = (
        "finetune.eval_blocks=2",
        "nsamples=2",
        "extract.nsamples_validation=1",
        "evaluate.samples=2",
        "route.n_clusters=8",
    )
    stages = "stage=[finetune,extract,route,score,evaluate]"
    patterns = "patterns=[window,quest,routed,clustered]"
    done = runs.run("experiment=decoder", *text, *small, *short, *few, stages, patterns, f"run_dir={tmp_path / 'run'}")
    assert done.status == 0, done.output
    assert "clustered share=0.1 is left out of a causal model: it reads ahead" in done.output
    recorded = load_samples(tmp_path / "run" / "qk_dec-attn.pt")
    assert (recorded.shape, recorded.group) == ((1, 4, 32), 2)
    results = pd.read_csv(tmp_path / "run" / "evaluate" / "results.csv").set_index("variant")
    assert (results.loc["dense full", "loss_minus_entmax"], len(results)) == (0.0, 6)
    assert {"perplexity", "perplexity_second_half", "loss_second_half_minus_entmax"} <= {*results.columns}
    metrics = pd.read_csv(tmp_path / "run" / "score" / "metrics.csv")
    assert metrics["causal"].all()
    assert {*metrics["head"]} == {0, 1, 2, 3}


# ---- one prediction for heads that share their keys ----


def grouped(count: int = 6, layers: int = 1) -> Samples:
    """Queries of four heads near keys of two."""
    generator = torch.Generator().manual_seed(0)
    k = [2 * torch.randn(layers, 2, 24 + index, 8, generator=generator) for index in range(count)]
    noise = (torch.randn(layers, 4, each.shape[2], 8, generator=generator) for each in k)
    return Samples([each.repeat_interleave(2, dim=1) + more for each, more in zip(k, noise, strict=True)], k)


def test_queries_of_a_group_are_one() -> None:
    samples = grouped()
    shared = samples.in_groups
    assert (shared.shape, shared.group, shared.lengths) == ((1, 2, 8), 1, samples.lengths)
    expected = torch.stack([samples.q[2][0][:2].mean(0), samples.q[2][0][2:].mean(0)])
    torch.testing.assert_close(shared.layer(2, 0).q[0], expected)
    with pytest.raises(UserError, match=r"share_in_group=true is for heads that share their keys.*leave it out"):
        _ = shared.in_groups


def test_one_prediction_for_heads_that_share_their_keys(runs: Nursery, tmp_path: Path) -> None:
    grouped().save(tmp_path / "qk.pt")
    few = (
        "route.n_clusters=8",
        "n_clusters=4",
        "project.epochs=1",
        "bilinear.steps=2",
        "bilinear.indexer_steps=2",
        "bilinear.n_clusters=8",
    )
    given = (f"qk={tmp_path / 'qk.pt'}", "which=dec", "causal=true", f"run_dir={tmp_path / 'run'}", *few)
    stages = "stage=[project,cluster,cluster_online,route,bilinear,score]"
    patterns = "patterns=[oracle,lowrank,routed,kmeans,distance,bilinear,routing_trained]"
    done = runs.run(*given, stages, patterns, "share_in_group=true", "score.map_tokens=8")
    assert done.status == 0, done.output
    for name in ("projections", "lowrank"):
        sides = torch.load(tmp_path / "run" / f"{name}.pickle", weights_only=True)
        assert sides[0]["q"]["w"].shape[0] == 2, "one for each head of keys"
    metrics = pd.read_csv(tmp_path / "run" / "score" / "metrics.csv")
    assert {*metrics["head"]} == {0, 1, 2, 3}
    assert (metrics.loc[metrics["pattern"] == "oracle", "recall"] == 1.0).all(), "what is not learned is not shared"
    learned = metrics[metrics["share_in_group"].notna() & metrics["window"].isna()]
    assert {*learned["pattern"]} == {"lowrank", "routed", "kmeans", "distance", "bilinear", "routing_trained"}
    same = learned.pivot_table("sparsity", ["configuration"], "head")
    assert (same[0] == same[1]).all()
    assert (same[2] == same[3]).all()
    assert (same[0] != same[2]).any()
    refused = runs.run(
        *given, "stage=calibrate", "pattern=routed", "share_in_group=true", "target=density=0.1"
    ).refused()
    assert "share_in_group=true gives several of them one prediction: leave out one of the two" in refused
