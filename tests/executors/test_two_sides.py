"""Bucketed attention of heads that share keys and of two texts, in every executor, beside the mask that defines it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.errors import UserError
from sparsefinder.executors.native import bucketed as native
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.metrics import Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.combine import ShareInGroup, Union
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.quest import Quest
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.testing import random_cross, random_qk

EXECUTORS = ("native", "blocks")


@dataclass(frozen=True)
class Drawn:
    """Two buckets of five for each token, another draw for each head."""

    sparsity_parameter: ClassVar[str | None] = None

    def layout(self, qk: QK, layer: int) -> Layout:
        generator = torch.Generator().manual_seed(layer)
        ids = (torch.randint(-1, 5, (*x.shape[:3], 2), generator=generator) for x in (qk.q, qk.k))
        return Layout(Buckets(*(torch.where(torch.tensor([True, False]), x, x + 5 * (x >= 0)) for x in ids), 10))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        return self.layout(qk, layer).graph(qk)


def both(pattern: object, qk: QK, executor: str, alpha: float) -> list[list[Tensor]]:
    """Output and gradients of the mask and of the executor."""
    values = torch.randn(qk.k.shape, generator=torch.Generator().manual_seed(3), dtype=qk.k.dtype)
    weights = torch.randn(qk.q.shape, generator=torch.Generator().manual_seed(4), dtype=qk.q.dtype)
    masked = Masked(pattern, Normalizer(alpha), qk.causal)  # type: ignore[arg-type]
    bucketed = Bucketed(pattern, Normalizer(alpha), qk.causal, executor)  # type: ignore[arg-type]
    runs = []
    for attention in (masked, bucketed):
        q, k, v = inputs = [x.clone().requires_grad_() for x in (qk.q, qk.k, values)]
        output = attention(q, k, v, qk.valid, 0, qk.query_valid)
        (output * weights).sum().backward()
        runs.append([output.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)])
    return runs


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.3])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("causal", [False, True])
def test_three_heads_share_one_of_keys(executor: str, causal: bool, alpha: float) -> None:
    pattern = Union((Drawn(), Window(3), GlobalTokens(1)))
    for left in (False, True):
        qk = random_qk([13, 7, 1], 6, 8, causal, left=left)
        qk = qk.with_vectors(qk.q.double(), qk.k[:, :2].double())
        for masked, own in zip(*both(pattern, qk, executor, alpha), strict=True):
            torch.testing.assert_close(own, masked)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.3])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("group", [1, 2])
def test_queries_of_one_text_and_keys_of_another(executor: str, alpha: float, group: int) -> None:
    for queries, keys in (((9, 4, 2), (3, 12, 1)), ((3, 12, 1), (9, 4, 2)), ((5, 5), (5, 5)), ((4, 0), (0, 6))):
        qk = random_cross(queries, keys, 4, 8)
        qk = qk.with_vectors(qk.q.double(), qk.k[:, ::group].double())
        for masked, own in zip(*both(Drawn(), qk, executor, alpha), strict=True):
            torch.testing.assert_close(own, masked)
        pairs = Bucketed(Drawn(), executor="native").computed_pairs(qk, 0)
        assert torch.equal(pairs, Drawn()(qk.a_key_each, 0).sum((-2, -1)))


@pytest.mark.parametrize("layout", [Layout(window=3), Layout(is_global=torch.ones(1, 4, dtype=torch.bool))])
def test_a_window_or_global_tokens_between_texts_are_refused_by_every_executor(layout: Layout) -> None:
    qk = random_cross([3], [4], 2, 8)

    @dataclass(frozen=True)
    class Given:
        def layout(self, qk: QK, layer: int) -> Layout:
            return layout

    for executor in EXECUTORS:
        with pytest.raises(UserError, match="cross-attention has two"):
            Bucketed(Given(), executor=executor)(qk.q, qk.k, qk.k, qk.valid, 0, qk.query_valid)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a window of 3 tokens compares positions"):
        Dense(window=3)(qk.q, qk.k, qk.k, qk.valid, 0, qk.query_valid)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_dense_attention_has_two_sides(alpha: float) -> None:
    qk = random_cross([9, 4], [3, 12], 4, 8)
    qk = qk.with_vectors(qk.q, qk.k[:, ::2])
    masked = Masked(Full(), Normalizer(alpha))(qk.q, qk.k, qk.k, qk.valid, 0, qk.query_valid)
    for executor in ("native", "tiles"):
        dense = Dense(Normalizer(alpha), executor=executor)(qk.q, qk.k, qk.k, qk.valid, 0, qk.query_valid)
        torch.testing.assert_close(dense, masked)


def test_the_gold_graph_has_two_sides() -> None:
    for qk in (random_cross([9, 4], [3, 12], 4, 8), random_qk([9, 4], 4, 8, causal=True)):
        shared = qk.with_vectors(qk.q, qk.k[:, ::2])
        expected = Normalizer(1.5)(shared.scores()) > 0
        assert torch.equal(Oracle()(shared, 0), expected)
        counts = count(expected, Gold.of(shared, 1.5), shared)
        assert torch.equal(counts.hits, expected.sum((-2, -1)))
        assert torch.equal(counts.exact, shared.queries_valid.sum(-1, keepdim=True).expand(-1, 4))
        torch.testing.assert_close(counts.mass, expected.any(-1).sum(-1).double())


def test_a_prediction_shared_in_a_group_is_that_of_its_mean_query() -> None:
    qk = random_qk([11, 6], 6, 8)
    shared = qk.with_vectors(qk.q, qk.k[:, ::3])
    centroids = Centroids([torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))])
    for pattern in (Quest(0.4), KMeans(1, centroids)):
        alone = qk.with_vectors(torch.stack([qk.q[:, :3].mean(1), qk.q[:, 3:].mean(1)], 1), shared.k)
        expected = pattern(alone, 0).repeat_interleave(3, dim=1)
        both_ways = (shared, shared.a_key_each)
        for given in both_ways:
            assert torch.equal(ShareInGroup(pattern, 3)(given, 0), expected)
            assert torch.equal(ShareInGroup(pattern, 3).layout(given, 0).graph(given), expected)


def test_values_of_other_heads_are_refused_before_they_are_read() -> None:
    qk = random_qk([5], 4, 8)
    with pytest.raises(ValueError, match="values must be of the shape of the keys"):
        native.attend(replace(qk, k=qk.k[:, :2]), qk.q, Layout(window=3), 1.5)
