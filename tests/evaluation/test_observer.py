"""What an attention did, measured on some queries: the same numbers as on all of them, where all are drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.auto_attention import Auto
from sparsefinder.evaluation.observer import Observer
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.oracle_head import OracleHead
from sparsefinder.patterns.oracle_topk import OracleTopK
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import Window
from sparsefinder.testing import random_qk
from sparsefinder.testing.by_name import HEADS, SIZE, learned

ENTMAX, SOFTMAX = Normalizer(1.5), Normalizer(1.0)
AROUND = {"window": 5, "global_tokens": 1}
TOKENS = 40
CASES: dict[str, tuple[Any, Configuration]] = {
    "window": (Bucketed, Configuration("window", Window(5))),
    "kmeans": (Bucketed, Configuration("kmeans", KMeans(1), **AROUND)),
    "quantize": (Bucketed, Configuration("quantize", Quantize(4), **AROUND)),
    "tail": (Bucketed, Configuration("routed", Routed("budget", 0.2, tail=True), window=5)),
    "masked tail": (Masked, Configuration("routed", Routed("budget", 0.2, tail=True), window=5)),
    "auto": (lambda p, n, c: Auto(p, n, c, crossover=8), Configuration("window", Window(5))),
    "oracle": (Masked, Configuration("oracle", Oracle())),
    "top keys": (Masked, Configuration("oracle_topk", OracleTopK(0.2))),
    "of a head": (Masked, Configuration("oracle_head", OracleHead(0.2))),
    "distance": (Masked, Configuration("distance", Distance("l2", 1.0))),
    "chance": (Masked, Configuration("distance", Distance("random", 0.3), **AROUND)),
    "full": (Masked, Configuration("full", Full())),
}


def observed(
    attention: Any, configuration: Configuration | None, own: Normalizer, qk: QK, most: int | None
) -> Observer:
    observer = Observer(attention, configuration, own, most, seed=3)
    for layer in range(2):
        observer(layer, qk, qk.k, attention(qk.q, qk.k, qk.k, qk.valid, layer))
    return observer


def case(name: str, own: Normalizer, causal: bool = False) -> tuple[Any, Configuration]:
    kind, configuration = CASES[name]
    return kind(configuration.build(learned()), own, causal), configuration


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own", [ENTMAX, SOFTMAX], ids=["entmax", "softmax"])
@pytest.mark.parametrize("name", CASES)
def test_all_queries_drawn_are_all_queries(name: str, own: Normalizer, causal: bool) -> None:
    attention, configuration = case(name, own, causal)
    qk = random_qk([TOKENS, 23, 1], HEADS, SIZE, causal)
    plain, drawn = (observed(attention, configuration, own, qk, most).means() for most in (None, TOKENS + 9))
    assert drawn == pytest.approx(plain, abs=2e-6, nan_ok=True)
    assert {"output_error", "computed_density", "recall", "exact"} <= {*drawn}


@pytest.mark.parametrize("lengths", [[TOKENS, TOKENS], [TOKENS, 23]])
@pytest.mark.parametrize("sparsity_type", ["none", "norm", "pooling"])
def test_so_is_an_attention_with_a_graph_of_its_own(sparsity_type: str, lengths: list[int]) -> None:
    attention = LSGAttention(sparsity_type, block_size=4, sparse_block_size=4, sparsity_factor=2, num_global_tokens=1)
    qk = random_qk(lengths, HEADS, SIZE)
    plain, drawn = (observed(attention, None, SOFTMAX, qk, most).means() for most in (None, TOKENS))
    assert drawn == pytest.approx(plain, abs=2e-6)
    assert ("recall" in drawn) == (sparsity_type != "pooling")


@pytest.mark.parametrize("name", CASES)
def test_some_queries_are_those_rows_of_the_whole(name: str) -> None:
    attention, configuration = case(name, ENTMAX)
    qk = random_qk([TOKENS], HEADS, SIZE)
    seen: list[Tensor] = []
    observer = observed(attention, configuration, ENTMAX, qk, 7)
    rows = torch.tensor([0, 3, 4, 17, 39])
    for layer in range(2):
        assert torch.equal(attention.graph(qk, layer, rows), attention.graph(qk, layer)[:, :, rows])
        seen.append(observer.counts[layer][0].queries)
    assert all((queries == 7).all() for queries in seen)


def test_a_text_none_of_whose_queries_is_drawn_says_nothing() -> None:
    """A short one beside a long one, as documents that lie apart in a block: means are those of the long one."""
    attention, configuration = case("window", ENTMAX)
    beside, alone = random_qk([TOKENS, 1], HEADS, SIZE), random_qk([TOKENS], HEADS, SIZE)
    beside.q[:1], beside.k[:1] = alone.q, alone.k
    both, one = (observed(attention, configuration, ENTMAX, qk, 3).means() for qk in (beside, alone))
    assert one["output_error"] > 0
    for name in ("output_error", "recall", "precision", "exact"):
        assert both[name] == pytest.approx(one[name], abs=2e-6)


def test_a_draw_belongs_to_seed_and_layer_and_to_no_attention() -> None:
    qk = random_qk([TOKENS], HEADS, SIZE)
    window, wider = (observed(Bucketed(Window(w)), None, ENTMAX, qk, 7) for w in (3, 5))
    assert torch.equal(window.counts[0][0].gold, wider.counts[0][0].gold)
    assert not torch.equal(window.counts[0][0].gold, window.counts[1][0].gold)
    other = replace(window, seed=4, counts={}, errors={}, pairs={})
    other(0, qk, qk.k, qk.k)
    assert not torch.equal(other.counts[0][0].gold, window.counts[0][0].gold)


def test_an_attention_that_knows_its_graph_as_a_whole_alone() -> None:
    class Somebodys:
        causal = False

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
            return Bucketed(Window(3))(q, k, v, valid, layer)

        def graph(self, qk: QK, layer: int) -> Tensor:
            return Window(3)(qk, layer)

        def computed_pairs(self, qk: QK, layer: int) -> Tensor:
            return self.graph(qk, layer).sum((-2, -1))

    qk = random_qk([TOKENS], HEADS, SIZE)
    theirs, ours = (observed(each, None, ENTMAX, qk, 7).means() for each in (Somebodys(), Bucketed(Window(3))))
    assert theirs == pytest.approx(ours)
