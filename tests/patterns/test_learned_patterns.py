"""Patterns that look at queries and keys, each against a plain version of itself: loops over sentences, heads and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.counter_rng import normal, uniform
from sparsefinder.patterns.block_pool import BlockPool
from sparsefinder.patterns.clustered import Clustered
from sparsefinder.patterns.dotproduct_entmax import DotProductEntmax
from sparsefinder.patterns.magicpig import MagicPIG
from sparsefinder.patterns.quest import Quest
from sparsefinder.patterns.reformer import Reformer
from sparsefinder.patterns.routing import LearnedRouting, Routing
from sparsefinder.patterns.routing_nearest import NearestRouting
from sparsefinder.patterns.routing_trained import TrainedRouting
from sparsefinder.patterns.support.kmeans_per_sentence import lloyd
from sparsefinder.patterns.support.ranking import as_ids, first_share, share_of
from sparsefinder.patterns.topk_norm import TopKNorm
from sparsefinder.predictors.centroids import Centroids
from tests.conftest import random_qk

HEADS, SIZE, LAYER = 2, 8, 1
Joined = Callable[[int, int], bool]


def centroids() -> Centroids:
    generator = torch.Generator().manual_seed(3)
    return Centroids([torch.randn(HEADS, 2, 3, SIZE, generator=generator) for _ in range(2)])


def sentences(causal: bool, lengths: Iterable[int] = (13, 6)) -> QK:
    qk = random_qk(list(lengths), HEADS, SIZE, causal, padding=math.nan)
    return qk.with_vectors(qk.q.double(), qk.k.double())


# ---- the plain versions: (pattern, q (n, D), k (n, D), head, causal) → whether query i and key j are joined ----


def at(share: float, n: int) -> int:
    return math.ceil(round(share * n, 6))


def best(values: list[float], share: float) -> list[int]:
    """Places of the largest values, the first of equals."""
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[: at(share, len(values))]


def kept(values: list[float], share: float, causal: bool) -> set[int]:
    """Places of the largest values, or, causal, of those that are among the largest so far."""
    if causal:
        return {j for j in range(len(values)) if j in best(values[: j + 1], share)}
    return set(best(values, share))


@cache
def number(seed: int, *axes: int) -> float:
    return normal(seed, LAYER, *map(torch.tensor, axes)).item()


def plain_reformer(pattern: Reformer, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    def bucket(x: Tensor, r: int) -> int:
        columns = range(pattern.n_buckets // 2)
        sides = [sum(x[d].item() * number(pattern.seed, r, head, d, c) for d in range(SIZE)) for c in columns]
        both = sides + [-side for side in sides]
        return both.index(max(both))

    q_buckets, k_buckets = ([[bucket(row, r) for r in range(pattern.n_rounds)] for row in x] for x in (q, k))
    return lambda i, j: any(a == b for a, b in zip(q_buckets[i], k_buckets[j], strict=True))


def plain_topk_norm(pattern: TopKNorm, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    keys = kept([sum(v * v for v in row.tolist()) ** 0.5 for row in k], pattern.share, causal)
    return lambda i, j: j in keys


def blocks_seen(size: int, x: Tensor, i: int, causal: bool) -> list[Tensor]:
    """Blocks of what query i sees of a sentence."""
    return list((x[: i + 1] if causal else x).split(size))


def plain_quest(pattern: Quest, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    def joined(i: int, j: int) -> bool:
        bounds = []
        for block in blocks_seen(pattern.size, k, i, causal):
            low, high = block.min(0).values, block.max(0).values
            bounds.append(sum(max(q[i, d] * low[d], q[i, d] * high[d]).item() for d in range(SIZE)))
            assert bounds[-1] >= (block @ q[i]).max() - 1e-9
        return j // pattern.size in best(bounds, pattern.share)

    return joined


def plain_block_pool(pattern: BlockPool, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    def joined(i: int, j: int) -> bool:
        query = q[i]
        if pattern.pool_queries:
            query = blocks_seen(pattern.size, q, i, causal)[i // pattern.size].mean(0)
        scores = [float(query @ block.mean(0)) for block in blocks_seen(pattern.size, k, i, causal)]
        return j // pattern.size in best(scores, pattern.share)

    return joined


def plain_lloyd(points: Tensor, centres: list[Tensor], iterations: int, spherical: bool = False) -> list[Tensor]:
    for _ in range(iterations):
        near = [nearest(point, centres) for point in points]
        for c in range(len(centres)):
            members = [point for point, its in zip(points, near, strict=True) if its == c]
            if members:
                mean = torch.stack(members).mean(0)
                centres[c] = mean / mean.norm() if spherical else mean
    return centres


def nearest(point: Tensor, centres: list[Tensor]) -> int:
    distances = [float((point - centre).square().sum()) for centre in centres]
    return distances.index(min(distances))


def plain_clustered(pattern: Clustered, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    points = q
    if pattern.bits:
        bits = range(pattern.bits)
        planes = torch.tensor([[number(pattern.seed, head, d, b) for b in bits] for d in range(SIZE)]).double()
        points = torch.where(q @ planes > 0, 1.0, -1.0).double()
    drawn = [uniform(pattern.seed, LAYER, torch.tensor(head), torch.tensor(i)).item() for i in range(len(q))]
    order = sorted(range(len(q)), key=lambda i: drawn[i])
    first = [points[order[c % len(q)]] for c in range(pattern.n_clusters)]
    centres = plain_lloyd(points, first, pattern.iterations)
    cluster = [nearest(point, centres) for point in points]
    keys = {}
    for c in set(cluster):
        mean = torch.stack([q[i] for i in range(len(q)) if cluster[i] == c]).mean(0)
        keys[c] = kept((k @ mean).tolist(), pattern.share, causal)
    return lambda i, j: j in keys[cluster[i]]


def balanced(q: Tensor, k: Tensor, centres: list[Tensor], share: float, causal: bool) -> Joined:
    """Tokens nearest to each centre, all scaled to unit length."""

    def taken(x: Tensor, centre: Tensor) -> set[int]:
        return kept([-float((row / row.norm() - centre / centre.norm()).norm()) for row in x], share, causal)

    members = [(taken(q, centre), taken(k, centre)) for centre in centres]
    return lambda i, j: any(i in queries and j in keys for queries, keys in members)


def plain_routing(pattern: Routing, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    q, k = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() for x in (q, k))
    clusters = range(pattern.n_clusters)
    drawn = [torch.tensor([number(pattern.seed, head, c, d) for d in range(SIZE)]).double() for c in clusters]
    first = [centre / centre.norm() for centre in drawn]
    centres = plain_lloyd(torch.cat([q, k]), first, pattern.iterations, spherical=True)
    return balanced(q, k, centres, pattern.share, causal)


def plain_routing_learned(pattern: LearnedRouting, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    assert pattern.centroids is not None
    return balanced(q, k, list(pattern.centroids.layers[LAYER][head].flatten(0, 1).double()), pattern.share, causal)


def plain_routing_trained(pattern: TrainedRouting, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    assert pattern.online_centroids is not None
    centres = pattern.online_centroids.layers[LAYER][head].flatten(0, 1).double()
    return balanced(q, k, list(centres), pattern.share, causal)


def plain_routing_nearest(pattern: NearestRouting, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    assert pattern.centroids is not None

    def taken(x: Tensor, centre: Tensor) -> set[int]:
        return kept([-float((row - centre).norm()) for row in x], pattern.share, causal)

    centres = pattern.centroids.layers[LAYER][head].flatten(0, 1).double()
    members = [(taken(q, centre), taken(k, centre)) for centre in centres]
    return lambda i, j: any(i in queries and j in keys for queries, keys in members)


def plain_dotproduct_entmax(pattern: DotProductEntmax, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    sharp = pattern.entmax_alpha - 1

    def support(i: int) -> set[int]:
        x = [sharp * float(q[i] @ k[j]) / math.sqrt(SIZE) for j in range(i + 1 if causal else len(k))]
        low, high = max(x) - 1, max(x)
        for _ in range(80):  # the threshold at which probabilities sum to one
            middle = (low + high) / 2
            enough = sum(max(each - middle, 0.0) ** (1 / sharp) for each in x) >= 1
            low, high = (middle, high) if enough else (low, middle)
        return {j for j, each in enumerate(x) if each > low}

    found = [support(i) for i in range(len(q))]
    return lambda i, j: j in found[i]


def plain_magicpig(pattern: MagicPIG, q: Tensor, k: Tensor, head: int, causal: bool) -> Joined:
    k = torch.stack([k[j] - (k[: j + 1] if causal else k).mean(0) for j in range(len(k))])

    def code(x: Tensor, t: int) -> list[bool]:
        bits = range(pattern.bits)
        return [sum(x[d].item() * number(pattern.seed, t, head, d, b) for d in range(SIZE)) > 0 for b in bits]

    tables = range(pattern.n_tables)
    q_codes, k_codes = ([[code(row, t) for t in tables] for row in x] for x in (q, k))
    return lambda i, j: sum(a == b for a, b in zip(q_codes[i], k_codes[j], strict=True)) >= pattern.collisions


CASES: list[tuple[Any, Callable[..., Joined]]] = [
    (Reformer(2, 6), plain_reformer),
    (Reformer(3, 2, seed=5), plain_reformer),
    (TopKNorm(0.25), plain_topk_norm),
    (TopKNorm(0.6), plain_topk_norm),
    (Quest(0.3, 3), plain_quest),
    (Quest(0.5, 1), plain_quest),
    (BlockPool(0.3, 3), plain_block_pool),
    (BlockPool(0.5, 4, pool_queries=False), plain_block_pool),
    (Clustered(0.3, 4, bits=12, iterations=3), plain_clustered),
    (
        Clustered(0.2, 7, bits=0, iterations=2, seed=1),
        plain_clustered,
    ),  # more clusters than the short sentence has tokens
    (Routing(0.3, 3, iterations=2), plain_routing),
    (Routing(0.2, 5, iterations=0, seed=2), plain_routing),
    (LearnedRouting(0.2, centroids()), plain_routing_learned),
    (TrainedRouting(0.2, centroids()), plain_routing_trained),
    (NearestRouting(0.2, centroids()), plain_routing_nearest),
    (DotProductEntmax(1.5), plain_dotproduct_entmax),
    (DotProductEntmax(1.9), plain_dotproduct_entmax),
    (MagicPIG(6, bits=2), plain_magicpig),
    (MagicPIG(3, bits=2, collisions=1, seed=1), plain_magicpig),
]
IDS = [f"{type(pattern).__name__}-{index}" for index, (pattern, _) in enumerate(CASES)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("pattern", "plain"), CASES, ids=IDS)
def test_pair_by_pair(pattern: Any, plain: Callable[..., Joined], causal: bool) -> None:
    qk = sentences(causal)
    graph = pattern(qk, LAYER)
    expected = torch.zeros_like(graph)
    for example, n in enumerate(qk.lengths.tolist()):
        for head in range(HEADS):
            joined = plain(pattern, qk.q[example, head, :n], qk.k[example, head, :n], head, causal)
            for i in range(n):
                for j in range(i + 1 if causal else n):
                    expected[example, head, i, j] = joined(i, j)
    differ = (graph != expected).nonzero().tolist()
    assert not differ, f"(example, head, query, key): {differ[:5]}"
    pairs = qk.allowed.expand_as(graph)
    assert 0 < graph.sum() < pairs.sum(), "an empty or a full graph proves nothing"


BLIND = [
    pattern for pattern, _ in CASES if not isinstance(pattern, Clustered) and getattr(pattern, "iterations", 0) == 0
]


@pytest.mark.parametrize("pattern", BLIND, ids=lambda pattern: type(pattern).__name__)
def test_a_causal_choice_never_reads_the_future(pattern: Any) -> None:
    qk = sentences(causal=True, lengths=[13])
    before = pattern(qk, LAYER)
    for now in (4, 7, 12):
        later = (torch.arange(13) >= now)[:, None]
        other = sentences(causal=True, lengths=[13]).q.flip(2) * 3
        changed = qk.with_vectors(torch.where(later, other, qk.q), torch.where(later, -other, qk.k))
        assert torch.equal(pattern(changed, LAYER)[:, :, :now], before[:, :, :now])


TURNED = [
    (Reformer(n_buckets=8), [1, 2, 3, 5]),
    (TopKNorm(), [0.05, 0.3, 0.6, 1.0]),
    (Quest(), [0.05, 0.3, 0.6, 1.0]),
    (BlockPool(), [0.05, 0.3, 0.6, 1.0]),
    (BlockPool(pool_queries=False), [0.05, 0.3, 0.6, 1.0]),
    (Clustered(), [0.05, 0.3, 0.6, 1.0]),
    (Routing(n_clusters=4), [0.05, 0.3, 0.6, 1.0]),
    (LearnedRouting(centroids=centroids()), [0.05, 0.3, 0.6, 1.0]),
    (MagicPIG(bits=3), [2, 3, 5, 20]),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("pattern", "values"), TURNED, ids=lambda x: type(x).__name__ if hasattr(x, "sparsity_parameter") else ""
)
def test_the_sparsity_parameter_only_adds_edges(pattern: Any, values: list[float], causal: bool) -> None:
    qk = sentences(causal, lengths=[40, 23])
    graphs = [replace(pattern, **{pattern.sparsity_parameter: value})(qk, LAYER) for value in values]
    for smaller, larger in pairwise(graphs):
        assert not (smaller & ~larger).any()
        assert smaller.sum() < larger.sum()
    if pattern.sparsity_parameter == "share":
        assert torch.equal(graphs[-1], qk.allowed.expand_as(graphs[-1])), "a share of 1 is dense"


def test_normal_numbers() -> None:
    x = normal(0, 1, torch.arange(3)[:, None], torch.arange(20_000))
    assert x.dtype == torch.float64
    assert x.isfinite().all()
    assert x.mean(-1).abs().max() < 0.03
    assert (x.std(-1) - 1).abs().max() < 0.02
    assert (x.abs() < 1.959964).double().mean(-1).sub(0.95).abs().max() < 0.01
    assert torch.equal(x[:, :5], normal(0, 1, torch.arange(3)[:, None], torch.arange(5)))


def test_a_share_is_not_rounded_up_by_chance() -> None:
    n = torch.arange(1, 1000)
    for hundredths in range(1, 101):
        assert torch.equal(share_of(n, hundredths / 100), -(-hundredths * n // 100))


@pytest.mark.parametrize("causal", [False, True])
def test_equal_values_go_to_the_earlier_token(causal: bool) -> None:
    values = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0])
    qk = QK(*torch.zeros(2, 1, 1, 7, 1), torch.ones(1, 7, dtype=torch.bool), causal)
    chosen = first_share(values[None, None, :, None], qk, 0.4)[0, 0, :, 0]
    assert set(chosen.nonzero().flatten().tolist()) == kept(values.tolist(), 0.4, causal)


def test_memberships_as_ids() -> None:
    member = torch.tensor([[[[True, False, True], [False, False, False], [False, True, False]]]])
    assert as_ids(member).tolist() == [[[[0, 2], [-1, -1], [1, -1]]]]
    assert as_ids(torch.zeros(1, 1, 2, 3, dtype=torch.bool)).shape == (1, 1, 2, 0)


def test_lloyd_finds_groups_and_leaves_an_empty_centre_alone() -> None:
    points = torch.tensor([0.0, 0.2, 5.0, 5.2, 99.0])[None, None, :, None]
    valid = torch.tensor([[True, True, True, True, False]])
    centres = lloyd(points, valid, torch.tensor([1.0, 3.0, -50.0])[None, None, :, None], 3)
    assert centres.flatten().tolist() == pytest.approx([0.1, 5.1, -50.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKNorm(0.0), "share must be a share, more than 0 and at most 1, got 0.0"),
        (lambda: Quest(1.5), "share must be a share"),
        (lambda: Quest(size=0), "size must be 1 or more, got 0"),
        (lambda: BlockPool(-0.1), "share must be a share"),
        (lambda: BlockPool(size=-4), "size must be 1 or more"),
        (lambda: Reformer(0), "n_rounds must be 1 or more"),
        (lambda: Reformer(n_buckets=7), "n_buckets must be even, .* got 7: try 8"),
        (lambda: Clustered(2.0), "share must be a share"),
        (lambda: Clustered(n_clusters=0), "n_clusters must be 1 or more"),
        (lambda: Clustered(bits=-1), "bits and iterations must be 0 or more"),
        (lambda: Routing(0.0), "share must be a share"),
        (lambda: Routing(n_clusters=0), "n_clusters must be 1 or more"),
        (lambda: Routing(iterations=-1), "iterations must be 0 or more"),
        (lambda: LearnedRouting(0.0), "share must be a share"),
        (lambda: LearnedRouting()(random_qk([3]), 0), "needs centroids: run stage=cluster"),
        (lambda: MagicPIG(0), "n_tables must be 1 or more"),
        (lambda: MagicPIG(bits=63), "bits must be at most 62"),
    ],
)
def test_wrong_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
