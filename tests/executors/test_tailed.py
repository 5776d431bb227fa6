"""Clusters of keys and their tail in C++, beside torch's products in float64: every size of a register, and hostile input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.executors.choose_executor import choose
from sparsefinder.executors.native import library, tailed
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.normalizers import Normalizer
from tests.executors.tails import Tailed
from tests.test_attention import with_gradients

SOFTMAX = Normalizer(1.0)

pytestmark = pytest.mark.skipif(bool(library.missing(tailed._LIBRARY)), reason="needs a C++ compiler")


def buckets(heads: int, queries: int, keys: int, count: int, slots: int, seed: int = 0) -> Buckets:
    """A query takes up to ``slots`` of the clusters, the last of which has no key; some keys are in none."""
    generator = torch.Generator().manual_seed(seed)
    k_ids = torch.randint(-1, max(count - 1, 1), (1, heads, keys, 1), generator=generator)
    q_ids = torch.rand(1, heads, queries, count, generator=generator).argsort(-1)[..., :slots]
    return Buckets(q_ids.masked_fill(torch.rand(q_ids.shape, generator=generator) < 0.3, -1), k_ids, count)


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def attention(pattern: Tailed, executor: str, alpha: float = 1.0, causal: bool = False) -> Bucketed:
    return Bucketed(pattern, Normalizer(alpha), causal, executor)


def surrounded(pattern: Tailed, tokens: int) -> Tailed:
    """The same with a window and two global tokens."""
    return Tailed(pattern.buckets, 5, torch.arange(tokens)[None] % max(tokens // 2, 1) == 1, pattern.tail)


CAUSAL = pytest.mark.parametrize("causal", [False, True])


@CAUSAL
@pytest.mark.parametrize(("alpha", "tail"), [(1.0, True), (1.5, True), (1.0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "size", "count", "slots"),
    [(9, 5, 3, 1), (47, 16, 19, 4), (61, 32, 70, 12), (33, 40, 8, 8), (40, 72, 33, 3), (530, 8, 5, 2), (1, 32, 1, 1)],
)
def test_all_sizes(
    tokens: int, size: int, count: int, slots: int, dtype: torch.dtype, alpha: float, tail: bool, causal: bool
) -> None:
    """Output and gradients; more than a block of queries, fewer than a vector, and neither in whole numbers of them.

    What a cluster of one key weighs has no derivative in its spread, which torch's products take to be 1e-4: near a threshold a
    gradient of entmax differs by as much.
    """
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-4}[dtype] if alpha == 1.0 else 5e-5
    valid = torch.rand(1, tokens, generator=torch.Generator().manual_seed(1)) < 0.9
    pattern = Tailed(buckets(2, tokens, tokens, count, slots), tail=tail)
    for each in (pattern, surrounded(pattern, tokens)):
        run = attention(each, "tailed", alpha, causal)
        ours = with_gradients(run, vectors(1, 2, tokens, size, dtype=dtype), valid)
        inputs = vectors(1, 2, tokens, size, dtype=torch.float64)
        plain = with_gradients(attention(each, "blocks", alpha, causal), inputs, valid)
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@CAUSAL
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_gradients_by_differences(alpha: float, causal: bool) -> None:
    pattern, valid = Tailed(buckets(2, 7, 7, 3, 1)), torch.ones(1, 7, dtype=torch.bool)
    inputs = [x.requires_grad_() for x in vectors(1, 2, 7, 3, dtype=torch.float64)]
    for each in (pattern, surrounded(pattern, 7)):
        run = attention(each, "tailed", alpha, causal)
        assert torch.autograd.gradcheck(lambda q, k, v, run=run: run(q, k, v, valid, 0), inputs)


def test_it_is_chosen_and_says_what_it_cannot() -> None:
    q, k, v = vectors(1, 2, 9, 4)
    pattern = Tailed(buckets(2, 9, 9, 3, 1))
    for causal in (False, True):
        assert "tailed: chosen" in Bucketed(pattern, SOFTMAX, causal).explain(q, k, v)
    other = Bucketed(Tailed(pattern.buckets, tail=False), Normalizer(1.5))
    reason = "multiplies layouts with a tail, and of softmax others whose buckets share no key"
    assert f"tailed: {reason}" in other.explain(q, k, v)


def test_all_clusters_taken_is_dense_and_clusters_of_one_are_exact() -> None:
    q, k, v = vectors(1, 2, 50, 32)
    valid = torch.ones(1, 50, dtype=torch.bool)
    dense = Dense(SOFTMAX)(q, k, v, valid)
    everything = torch.arange(4).expand(1, 2, 50, 4)
    ids = buckets(2, 50, 50, 5, 1).k_ids.clamp_min(0)
    alone, nobody = torch.arange(50).view(1, 1, 50, 1).expand(1, 2, 50, 1), torch.zeros(1, 2, 50, 0, dtype=torch.int64)
    for each in (Buckets(everything, ids, 4), Buckets(nobody, alone, 50)):
        torch.testing.assert_close(attention(Tailed(each), "tailed")(q, k, v, valid, 0), dense, rtol=1e-4, atol=1e-5)


def test_nothing_to_see_gives_zeros_and_what_padding_contains_is_never_read() -> None:
    q, k, v = vectors(1, 2, 20, 32)
    nobody = Buckets(torch.zeros(1, 2, 20, 1, dtype=torch.int64), torch.full((1, 2, 20, 1), -1), 4)
    valid = torch.arange(20)[None] >= 6
    assert not attention(Tailed(nobody), "tailed")(q, k, v, valid, 0).any()
    run = attention(Tailed(buckets(2, 20, 20, 4, 2)), "tailed")
    clean = with_gradients(run, [q, k, v], valid)
    for x in (q, k, v):
        x[:, :, :6] = math.nan
    dirty = with_gradients(run, [q, k, v], valid)
    assert not dirty[0][:, :, :6].any()
    for mine, theirs in zip(dirty, clean, strict=True):
        assert torch.equal(mine[:, :, 6:], theirs[:, :, 6:])


@CAUSAL
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(("alpha", "tail"), [(1.0, True), (1.5, True), (1.0, False)])
def test_scores_far_from_what_entries_let_expect(alpha: float, tail: bool, around: bool, causal: bool) -> None:
    """A key whose exponential is infinite beside the entries of its row, an entry far above all keys, and both backwards."""
    pattern = Tailed(buckets(2, 60, 60, 9, 3), tail=tail)
    pattern = surrounded(pattern, 60) if around else pattern
    valid = torch.ones(1, 60, dtype=torch.bool)
    for scale in (1e-3, 30.0, 300.0):
        q, k, v = vectors(1, 2, 60, 16, dtype=torch.float64)
        inputs = [q * scale, k, v]
        plain = with_gradients(attention(pattern, "blocks", alpha, causal), inputs, valid)
        run = attention(pattern, "tailed", alpha, causal)
        single = with_gradients(run, [x.float() for x in inputs], valid)
        assert all(x.isfinite().all() for x in single)
        torch.testing.assert_close(single[0].double(), plain[0], rtol=1e-3, atol=1e-3)
        double = with_gradients(run, inputs, valid)
        # where clusters begin with one key its spread is none here, and 1e-4 by torch's products
        least = 1e-8 if causal else 0.0
        for mine, theirs in zip(double, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=max(1e-6 * scale, least))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_nan_is_seen_by_all(alpha: float) -> None:
    q, k, v = vectors(1, 2, 20, 16)
    valid = torch.ones(1, 20, dtype=torch.bool)
    k[0, 1, 3] = math.nan
    each = buckets(2, 20, 20, 4, 2)
    out = attention(Tailed(Buckets(each.q_ids, each.k_ids.clamp_min(0), 4)), "tailed", alpha)(q, k, v, valid, 0)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()


@CAUSAL
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_threads_and_memory_layout_change_nothing(alpha: float, causal: bool) -> None:
    q, k, v = vectors(2, 3, 600, 32)
    valid = torch.ones(2, 600, dtype=torch.bool)
    each = buckets(3, 600, 600, 20, 3)
    run = attention(surrounded(Tailed(each), 600), "tailed", alpha, causal)
    of_model = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results += [with_gradients(run, inputs, valid) for inputs in ([q, k, v], of_model)]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True))
    assert run(q, k, v, valid, 0).transpose(1, 2).is_contiguous()  # so a model joins the heads without a copy


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_shared_heads_of_keys_and_two_texts(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 11, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 23, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    masks = torch.arange(23)[None] < 20, torch.arange(11)[None] < 9
    pattern = Tailed(buckets(4, 11, 23, 5, 2))
    results = []
    for executor in ("tailed", "blocks"):
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(pattern, executor, alpha)(*own, masks[0], 0, masks[1])
        results.append([out, *torch.autograd.grad((out * torch.cos(out.detach())).sum(), own)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@CAUSAL
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_shared_heads_of_keys(alpha: float, causal: bool) -> None:
    """A head of keys gets the gradients of all heads of queries that share it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 19, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    valid, each = torch.arange(19)[None] < 16, buckets(4, 19, 19, 5, 2)
    results = []
    for executor in ("tailed", "blocks"):
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(surrounded(Tailed(each), 19), executor, alpha, causal)(*own, valid, 0)
        results.append([out, *torch.autograd.grad((out * torch.cos(out.detach())).sum(), own)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("alpha", "tail"), [(1.0, True), (1.5, True), (1.0, False)])
def test_later_tokens_change_no_digit(alpha: float, tail: bool) -> None:
    """More than a block of queries before them, and clusters that have later keys alone."""
    tokens, seen = 1100, 1050
    each = buckets(2, tokens, tokens, 20, 3)
    k_ids = each.k_ids.clone()
    k_ids[:, :, :seen] = k_ids[:, :, :seen].clamp_max(15)
    pattern = surrounded(Tailed(Buckets(each.q_ids, k_ids, 20), tail=tail), tokens)
    valid = torch.ones(1, tokens, dtype=torch.bool)
    run, inputs = attention(pattern, "tailed", alpha, causal=True), vectors(1, 2, tokens, 16)
    first = run(*inputs, valid, 0)
    for x in inputs:
        x[:, :, seen:] = x[:, :, seen:].flip(2) * 3
    assert torch.equal(run(*inputs, valid, 0)[:, :, :seen], first[:, :, :seen])


def test_full_buckets_without_a_tail_are_panels() -> None:
    """Those of softmax and 8 keys or more; smaller ones, shared ones and entmax go a query at a time."""
    full, small = buckets(2, 80, 80, 9, 3), buckets(2, 80, 80, 11, 3)
    shared = Buckets(full.q_ids, full.k_ids.repeat(1, 1, 1, 2), 9)
    valid, tokens = torch.ones(1, 80, dtype=torch.bool), vectors(1, 2, 80, 8)
    for each, alpha, causal, expected in [
        (full, 1.0, False, "tailed"),
        (small, 1.0, False, "native"),
        (shared, 1.0, False, "native"),
        (full, 1.5, False, "native"),
        (full, 1.0, True, "tailed"),
    ]:
        run = Bucketed(Tailed(each, tail=False), Normalizer(alpha), causal=causal)
        named = Bucketed(Tailed(each, tail=False), Normalizer(alpha), causal=causal, executor=expected)
        assert torch.equal(run(*tokens, valid, 0), named(*tokens, valid, 0))
        qk = QK(*tokens[:2], valid, causal)
        executors, layout = run._executors(run._layout(qk, 0)), run._layout(qk, 0)
        assert choose(executors, "auto", run._work(qk, layout)).name == expected
        assert torch.equal(run.computed_pairs(qk, 0), run.graph(qk, 0).sum((-2, -1)))


def test_entries_are_counted() -> None:
    each = buckets(2, 9, 9, 3, 1)
    q, k, _ = vectors(1, 2, 9, 4)
    qk = QK(q, k, torch.ones(1, 9, dtype=torch.bool))
    layout = Layout(each, tail=True)
    expected = layout.graph(qk).sum((-2, -1)) + 9 * 3
    assert torch.equal(tailed.TailedExecutor().computed_pairs(qk, layout), expected)
