"""Graphs: allowed pairs, layouts against their definition, blocks, and random numbers that belong to a place."""

from __future__ import annotations

import pytest
import torch

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import uniform
from tests.conftest import random_qk


def test_allowed_pairs_one_by_one() -> None:
    for causal in (False, True):
        qk = random_qk([3, 5], causal=causal)
        for b, length in enumerate([3, 5]):
            for i in range(5):
                for j in range(5):
                    expected = i < length and j < length and (j <= i or not causal)
                    assert qk.allowed[b, 0, i, j] == expected


@pytest.mark.parametrize("causal", [False, True])
def test_a_layout_is_the_union_of_its_parts(causal: bool) -> None:
    qk = random_qk([6, 9], causal=causal)
    generator = torch.Generator().manual_seed(1)
    # two rounds of four buckets; ids are unique over rounds
    q_ids, k_ids = (torch.randint(4, (2, 2, 9, 2), generator=generator) + torch.tensor([0, 4]) for _ in range(2))
    q_ids[:, :, ::3, 0] = k_ids[:, :, ::2, 0] = -1  # in no bucket of the first round
    is_global = torch.zeros(2, 9, dtype=torch.bool)
    is_global[:, 0] = True
    layout = Layout(Buckets(q_ids, k_ids, 8)).union(Layout(window=3)).union(Layout(is_global=is_global))
    graph = layout.graph(qk)
    for b in range(2):
        for h in range(2):
            for i in range(9):
                for j in range(9):
                    shares = bool({*q_ids[b, h, i].tolist()} & {*k_ids[b, h, j].tolist()} - {-1})
                    expected = (shares or abs(i - j) <= 1 or 0 in (i, j)) and bool(qk.allowed[b, 0, i, j])
                    assert graph[b, h, i, j] == expected
    rows = torch.tensor([8, 0, 3])
    assert torch.equal(layout.graph(qk, rows), graph[:, :, rows])
    assert torch.equal(qk.numbers_allowed, qk.allowed[:, 0].sum((-2, -1)))


def test_some_queries_beside_all_keys() -> None:
    rows = torch.tensor([1, 4])
    qk = random_qk([3, 5]).of_queries(rows)
    assert qk.graph_shape == (2, 2, 2, 5)
    assert torch.equal(qk.allowed, random_qk([3, 5]).allowed_of(rows))
    assert torch.equal(qk.scores(), random_qk([3, 5]).scores()[:, :, rows])
    with pytest.raises(ValueError, match="causal attention cannot stand alone"):
        random_qk([3, 5], causal=True).of_queries(rows)


def test_joined_buckets_keep_their_ids_apart() -> None:
    ids = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    joined = Layout(Buckets(ids, ids, 1)).union(Layout(Buckets(ids + 1, torch.tensor([[[[0], [-1]]]]), 2))).buckets
    assert joined is not None
    assert joined.count == 3
    assert joined.q_ids[0, 0, 0].tolist() == [0, 2]
    assert joined.k_ids[0, 0].tolist() == [[0, 1], [0, -1]]


def test_blocks_concatenate_tokens_and_zero_padding() -> None:
    qk = random_qk([5, 2], heads=1, size=2)
    blocked = qk.in_blocks(2)
    assert blocked.q.shape == (2, 1, 3, 4)
    assert blocked.valid.tolist() == [[True, True, True], [True, False, False]]
    torch.testing.assert_close(blocked.q[0, 0, 2], torch.cat([qk.q[0, 0, 4], torch.zeros(2)]))
    assert (blocked.q[1, 0, 1:] == 0).all()


def test_scores_are_absent_outside_allowed_pairs() -> None:
    qk = random_qk([2, 3], causal=True)
    scores = qk.scores()
    assert torch.isinf(scores[~qk.allowed.expand_as(scores)]).all()
    torch.testing.assert_close(scores[1, 0, 2, 1], qk.q[1, 0, 2] @ qk.k[1, 0, 1] / 8**0.5)


def test_shapes_are_checked() -> None:
    three, four = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="3 queries and 4 keys are not the same tokens"):
        QK(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 2), four)
    with pytest.raises(ValueError, match=r"must be .* got"):
        QK(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 5), three)
    with pytest.raises(ValueError, match="3 heads of queries cannot share 2 heads of keys"):
        QK(torch.zeros(1, 3, 3, 2), torch.zeros(1, 2, 3, 2), three)
    with pytest.raises(ValueError, match="cannot be causal"):
        QK(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 2), four, True, three)
    with pytest.raises(ValueError, match="valid must be bool"):
        QK(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.ones(1, 3))


class TestRandomNumbers:
    def test_belong_to_a_place(self) -> None:
        short = uniform(3, 1, torch.arange(5)[:, None], torch.arange(6))
        long = uniform(3, 1, torch.arange(7)[:, None], torch.arange(9))
        assert torch.equal(short, long[:5, :6])

    def test_differ_by_seed_and_layer(self) -> None:
        place = torch.arange(100)
        assert not torch.equal(uniform(0, 0, place), uniform(1, 0, place))
        assert not torch.equal(uniform(0, 0, place), uniform(0, 1, place))
        assert not torch.equal(uniform(1, 0, place), uniform(0, 1, place))  # no layer of one seed is one of another

    def test_are_uniform_and_independent(self) -> None:
        numbers = uniform(0, 0, torch.arange(300)[:, None], torch.arange(300))
        assert numbers.min() >= 0
        assert numbers.max() < 1
        histogram = torch.histc(numbers, 10, 0, 1) / numbers.numel()
        torch.testing.assert_close(histogram, torch.full((10,), 0.1, dtype=torch.float64), atol=0.005, rtol=0)
        assert abs(torch.corrcoef(torch.stack([numbers[:, 1:].flatten(), numbers[:, :-1].flatten()]))[0, 1]) < 0.02
        assert abs(torch.corrcoef(torch.stack([numbers.flatten(), numbers.T.flatten()]))[0, 1]) < 0.02
