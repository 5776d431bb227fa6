"""Every pattern of conf/pattern through the conformance suite of the package; a new file there is found by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.graphs import QK, reads_ahead
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.combine import Blocked, Projected, Union, layout_of
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.testing import CHECKS, Check, Subject, single_sentence
from sparsefinder.testing import random_qk as ragged
from sparsefinder.testing.by_name import HEADS, SIZE, SPACES, built, learned
from tests.conftest import ROOT, random_qk

FILES = sorted(path for path in (ROOT / "conf" / "pattern").glob("*.yaml") if not OmegaConf.load(path).get("every"))
AROUND = {
    "alone": {},
    "window": {"window": 3},
    "global": {"global_tokens": 2},
    "last": {"last_token": True},
    "all": {"window": 5, "global_tokens": 1, "last_token": True},
    "blocks": {"block_size": 3},
}


@cache
def settings(path: Path) -> tuple[Any, list[Any]]:
    """The pattern of a file, and the values of its sparsity parameter."""
    node = OmegaConf.load(path)
    sweep = OmegaConf.to_container(node.pop("sweep")) if "sweep" in node else []
    whole = OmegaConf.create({"alpha": 1.5, "seed": 0, "pattern": node})
    return hydra.utils.instantiate(whole.pattern), sweep


READS_AHEAD = ("last", "all", "blocks")  # where a text ends, and the later tokens of a block, is known ahead
OF_ATTENTION = ("dense", "empty_rows", "gradients", "bucketed", "grouped", "crossing")


def random(path: Path) -> bool:
    """Whether a file's settings draw numbers: there is a seed, and they use it."""
    pattern = settings(path)[0]
    return hasattr(pattern, "seed") and path.stem not in SEED_UNUSED


# files with a seed that their own settings do not use
SEED_UNUSED = {"distance", "longformer"}

# settings of a file with which every allowed pair is an edge
DENSE: dict[str, dict[str, Any]] = {
    "full": {},
    "random": {"threshold": 1.0},
    "distance": {"threshold": 1e9},
    "quantize": {"bucket_size": 99},
    "kmeans": {"top_clusters": 6},
    "window": {"width": 99},
    "lowrank": {"level": 1e9},
    "bilinear": {"level": 1e9},
    "routed": {"level": 1e9},
    "routed_bilinear": {"level": 1e9},
    "routed_reranked": {"level": 1e9, "share": 1.0},
    "routed_budget": {"level": 1.0},
    "longformer": {"width": 99},
    "bigbird": {"block": 99},
    "openai_fixed": {"columns": 8},
    "openai_strided": {"near": 99},
    "dilated": {"width": 99, "dilation": 1},
    "block_local": {"block": 99},
    "sinks": {"width": 99},
    "lsg": {"block": 64},
    "dotproduct_entmax": {"entmax_alpha": 1.0},
    "oracle_topk": {"share": 1.0},
    "oracle_topp": {"p": 1.0},
    "oracle_head": {"share": 1.0},
} | {
    name: {"share": 1.0}
    for name in (
        "topk_norm",
        "indexer",
        "quest",
        "block_pool",
        "clustered",
        "routing",
        "routing_learned",
        "routing_nearest",
        "routing_trained",
    )
}


def subject(path: Path, around: str, **changed: Any) -> Subject:
    pattern, sweep = settings(path)
    pattern = replace(pattern, **changed)
    dense = replace(pattern, **DENSE[path.stem]) if path.stem in DENSE else None
    return Subject(
        pattern,
        lambda each: built(each, **AROUND[around]),
        sweep,
        dense,
        random(path),
        HEADS,
        SIZE,
        f"{path.stem}, {around}",
    )


@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_conformance(path: Path, check: Check) -> None:
    """Every file with every surroundings; checks of attention only with those that are all or none of them."""
    for around in AROUND:
        if around == "blocks" and not SPACES & {*settings(path)[0].needs}:
            continue  # only projections are cut into blocks
        if check.name == "future" and around in READS_AHEAD:
            continue
        if around in ("alone", "all", "blocks") or check.name not in OF_ATTENTION:
            check(subject(path, around))


# k-means has two runs here, so that each key is in two clusters
WITH_TAIL = [path for path in FILES if hasattr(settings(path)[0], "tail") and path.stem != "kmeans"]


@pytest.mark.parametrize("check", [check for check in CHECKS if check.name in (*OF_ATTENTION, "layout")], ids=str)
@pytest.mark.parametrize("path", WITH_TAIL, ids=lambda path: path.stem)
def test_conformance_with_a_tail(path: Path, check: Check) -> None:
    for around in ("alone", "all"):
        check(subject(path, around, tail=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention", [Masked, Bucketed, partial(Bucketed, executor="blocks")])
@pytest.mark.parametrize("path", WITH_TAIL, ids=lambda path: path.stem)
def test_with_a_tail_a_sentence_stays_what_it_is(path: Path, attention: Any, causal: bool) -> None:
    """By itself, in a batch, in another order, padded on the left; and the tail changes something."""
    lengths = [5, 17, 11, 1]
    pattern, sweep = settings(path)
    sparsest = {pattern.sparsity_parameter: sweep[0]}
    run = attention(subject(path, "all", tail=True, **sparsest).whole, Normalizer(1.0), causal)
    right, left = (ragged(lengths, HEADS, SIZE, causal=causal, left=side) for side in (False, True))
    together, on_the_left = (run(x.q, x.k, x.k, x.valid, 0) for x in (right, left))
    mixed = torch.tensor([2, 0, 3, 1])
    shuffled = run(right.q[mixed], right.k[mixed], right.k[mixed], right.valid[mixed], 0)
    torch.testing.assert_close(shuffled, together[mixed], rtol=1e-5, atol=1e-5)
    for index, length in enumerate(lengths):
        one = single_sentence(right, index)
        alone = run(one.q, one.k, one.k, one.valid, 0)
        for other in (together[index : index + 1, :, :length], on_the_left[index : index + 1, :, -length:]):
            torch.testing.assert_close(other, alone, rtol=1e-5, atol=1e-5)
    without = attention(subject(path, "all", tail=False, **sparsest).whole, Normalizer(1.0), causal)
    assert not torch.allclose(without(right.q, right.k, right.k, right.valid, 0), together)


@pytest.mark.parametrize("attention", [Masked, partial(Bucketed, executor="blocks"), Bucketed])
@pytest.mark.parametrize("path", WITH_TAIL, ids=lambda path: path.stem)
def test_a_tail_shows_nothing_of_the_future(path: Path, attention: Any) -> None:
    """Other queries, keys and values from a position on leave the output before it as it was, in causal attention."""
    pattern, sweep = settings(path)
    whole = subject(path, "alone", tail=True, **{pattern.sparsity_parameter: sweep[0]}).whole
    qk, other = (ragged([40, 23], HEADS, SIZE, causal=True, seed=seed) for seed in (0, 9))
    for normalizer in (Normalizer(1.0), Normalizer(1.5)):
        run = attention(whole, normalizer, True)
        output = run(qk.q, qk.k, qk.k, qk.valid, 0)
        for past in (3, 16):
            later = (torch.arange(40) >= past)[:, None]
            q, k = torch.where(later, 3 * other.q, qk.q), torch.where(later, 3 * other.k, qk.k)
            changed = run(q, k, k, qk.valid, 0)[:, :, :past]
            seen = not torch.allclose(changed, output[:, :, :past], rtol=1e-4, atol=1e-5)
            assert seen <= bool(reads_ahead(whole)), f"tokens from position {past} on are seen before"
            assert not torch.allclose(run(q, k, k, qk.valid, 0)[:, :, past:], output[:, :, past:])


def test_a_tail_of_kmeans_needs_one_cluster_for_each_key() -> None:
    qk = random_qk([9], HEADS, SIZE)
    centres = learned().get("centroids", "kmeans")
    for runs, top, slots in ((1, 2, 2), (2, 1, 2)):
        one = Centroids([layer[:, :runs] for layer in centres.layers])
        pattern = Projected(KMeans(top, one, tail=True), learned().get("projections", "kmeans"))
        with pytest.raises(UserError, match=f"a tail needs every key in one bucket, here it may be in {slots}: "):
            pattern.layout(qk, 0)
    one = Centroids([layer[:, :1] for layer in centres.layers])
    pattern = Projected(KMeans(1, one, tail=True), learned().get("projections", "kmeans"))
    masked, bucketed = (run(pattern)(qk.q, qk.k, qk.k, qk.valid, 0) for run in (Masked, Bucketed))
    torch.testing.assert_close(bucketed, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_has_values_of_its_sparsity_parameter(path: Path) -> None:
    pattern, sweep = settings(path)
    has_one = pattern.sparsity_parameter is not None
    assert (len(sweep) >= 3) == has_one, "pattern=all draws a frontier from the values of `sweep`"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_without_a_layout_it_can_only_be_a_mask(path: Path) -> None:
    pattern = settings(path)[0]
    for around in AROUND.values():
        if Configuration("tested", pattern, **around).quadratic:
            with pytest.raises(UserError, match="attention=masked"):
                layout_of(built(pattern, **around), random_qk([5], HEADS, SIZE), 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_surroundings_only_add(path: Path, causal: bool) -> None:
    pattern = settings(path)[0]
    qk = random_qk([5, 17, 11, 1], HEADS, SIZE, causal)
    for around in ({"window": 5}, {"global_tokens": 2}, {"last_token": True}):
        near = Configuration("tested", pattern, **around).near(qk)
        assert torch.equal(built(pattern, **around)(qk, 0), built(pattern)(qk, 0) | near)


def test_a_window_pair_by_pair() -> None:
    graph = Window(5)(random_qk([7]), 0)
    for i in range(7):
        for j in range(7):
            assert graph[0, 0, i, j] == (abs(i - j) <= 2)


def test_global_tokens_are_the_first_real_ones_and_the_last_real_one() -> None:
    qk = random_qk([4, 6])
    left_padded = QK(qk.q, qk.k, torch.tensor([[False, False, True, True, True, True], [True] * 6]))
    layout = GlobalTokens(1, last=True).layout(left_padded, 0)
    assert layout.is_global.tolist() == [
        [False, False, True, False, False, True],
        [True, False, False, False, False, True],
    ]


def test_kmeans_shares_any_of_the_nearest_centroids() -> None:
    artefacts = learned().artefacts
    projections, centroids = artefacts["projections"], artefacts["centroids"]
    qk = random_qk([9], HEADS, SIZE)
    projected = projections(qk, 0)
    graph = Projected(KMeans(2, centroids), projections)(qk, 0)
    for head in range(HEADS):
        centres = centroids.layers[0][head]

        def near(x: torch.Tensor, centres: torch.Tensor = centres) -> set[tuple[int, int]]:
            found = set()
            for run in range(2):
                distances = (x - centres[run]).norm(dim=-1)
                found |= {(run, int(c)) for c in distances.argsort()[:2]}
            return found

        for i in range(9):
            for j in range(9):
                shares = bool(near(projected.q[0, head, i]) & near(projected.k[0, head, j]))
                assert graph[0, head, i, j] == shares


def test_a_block_edge_is_all_its_pairs() -> None:
    qk = random_qk([7], HEADS, SIZE)
    graph = Blocked(Distance("l2", 20.0), 3)(qk, 0)
    inner = Distance("l2", 20.0)(qk.in_blocks(3), 0)
    for i in range(7):
        for j in range(7):
            assert torch.equal(graph[0, :, i, j], inner[0, :, i // 3, j // 3])


def test_a_union_of_patterns() -> None:
    qk = random_qk([6])
    assert Union((Window(1), Full()))(qk, 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(4), "odd number of tokens"),
        (lambda: Window(0), "odd number of tokens"),
        (lambda: GlobalTokens(-1), "0 or more"),
        (lambda: Distance("manhattan"), "cos, euclidean, l2"),
        (lambda: Distance("minkowski", p=0.0), "p must be positive"),
        (lambda: KMeans(0), "top_clusters must be"),
        (lambda: Configuration("x", Full(), block_size=0), "block_size must be"),
        (lambda: Configuration("x", KMeans(1)).build(), "needs projections: run stage=project"),
        (lambda: Configuration("x", Distance()).build(), "needs projections: run stage=project"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_only_the_space_that_is_learned_in_chunks_is_cut_into_them() -> None:
    pattern, qk = Routed(level=0.0), random_qk([9], HEADS, SIZE)
    graphs = [built(pattern, block_size=size)(qk, 0) for size in (1, 3)]
    assert torch.equal(*graphs)
    assert [Configuration("routed", pattern, block_size=3).columns["block_size"]] == [1]
