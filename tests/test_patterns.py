"""Every pattern of conf/pattern through one conformance suite; a new file there is found by itself."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from sparsefinder.graphs import QK, Pattern
from sparsefinder.kmeans_centroids import Centroids
from sparsefinder.patterns.combine import Blocked, Projected, Union, layout_of
from sparsefinder.patterns.configuration import Configuration
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.projections import LayerProjections, Linear, Projections
from sparsefinder.store import UserError
from tests.conftest import ROOT, alone, random_qk

HEADS, SIZE, ROUNDS = 2, 8, 3
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
def learned() -> tuple[Projections, dict[int, Centroids]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [LayerProjections(Linear(HEADS, SIZE, ROUNDS), Linear(HEADS, SIZE, ROUNDS)) for _ in range(2)]
        # two runs of six clusters each, for single tokens and for chunks of three
        centroids = {b: Centroids([torch.randn(HEADS, 2, 6, ROUNDS * b) / 2 for _ in range(2)]) for b in (1, 3)}
    return Projections([layer.requires_grad_(False) for layer in layers]), centroids


def settings(path: Path) -> tuple[Any, list[Any]]:
    """The pattern of a file, and the values of its dial."""
    node = OmegaConf.load(path)
    sweep = OmegaConf.to_container(node.pop("sweep")) if "sweep" in node else []
    whole = OmegaConf.create({"alpha": 1.5, "seed": 0, "pattern": node})
    return hydra.utils.instantiate(whole.pattern), sweep


def build(pattern: Any, **around: Any) -> Pattern:
    projections, centroids = learned()
    configuration = Configuration("tested", pattern, **around)
    return configuration.build(projections, centroids[configuration.block_size])


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def pattern(request: pytest.FixtureRequest) -> Any:
    return settings(request.param)[0]


@pytest.fixture(params=AROUND, ids=str)
def whole(request: pytest.FixtureRequest, pattern: Any) -> Pattern:
    return build(pattern, **AROUND[request.param])


@pytest.mark.parametrize("causal", [False, True])
class TestConformance:
    LENGTHS = (5, 17, 11, 1)

    def test_a_graph_is_bool_on_allowed_pairs_only(self, whole: Pattern, causal: bool) -> None:
        qk = random_qk(list(self.LENGTHS), HEADS, SIZE, causal)
        graph = whole(qk, 1)
        assert graph.dtype == torch.bool
        assert graph.shape == (4, HEADS, 17, 17)
        assert not (graph & ~qk.allowed).any()

    def test_padding_is_never_seen(self, whole: Pattern, causal: bool) -> None:
        graphs = [
            whole(random_qk(list(self.LENGTHS), HEADS, SIZE, causal, padding=value), 0) for value in (0.0, -3.0, 1e6)
        ]
        assert all(torch.equal(graphs[0], graph) for graph in graphs[1:])

    def test_a_sentence_alone_in_a_batch_and_padded(self, whole: Pattern, causal: bool) -> None:
        qk = random_qk(list(self.LENGTHS), HEADS, SIZE, causal)
        together = whole(qk, 1)
        for index, length in enumerate(self.LENGTHS):
            assert torch.equal(together[index : index + 1, :, :length, :length], whole(alone(qk, index), 1))

    def test_the_order_of_a_batch_does_not_matter(self, whole: Pattern, causal: bool) -> None:
        qk = random_qk(list(self.LENGTHS), HEADS, SIZE, causal)
        order = torch.tensor([2, 0, 3, 1])
        mixed = QK(qk.q[order], qk.k[order], qk.valid[order], causal)
        assert torch.equal(whole(qk, 0)[order], whole(mixed, 0))

    def test_no_memory_of_other_batches(self, whole: Pattern, causal: bool) -> None:
        qk = random_qk(list(self.LENGTHS), HEADS, SIZE, causal)
        before = whole(qk, 0)
        whole(random_qk([3], HEADS, SIZE, causal, seed=9), 0)
        torch.manual_seed(123)
        assert torch.equal(before, whole(qk, 0))

    def test_a_layout_is_the_graph(self, pattern: Any, causal: bool) -> None:
        for around in AROUND.values():
            configuration = Configuration("tested", pattern, **around)
            tested = build(pattern, **around)
            qk = random_qk(list(self.LENGTHS), HEADS, SIZE, causal)
            if configuration.quadratic:
                with pytest.raises(UserError, match="attention=masked"):
                    layout_of(tested, qk, 0)
            else:
                assert torch.equal(layout_of(tested, qk, 0).graph(qk), tested(qk, 0))

    def test_surroundings_only_add(self, pattern: Any, causal: bool) -> None:
        qk = random_qk(list(self.LENGTHS), HEADS, SIZE, causal)
        for around in ({"window": 5}, {"global_tokens": 2}, {"last_token": True}):
            configuration = Configuration("tested", pattern, **around)
            near = configuration.near(qk)
            assert torch.equal(build(pattern, **around)(qk, 0), build(pattern)(qk, 0) | near)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_dial_is_monotone(path: Path) -> None:
    pattern, sweep = settings(path)
    qk = random_qk([40, 33], HEADS, SIZE)
    if pattern.dial is None:
        assert not sweep
        return
    assert len(sweep) >= 3, "pattern=all draws a frontier from the values of `sweep`"
    densities = [build(dataclasses.replace(pattern, **{pattern.dial: value}))(qk, 0).sum() for value in sweep]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


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
    projections, centroids = learned()
    qk = random_qk([9], HEADS, SIZE)
    projected = projections(qk, 0)
    graph = Projected(KMeans(2, centroids[1]), projections)(qk, 0)
    for head in range(HEADS):
        centres = centroids[1].layers[0][head]

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
        (lambda: Configuration("x", KMeans(1)).build(), "needs centroids: run stage=cluster"),
        (lambda: Configuration("x", Distance()).build(), "needs projections: run stage=project"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
