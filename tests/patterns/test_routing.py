"""Selection by an estimated threshold, the closed-form space, and routing to clusters, each beside a plain reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.native import predictors as native
from sparsefinder.graphs import QK
from sparsefinder.lowrank import RouteSettings
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.selection import select, thresholds
from sparsefinder.patterns.lowrank import LowRank
from sparsefinder.patterns.routed import Routed
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.storage.samples import Samples
from sparsefinder.testing import random_qk as ragged
from tests.conftest import random_qk


def columns(rows: int = 7, count: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random scores, and how many keys stand behind each column: some none."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, count, generator=generator)
    return scores, torch.randint(0, 4, (1, count), generator=generator).float()


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_the_threshold_is_that_of_entmax_over_as_many_keys(alpha: float) -> None:
    scores, numbers = columns()
    keys = scores.repeat_interleave(numbers[0].long(), dim=-1)  # every column as often as it has keys
    p = Normalizer(alpha)(keys)
    scaled = ((alpha - 1) * scores).masked_fill(numbers == 0, -torch.inf)
    tau = thresholds(scaled, numbers, alpha)
    expected = ((alpha - 1) * keys - tau).clamp_min(0) ** (1 / (alpha - 1))
    torch.testing.assert_close(p, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_a_margin_of_zero_keeps_the_support(alpha: float) -> None:
    scores, _ = columns(40, 30)
    ones = torch.ones_like(scores)
    support = Normalizer(alpha)(scores) > 0
    assert torch.equal(select(scores, ones, "margin", 0.0, alpha), support)
    wider = select(scores, ones, "margin", 0.3, alpha)
    assert (wider | support).equal(wider)
    assert wider.sum() > support.sum()
    assert select(scores, ones, "margin", -0.1, alpha).sum() < support.sum()


def test_a_budget_takes_the_best_columns_as_near_to_it_as_they_come() -> None:
    scores, numbers = columns()
    for level in (0.05, 0.2, 0.5, 0.9, 1.0):
        kept = select(scores, numbers, "budget", level, 1.5)
        for row in range(len(scores)):
            order = [c for c in scores[row].argsort(descending=True).tolist() if numbers[0, c] > 0]
            expected, keys = set(), 0.0
            for column in order:
                if expected and keys + numbers[0, column] / 2 > level * numbers.sum():
                    break
                expected.add(column)
                keys += float(numbers[0, column])
            assert {*kept[row].nonzero().flatten().tolist()} == expected


def test_a_row_without_keys_keeps_nothing() -> None:
    scores, numbers = columns()
    for rule in ("margin", "budget"):
        assert not select(scores, torch.zeros_like(numbers), rule, 1.0, 1.5).any()


def samples(size: int = 6, seed: int = 0) -> Samples:
    """Two layers of two heads; queries and keys are correlated, and keys lie off the origin."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, 2, 2, size, size, generator=generator)
    q, k = ([torch.randn(2, 2, n, size, generator=generator) @ mix[side] for n in (30, 50, 40)] for side in (0, 1))
    return Samples(q, [x + 3.0 for x in k])


def centred_error(found: Tensor, true: Tensor) -> Tensor:
    """Mean squared difference of scores, each row centred: what a normalizer can see."""
    difference = found - true
    return (difference - difference.mean(-1, keepdim=True)).square().mean()


def test_full_rank_is_exact_but_for_a_shift_of_each_row() -> None:
    data = samples()
    exact = fit_lowrank(data, 6)
    for layer in range(2):
        qk = data.layer(0, layer)
        assert centred_error(exact(qk, layer).scores(), qk.scores()) < 1e-8 * qk.scores().var()


def test_no_map_of_that_rank_comes_nearer() -> None:
    """Against a thousand steps of gradient descent from the closed form, on the objective that it minimizes."""
    data = samples()
    layer = [data.layer(index, 0) for index in range(len(data))]
    q = torch.cat([x.q[0] for x in layer], dim=1)
    k = torch.cat([x.k[0] for x in layer], dim=1)
    k = k - k.mean(1, keepdim=True)
    moment, spread = q.mT @ q / q.shape[1], k.mT @ k / k.shape[1]

    def error(w_q: Tensor, w_k: Tensor) -> Tensor:
        difference = w_q @ w_k.mT - torch.eye(6)  # E over independent q, k of (qᵀ X k)² = tr(X C_k Xᵀ C_q)
        return (difference @ spread @ difference.mT @ moment).diagonal(dim1=-2, dim2=-1).sum()

    space = fit_lowrank(data, 2).layers[0]
    start = [space.q.w * math.sqrt(6 / 2), space.k.w]
    learned = [
        (w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))).requires_grad_() for w in start
    ]
    optimizer = torch.optim.Adam(learned, lr=1e-3)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = error(*learned)
        loss.backward()
        optimizer.step()
    assert error(*start) <= loss * (1 + 1e-3)


def test_lowrank_with_full_rank_and_no_margin_is_the_gold_graph() -> None:
    data = samples()
    qk = data.layer(1, 1)
    graph = LowRank(level=0.0)(fit_lowrank(data, 6)(qk, 1), 1)
    gold = Normalizer(1.5)(qk.scores()) > 0
    assert (graph != gold).float().mean() < 1e-3  # ties at the threshold


def plain_routes(pattern: Routed, qk: QK, example: int, head: int) -> set[tuple[int, int]]:
    """The edges of one example and head, cluster by cluster and query by query."""
    centres = pattern.key_centroids.layers[0][head].flatten(0, 1)
    valid = qk.valid[example].nonzero().flatten().tolist()
    q, k = qk.q[example, head], qk.k[example, head]
    cluster = {j: int((centres - k[j]).norm(dim=-1).argmin()) for j in valid}
    edges = set()
    for i in valid:
        scores, numbers = [], []
        for c in range(len(centres)):
            members = torch.stack([k[j] for j in valid if cluster[j] == c] or [torch.full_like(k[0], torch.nan)])
            visible = [j for j in valid if cluster[j] == c and (j <= i or not qk.causal)]
            if qk.causal:
                estimate = q[i] @ centres[c]
            else:
                estimate = q[i] @ members.mean(0) + (q[i] ** 2 @ members.var(0, correction=0)).sqrt()
            scores.append(float(estimate.nan_to_num(0.0)) / math.sqrt(len(q[i])))
            numbers.append(len(visible))
        kept = select(torch.tensor([scores]), torch.tensor([numbers]).float(), pattern.rule, pattern.level, 1.5)[0]
        edges |= {(i, j) for j in valid if kept[cluster[j]] and (j <= i or not qk.causal)}
    return edges


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rule", "level"), [("margin", 0.1), ("margin", 0.8), ("budget", 0.3)])
def test_routes_pair_by_pair(rule: str, level: float, causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    pattern = Routed(rule, level, key_centroids=Centroids([torch.randn(2, 2, 3, 4, generator=generator)]))
    qk = random_qk([12, 7], 2, 4, causal)
    graph = pattern(qk, 0)
    for example in range(2):
        for head in range(2):
            found = {(i, j) for i, j in graph[example, head].nonzero().tolist()}
            assert found == plain_routes(pattern, qk, example, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("rule", "values"), [("margin", (0.1, 2.0)), ("budget", (0.05, 0.4))])
def test_causal_routing_in_cpp_is_that_of_torch(
    rule: str, values: tuple[float, float], left: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    pattern = Routed(rule, key_centroids=Centroids([torch.randn(2, 1, 40, 4, generator=generator)]))
    qk = ragged([150, 1, 90], 2, 4, causal=True, left=left)
    qk = qk.with_vectors(qk.q.to(dtype), qk.k.to(dtype))
    assert native.works_on(qk.q)
    found = pattern.layout_of_heads(qk, 0, values).graph(qk)
    monkeypatch.setattr(native, "works_on", lambda _: False)
    plain = pattern.layout_of_heads(qk, 0, values).graph(qk)
    assert 0 < plain.sum() < qk.allowed.expand_as(plain).sum()
    assert (found != plain).sum() <= (0 if dtype == torch.float64 else 1e-3 * plain.sum()), "but for ties"


def test_a_causal_query_does_not_see_the_future() -> None:
    generator = torch.Generator().manual_seed(3)
    pattern = Routed("margin", 0.2, key_centroids=Centroids([torch.randn(2, 1, 5, 4, generator=generator)]))
    qk = random_qk([12], 2, 4, causal=True)
    changed = qk.with_vectors(qk.q, torch.cat([qk.k[:, :, :8], 5 - qk.k[:, :, 8:]], dim=2))
    assert torch.equal(pattern(qk, 0)[:, :, :8], pattern(changed, 0)[:, :, :8])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routed("best"), "choose one of margin, budget"),
        (lambda: Routed("budget", 1.5), "share of the keys"),
        (lambda: LowRank(alpha=1.0), "softmax has no threshold"),
        (lambda: RouteSettings(rank=0), "route.rank must be 1 or more"),
        (lambda: Routed()(random_qk([3]), 0), "run stage=route first"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
