"""What patterns say that predicting costs, against the multiplications that torch is seen to make."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from sparsefinder.executors.native import nearest_centroids
from sparsefinder.executors.native import predictors as native
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.experiment.costs import costs
from sparsefinder.graphs import QK
from sparsefinder.metrics import Gold, count
from sparsefinder.numerics.counter_rng import normal
from sparsefinder.patterns.block_pool import BlockPool
from sparsefinder.patterns.clustered import Clustered
from sparsefinder.patterns.combine import Blocked, ShareInGroup, Union
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.dotproduct_entmax import DotProductEntmax
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.indexer import LightningIndexer
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.lowrank import LowRank
from sparsefinder.patterns.magicpig import MagicPIG
from sparsefinder.patterns.multipole import Multipole
from sparsefinder.patterns.oracle_topk import OracleTopK
from sparsefinder.patterns.pages import Pages
from sparsefinder.patterns.per_head import PerHead
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.quest import Quest
from sparsefinder.patterns.reformer import Reformer
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.routed_reranked import RoutedReranked
from sparsefinder.patterns.routing import LearnedRouting, Routing
from sparsefinder.patterns.routing_nearest import NearestRouting
from sparsefinder.patterns.routing_trained import TrainedRouting
from sparsefinder.patterns.support.cost import cost_of
from sparsefinder.patterns.topk_norm import TopKNorm
from sparsefinder.patterns.twilight import Twilight
from sparsefinder.patterns.window import Window
from sparsefinder.patterns.xattention import XAttention
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.indexer import Indexer
from sparsefinder.predictors.projections import Hidden, LayerProjections, Linear, Projections
from sparsefinder.testing import random_qk
from sparsefinder.testing.vectors import random_cross
from tests.conftest import ROOT

TOKENS, HEADS, SIZE, ROUNDS = 96, 2, 32, 16


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.count += out.numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.count += out.numel() * args[1].shape[-1]
        elif name in ("_euclidean_dist", "_cdist_forward"):
            self.count += out.numel() * args[0].shape[-1]
        return out


def centroids(runs: int = 1, count: int = 12, size: int = SIZE) -> Centroids:
    return Centroids([torch.randn(HEADS, runs, count, size, generator=torch.Generator().manual_seed(0))])


def index_heads(heads: int = 3, numbers: int = 4) -> Indexer:
    shapes = {
        "q": (heads, HEADS * SIZE, numbers),
        "k": (HEADS * SIZE, numbers),
        "w": (HEADS * SIZE, heads),
        "b": (heads,),
    }
    return Indexer([{name: torch.randn(*shape) for name, shape in shapes.items()}])


PATTERNS = [
    Window(3),
    Full(),
    Quantize(4),
    Distance("random", 0.1),
    Distance("l2"),
    Distance("cos"),
    DotProductEntmax(),
    LowRank(),
    OracleTopK(0.1),
    KMeans(2, centroids(runs=2)),
    Quest(0.2),
    BlockPool(0.2, pool_queries=False),
    BlockPool(0.2),
    TopKNorm(),
    Pages(),
    XAttention(),
    Twilight(share=1.0),
    Reformer(),
    MagicPIG(n_tables=10),
    LearnedRouting(0.1, centroids()),
    NearestRouting(0.1, centroids(runs=2)),
    TrainedRouting(0.1, centroids()),
    Routed(key_centroids=centroids(count=24)),
    LightningIndexer(0.1, index_heads()),
    RoutedReranked(
        share=1.0, bilinear_centroids=centroids(count=24)
    ),  # every pair is multiplied here, whatever the share
]
# a mean over the tokens of a cluster is a product with ones and zeros there, which the method need not make
WITH_MEANS = [
    Routing(n_clusters=8, iterations=0),
    Routing(n_clusters=8),
    Clustered(n_clusters=8),
    Clustered(bits=0),
    Multipole(n_clusters=8, tail=False),
]


def counted(pattern: Any, monkeypatch: pytest.MonkeyPatch, size: int = SIZE, qk: QK | None = None) -> float:
    for library in (native, nearest_centroids):
        monkeypatch.setattr(library, "works_on", lambda *_: False)  # what is done in C++ is not seen
    qk = random_qk([TOKENS], HEADS, size) if qk is None else qk
    drawn = Multiplications()  # by random numbers that depend on nothing but a seed: once for a model
    with drawn, pytest.MonkeyPatch.context() as patched:
        for module in ("reformer", "magicpig", "clustered", "routing"):
            patched.setattr(f"sparsefinder.patterns.{module}.normal", _unseen)
        pattern(qk, 0)
    return drawn.count / (HEADS * qk.q.shape[2])


def _unseen(*args: Any) -> torch.Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        return normal(*args)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_a_formula_is_what_is_counted(pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, said = counted(pattern, monkeypatch), cost_of(pattern, TOKENS, SIZE)
    # some products are made another way, such as the norm of a vector: a few for each of its numbers
    assert 0.98 * said <= seen + 2 * SIZE, (said, seen)
    assert seen <= 1.02 * said + 6 * SIZE, (said, seen)


@pytest.mark.parametrize("pattern", WITH_MEANS, ids=repr)
def test_a_formula_without_means(pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, said = counted(pattern, monkeypatch), cost_of(pattern, TOKENS, SIZE)
    assert said <= 1.02 * seen
    assert seen <= 2.2 * said + 8 * SIZE, "at most one more product for each"


BETWEEN_TEXTS = [each for each in (*PATTERNS, *WITH_MEANS) if not isinstance(each, Window)]


@pytest.mark.parametrize("queries", [TOKENS // 4, TOKENS * 3])
@pytest.mark.parametrize("pattern", BETWEEN_TEXTS, ids=lambda pattern: type(pattern).__name__)
def test_between_texts_what_is_done_with_a_key_is_divided_between_the_queries(
    pattern: Any, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qk = random_cross([queries], [TOKENS], HEADS, SIZE)
    seen, said = counted(pattern, monkeypatch, qk=qk), cost_of(pattern, TOKENS, SIZE, queries)
    keys = max(TOKENS / queries, 1.0)
    means = any(pattern is each for each in WITH_MEANS)  # there are as many products more, as within a text
    assert said <= 1.02 * seen + 2 * SIZE * keys, (said, seen)
    assert seen <= (2.2 if means else 1.02) * said + 8 * SIZE * keys, (said, seen)
    qk = random_cross([queries, queries // 2], [TOKENS, 12], HEADS, SIZE)
    counts = count(pattern(qk, 0), Gold.of(qk, 1.5), qk)
    mean = (cost_of(pattern, TOKENS, SIZE, queries) + cost_of(pattern, 12, SIZE, queries // 2)) / 2
    found = costs(pattern, counts, SIZE, crosses=True)
    assert found["prediction_cost"].tolist() == pytest.approx([mean] * HEADS)


def test_a_pattern_in_a_projected_space_pays_for_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    for q, k in (
        (Linear(HEADS, SIZE, ROUNDS), Linear(HEADS, SIZE, ROUNDS)),
        (Hidden(HEADS, SIZE, 20, ROUNDS), Hidden(HEADS, SIZE, 20, ROUNDS)),
    ):
        learned = Learned({"lowrank": Projections([LayerProjections(q, k).requires_grad_(False)])})
        whole = Configuration("lowrank", LowRank(), window=5).build(learned)
        seen, said = counted(whole, monkeypatch), cost_of(whole, TOKENS, SIZE)
        assert said > 2 * SIZE * ROUNDS
        assert said == pytest.approx(seen, rel=0.02)
        between = Configuration("lowrank", LowRank()).build(learned)
        qk = random_cross([TOKENS // 4], [TOKENS], HEADS, SIZE)
        seen, said = counted(between, monkeypatch, qk=qk), cost_of(between, TOKENS, SIZE, TOKENS // 4)
        assert said == pytest.approx(seen, rel=0.02)


def test_combinations() -> None:
    pair = Union((Quest(0.2), Window(3), Window(5)))
    assert cost_of(pair, 8, 4) == cost_of(Quest(0.2), 8, 4) == 2 * 4 * 2
    chunks = Blocked(LowRank(), 4)  # 3 chunks of 16 numbers each, and their cost is that of 4 queries
    assert cost_of(chunks, 10, 4) == 3 * 16 / 4
    heads = PerHead(MagicPIG(), ((1, 2), (3, 6)))
    assert cost_of(heads, 10, 4) == 2 * 4 * 8 * 3
    hashing = MagicPIG(
        n_tables=2, bits=8
    )  # a query and a key cost the same: with twice as many keys half as much again
    for whole in (hashing, Union((hashing, Window(3))), ShareInGroup(hashing, 2), Blocked(hashing, 2)):
        assert cost_of(whole, 10, 4, 5) == 1.5 * cost_of(whole, 10, 4)
    assert cost_of(heads, 10, 4, 5) == 1.5 * cost_of(heads, 10, 4)
    assert math.isnan(cost_of(lambda qk, layer: qk.allowed, 8, 4)), "somebody's pattern that does not say"


def test_cost_and_density_add_up() -> None:
    """Prediction and attention together as a share of dense attention."""
    qk = random_qk([10, 30], HEADS, SIZE)
    pattern = Distance("l2", 40.0)
    counts = count(pattern(qk, 0), Gold.of(qk, 1.5), qk)
    found = costs(pattern, counts, SIZE)
    assert found["prediction_cost"].tolist() == [20.0 * SIZE] * HEADS
    assert found["prediction_share"].tolist() == [0.5] * HEADS
    share = found["attention_cost"] * 2 / (2 * SIZE * torch.tensor([10.0, 30.0])).sum()
    assert (share - (counts.predicted / counts.allowed).mean(0)).abs().max() < 0.2


def test_a_tail_costs_three_products_an_entry() -> None:
    qk = random_qk([10], HEADS, SIZE)
    found = {}
    for tail in (False, True):
        pattern = Union((Quest(0.2, size=5, tail=tail), Window(3)))
        found[tail] = costs(pattern, count(pattern(qk, 0), Gold.of(qk, 1.5), qk), SIZE)
    assert (found[True]["prediction_cost"] - found[False]["prediction_cost"]).tolist() == [2.0 * 3 * SIZE] * HEADS
    assert torch.equal(found[True]["attention_cost"], found[False]["attention_cost"])


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "pattern").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pattern_of_the_folder_says_its_cost(path: Any) -> None:
    node = OmegaConf.load(path)
    if "_target_" not in node:
        return
    module, _, name = node["_target_"].rpartition(".")
    kind = getattr(__import__(module, fromlist=[name]), name)
    assert dataclasses.is_dataclass(kind)
    assert callable(getattr(kind, "cost", None)), f"{name} needs a method cost(tokens, size)"
