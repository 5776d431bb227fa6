"""The tail of a layout: every way to multiply it beside a plain loop, and the limits in which it is something known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.tail_normalizer import with_clusters
from tests.executors.tails import Tailed, plain
from tests.test_attention import assert_same, positions, right_padded, routed, vectors, with_gradients

ALPHAS = [1.0, 1.3, 1.5, 2.0]
TOKENS = 18
GLOBALS = positions(TOKENS, [0, 17], [0, 8])
PATTERNS = {
    "clusters": Tailed(routed(2, 2, TOKENS, 2, 7)),
    "window": Tailed(routed(2, 2, TOKENS, 2, 7), 5),
    "window and globals": Tailed(routed(2, 2, TOKENS, 1, 4), 3, GLOBALS),
    "window beyond the text": Tailed(routed(2, 2, TOKENS, 2, 7), 99),
    "tail alone": Tailed(Buckets(torch.full((2, 2, TOKENS, 1), -1), routed(2, 2, TOKENS, 1, 5).k_ids, 5)),
    "no slot": Tailed(Buckets(torch.zeros(2, 2, TOKENS, 0, dtype=torch.int64), routed(2, 2, TOKENS, 1, 5).k_ids, 5)),
}
EXECUTORS = {"masked": Masked, "blocks": partial(Bucketed, executor="blocks")} | {
    "a few at a time": partial(Bucketed, executor="blocks", queries_at_once=60),
    "auto": Bucketed,
}
EACH = pytest.mark.parametrize("attention", EXECUTORS.values(), ids=EXECUTORS)


INPUTS = vectors(2, 2, TOKENS, 4, dtype=torch.float64)
# padded on the right, and with holes
VALID = right_padded([18, 12], TOKENS) & (torch.arange(TOKENS) % 7 != 3)


@cache
def expected(name: str, alpha: float, causal: bool) -> list[Tensor]:
    """Output and gradients of the plain loop, in float64."""

    def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        qk = QK(q, k, valid, causal)
        return plain(PATTERNS[name].layout(qk, layer), qk, v, alpha)

    return with_gradients(attention, INPUTS, VALID)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
@EACH
def test_it_is_the_plain_loop(attention: Any, name: str, causal: bool) -> None:
    """Output and gradients, in float64 and float32."""
    for alpha in ALPHAS if name == "window and globals" else (1.0, 1.5):
        run, right = attention(PATTERNS[name], Normalizer(alpha), causal), expected(name, alpha, causal)
        assert_same(with_gradients(run, INPUTS, VALID), right, 1e-6)
        single = [x.float() for x in INPUTS]
        assert_same(with_gradients(run, single, VALID), [x.float() for x in right], 2e-4)


def test_keys_in_several_buckets_have_no_tail() -> None:
    ids = torch.zeros(1, 1, 3, 2, dtype=torch.int64)
    for make in (lambda: Layout(Buckets(ids, ids, 1), tail=True), lambda: Layout(window=3, tail=True)):
        with pytest.raises(
            UserError, match=r"a tail needs every key in one bucket, here it may be in [02]: .* tail=false$"
        ):
            make()
    one = Layout(Buckets(ids, ids[..., :1], 1), tail=True)
    assert one.union(Layout(window=3)).tail
    with pytest.raises(UserError, match="a tail needs every key in one bucket, here it may be in 3"):
        one.union(Layout(Buckets(ids, ids, 1)))


# ---- limits in which a tail is something known ----

ALL_ALPHAS = pytest.mark.parametrize("alpha", ALPHAS)


@ALL_ALPHAS
@EACH
def test_who_takes_every_cluster_attends_densely(attention: Any, alpha: float) -> None:
    ids = routed(2, 2, TOKENS, 1, 4).k_ids.clamp_min(0)
    pattern = Tailed(Buckets(torch.arange(4).expand(2, 2, TOKENS, 4), ids, 4))
    expected = Dense(Normalizer(alpha))(*INPUTS, VALID)
    torch.testing.assert_close(attention(pattern, Normalizer(alpha))(*INPUTS, VALID, 0), expected)


@ALL_ALPHAS
@pytest.mark.parametrize("causal", [False, True])
@EACH
def test_clusters_of_one_key_are_that_key(attention: Any, causal: bool, alpha: float) -> None:
    own = torch.arange(TOKENS)[:, None].expand(2, 2, TOKENS, 1)
    pattern = Tailed(Buckets(own[..., :0], own, TOKENS))
    expected = with_gradients(Dense(Normalizer(alpha), causal), INPUTS, VALID)
    assert_same(with_gradients(attention(pattern, Normalizer(alpha), causal), INPUTS, VALID), expected, 1e-5)


@ALL_ALPHAS
@EACH
def test_clusters_of_equal_keys_are_those_keys(attention: Any, alpha: float) -> None:
    """Some of them seen one by one, in a window; values are equal too, since an entry has their mean."""
    own = torch.arange(TOKENS)[:, None].expand(2, 2, TOKENS, 1) // 3
    q, k, v = INPUTS[0], *(x[:, :, torch.arange(TOKENS) // 3] for x in INPUTS[1:])
    pattern = Tailed(Buckets(own[..., :0], own, TOKENS // 3), 5)
    expected = Dense(Normalizer(alpha))(q, k, v, VALID)
    torch.testing.assert_close(attention(pattern, Normalizer(alpha))(q, k, v, VALID, 0), expected, atol=1e-5, rtol=1e-5)


# ---- the normalizer ----


def clusters(count: int = 5, rows: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of keys, and mean, variance and number of those of clusters; the last one has no key."""
    generator = torch.Generator().manual_seed(0)
    scores, mean = (2 * torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (3, count))
    variance = torch.rand(rows, count, generator=generator, dtype=torch.float64) * 3
    numbers = torch.tensor([1.0, 40.0, 7.0, 3.0, 0.0], dtype=torch.float64)[:count].expand(rows, count)
    return scores, mean, variance, numbers


@ALL_ALPHAS
def test_a_cluster_of_two_keys_weighs_what_they_do(alpha: float) -> None:
    scores = clusters()[0]
    pairs = scores.new_tensor([[0.3, 1.9], [-1.0, 2.5]])
    expected = Normalizer(alpha)(torch.cat([scores, pairs.flatten().expand(len(scores), -1)], dim=-1))
    mean, variance = (x.expand(len(scores), -1) for x in (pairs.mean(-1), pairs.var(-1, correction=0)))
    keys, both = with_clusters(scores, mean, variance, torch.full_like(mean, 2.0), alpha)
    torch.testing.assert_close(keys, expected[:, :3])
    torch.testing.assert_close(both, expected[:, 3:].unflatten(1, (2, 2)).sum(-1))


@ALL_ALPHAS
def test_all_probabilities_together_are_one(alpha: float) -> None:
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        for wide in (0.0, 1.0, 10.0):
            scores, mean, variance, numbers = (x.to(dtype) for x in clusters())
            both = torch.cat(with_clusters(scores, 10 * mean, wide * variance, numbers, alpha), dim=-1)
            assert (both >= 0).all()
            torch.testing.assert_close(both.sum(-1), torch.ones(6, dtype=dtype), atol=near, rtol=0)
            assert not both[:, -1].any(), "a cluster without a key has a probability"
    nothing = with_clusters(torch.full((1, 2), -math.inf), torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1, 3), alpha)
    assert not torch.cat(nothing, dim=-1).any()


@ALL_ALPHAS
def test_gradients_of_scores_means_and_variances(alpha: float) -> None:
    scores, mean, variance, numbers = clusters(rows=3)
    inputs = [x.clone().requires_grad_() for x in (scores, mean, variance + 0.1)]
    assert torch.autograd.gradcheck(lambda *x: with_clusters(*x, numbers, alpha), inputs)


# ---- promises ----


@ALL_ALPHAS
@EACH
def test_the_future_never_changes_the_past(attention: Any, alpha: float) -> None:
    """And there is a gradient of what came before, none of what comes later."""
    run = attention(PATTERNS["window and globals"], Normalizer(alpha), causal=True)
    inputs = [x.clone().requires_grad_() for x in INPUTS]
    past = run(*inputs, VALID, 0)[:, :, :9]
    changed = [torch.cat([x[:, :, :9], 3 * x[:, :, 9:] + 1], dim=2) for x in INPUTS]
    torch.testing.assert_close(run(*changed, VALID, 0)[:, :, :9], past, atol=1e-10, rtol=1e-10)
    past.square().sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert x.grad[:, :, :9].any()
        assert not x.grad[:, :, 9:].any()


@EACH
def test_what_padding_holds_never_matters(attention: Any) -> None:
    pattern, right = PATTERNS["window and globals"], INPUTS
    wrong = [x.masked_fill(~VALID[:, None, :, None], math.nan) for x in INPUTS]
    expected, got = (with_gradients(attention(pattern), x, VALID) for x in (right, wrong))
    assert_same(got, expected, 1e-12)
    assert not got[0][(~VALID)[:, None].expand(-1, 2, -1)].any()


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(attention: Any, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in INPUTS]
    out, *gradients = with_gradients(attention(PATTERNS["window"]), inputs, VALID)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    expected = attention(PATTERNS["window"])(*(x.float() for x in inputs), VALID, 0)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_entries_are_counted_among_the_pairs() -> None:
    qk = QK(INPUTS[0], INPUTS[1], VALID)
    for name, pattern in PATTERNS.items():
        without = replace(pattern, tail=False)
        for attention in (Masked, EXECUTORS["blocks"]):
            more = attention(pattern).computed_pairs(qk, 0) - attention(without).computed_pairs(qk, 0)
            assert (more == TOKENS * pattern.buckets.count).all(), name
        assert torch.equal(Bucketed(pattern).graph(qk, 0), without(qk, 0))
