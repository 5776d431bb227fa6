"""The oracles against loops over queries, and the order in which they bound each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.metrics import Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.oracle_head import OracleHead
from sparsefinder.patterns.oracle_topk import OracleTopK
from sparsefinder.patterns.oracle_topp import OracleTopP
from sparsefinder.patterns.support.ranking import best, share_of
from sparsefinder.testing import check_pattern
from tests.conftest import random_qk

LENGTHS = [19, 12, 1]


def sharp_qk(batch: int, heads: int, tokens: int) -> QK:
    """Queries and keys whose entmax is sparse."""
    qk = random_qk([tokens] * batch, heads)
    return qk.with_vectors(2 * qk.q, 2 * qk.k)


def allowed_scores(qk: QK, b: int, h: int, i: int) -> dict[int, float]:
    """Scores of the keys that a query may see, one by one."""
    keys = range(i + 1) if qk.causal else range(int(qk.lengths[b]))
    return {j: float(qk.q[b, h, i] @ qk.k[b, h, j]) / math.sqrt(qk.q.shape[-1]) for j in keys}


def largest(scores: dict[Any, float], number: int) -> set[Any]:
    return set(sorted(scores, key=lambda j: -scores[j])[:number])


@pytest.mark.parametrize("causal", [False, True])
class TestRowByRow:
    def test_topk(self, causal: bool) -> None:
        qk = random_qk(LENGTHS, causal=causal)
        graph = OracleTopK(0.3)(qk, 0)
        for b, n in enumerate(LENGTHS):
            for h in range(2):
                for i in range(n):
                    scores = allowed_scores(qk, b, h, i)
                    expected = largest(scores, math.ceil(len(scores) * 3 / 10))
                    assert set(graph[b, h, i].nonzero().flatten().tolist()) == expected

    @pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
    @pytest.mark.parametrize("p", [0.0, 0.5, 0.9])
    def test_topp(self, p: float, alpha: float, causal: bool) -> None:
        qk = random_qk(LENGTHS, causal=causal)
        graph = OracleTopP(p, alpha)(qk, 0)
        probabilities = Normalizer(alpha)(qk.scores().double())
        for b, n in enumerate(LENGTHS):
            for h in range(2):
                for i in range(n):
                    kept = graph[b, h, i]
                    row = probabilities[b, h, i]
                    assert row[kept].sum() >= p
                    assert p == 0 or row[kept].sum() - row[kept].min() < p, "without its least key it holds too little"
                    assert not kept.any() or row[kept].min() >= row[~kept].max()

    def test_head(self, causal: bool) -> None:
        qk = random_qk(LENGTHS, causal=causal)
        graph = OracleHead(0.3)(qk, 0)
        for b, n in enumerate(LENGTHS):
            for h in range(2):
                scores = {(i, j): s for i in range(n) for j, s in allowed_scores(qk, b, h, i).items()}
                expected = largest(scores, math.ceil(len(scores) * 3 / 10))
                assert {tuple(pair) for pair in graph[b, h].nonzero().tolist()} == expected

    @pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
    def test_margins_are_scores_above_the_threshold_of_a_row(self, alpha: float, causal: bool) -> None:
        qk = random_qk(LENGTHS, causal=causal)
        scores = qk.scores()
        margins = OracleHead(alpha=alpha)._margins(scores)
        probabilities = Normalizer(alpha)(scores.double())
        seen = qk.allowed.expand_as(scores)
        shift = (margins - scores).masked_fill(~seen, 0.0)
        assert (shift.masked_fill(~seen, -math.inf).amax(-1) - shift.masked_fill(~seen, math.inf).amin(-1))[
            seen.any(-1)
        ].max() < 1e-5, "a shift of each row"
        if alpha == 1.0:
            torch.testing.assert_close(margins[seen], probabilities.log()[seen], atol=1e-5, rtol=1e-5)
        else:
            positive = probabilities > 1e-6
            expected = (probabilities ** (alpha - 1) - 1) / (alpha - 1)
            torch.testing.assert_close(margins[positive], expected[positive], atol=1e-4, rtol=1e-4)
            assert (margins[(probabilities == 0) & seen] <= -1 / (alpha - 1) + 1e-6).all()


def test_the_whole_probability_under_entmax_is_the_gold_graph() -> None:
    qk = sharp_qk(2, 2, 60)
    for alpha in (1.5, 2.0):
        assert torch.equal(OracleTopP(1.0, alpha)(qk, 0), Oracle(alpha)(qk, 0))


def test_no_budget_of_a_head_recalls_more_than_by_margin() -> None:
    qk = sharp_qk(4, 3, 64)
    probabilities = Normalizer(1.5)(qk.scores())
    gold = Gold.of_matrix(probabilities)
    for share in (0.02, 0.05, 0.1, 0.3):
        recall = {
            name: count(pattern(qk, 0), gold, qk).macro()["recall"]
            for name, pattern in {
                "margin": OracleHead(share, "margin"),
                "score": OracleHead(share),
                "topk": OracleTopK(share),
            }.items()
        }
        pairs = share_of(torch.tensor(64 * 64), share)
        bound = (pairs / gold.sums()).clamp_max(1.0).mean(0)
        torch.testing.assert_close(recall["margin"].float(), bound.float(), atol=1e-4, rtol=0)
        assert (recall["score"] <= recall["margin"] + 1e-9).all()
        # a share of each row rounds up: compared where that adds nothing
        if (share * 64) % 1 == 0:
            assert (recall["topk"] <= recall["margin"] + 1e-9).all()


def test_equal_scores_go_to_the_earlier_key() -> None:
    zeros = torch.zeros(1, 1, 6, 4)
    qk = QK(zeros, zeros, torch.ones(1, 6, dtype=torch.bool))
    first_two = torch.tensor([True, True, False, False, False, False])
    assert (OracleTopK(1 / 3)(qk, 0)[0, 0] == first_two).all()
    assert (OracleTopP(1 / 3)(qk, 0)[0, 0] == first_two).all()
    assert OracleHead(1 / 3)(qk, 0)[0, 0].flatten().nonzero().flatten().tolist() == list(range(12))


def test_other_settings_conform_too() -> None:
    check_pattern(OracleHead(by="margin"), sweep=[0.05, 0.2, 0.5], dense=OracleHead(1.0, "margin"))
    check_pattern(OracleHead(by="margin", alpha=1.0), sweep=[0.05, 0.2, 0.5], dense=OracleHead(1.0, "margin", 1.0))
    check_pattern(OracleTopP(alpha=1.5), sweep=[0.2, 0.5, 0.9])


def test_budgets_round_up_but_not_for_noise() -> None:
    counts = torch.tensor([0, 1, 10, 30, 64])
    assert share_of(counts, 0.1).tolist() == [0, 1, 1, 3, 7]
    assert share_of(counts, 0.0).tolist() == [0] * 5
    assert share_of(counts, 1.0).tolist() == counts.tolist()
    assert best(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), torch.tensor([[2]])).tolist() == [
        [False, True, True, False]
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OracleTopK(1.1), "share must lie between 0 and 1, got 1.1"),
        (lambda: OracleTopP(-0.1), "p must lie between 0 and 1"),
        (lambda: OracleHead(2.0), "share must lie between 0 and 1"),
        (lambda: OracleHead(by="rank"), "by=rank is unknown; choose one of score, margin"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_oracle_has_the_pairs_that_metrics_compare_with() -> None:
    """Those at the threshold too, which C++ and torch may place on either side of it."""
    qk = sharp_qk(1, 2, 64)
    expected = torch.zeros(1, 2, 64, 64, dtype=torch.bool)
    expected.view(-1)[Gold.of(qk, 1.5).indices] = True
    assert torch.equal(Oracle(1.5)(qk, 0), expected)
