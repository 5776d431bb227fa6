"""Attention on a graph against a slow reference: one query at a time, normalized by the ``entmax`` package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics import entmax_newton
from sparsefinder.numerics.normalizers import Normalizer

ALPHAS = [1.0, 1.3, 1.5, 2.0]
Blocks, Native = (partial(Bucketed, executor=executor) for executor in ("blocks", "native"))
EXECUTORS = pytest.mark.parametrize("executor", [Blocks, Native], ids=["blocks", "native"])
ATTENTIONS = pytest.mark.parametrize("attention", [Masked, Blocks, Native], ids=["masked", "blocks", "native"])


@dataclass(frozen=True)
class Fixed:
    """A pattern whose layout was given in advance."""

    buckets: Buckets | None = None
    window: int = 0
    is_global: Tensor | None = field(default=None, compare=False)

    def layout(self, qk: QK, layer: int) -> Layout:
        return Layout(self.buckets, self.window, self.is_global)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        return self.layout(qk, layer).graph(qk)


@dataclass(frozen=True)
class BySign:
    """A pattern that reads its buckets off the vectors: slot ``p`` cuts coordinate ``p`` at ``cuts`` places."""

    slots: int
    cuts: int

    def layout(self, qk: QK, layer: int) -> Layout:
        ids = ((torch.tanh(x[..., : self.slots]) + 1) / 2 * self.cuts for x in (qk.q, qk.k))
        offsets = torch.arange(self.slots) * self.cuts
        q_ids, k_ids = (x.long().clamp(0, self.cuts - 1) + offsets for x in ids)
        first = torch.zeros_like(qk.valid)
        first[:, 0] = True
        return Layout(Buckets(q_ids, k_ids, self.slots * self.cuts), 3, first)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        return self.layout(qk, layer).graph(qk)


def reference(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, alpha: float) -> Tensor:
    """The output of each query from its own keys alone, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(v)
    for b, h, i in graph.any(-1).nonzero().tolist():
        keys = graph[b, h, i].nonzero().squeeze(-1)
        scores = k[b, h, keys] @ q[b, h, i] / math.sqrt(q.shape[-1])
        p = scores.softmax(0) if alpha == 1 else entmax.entmax_bisect(scores, alpha, n_iter=60)
        out[b, h, i] = p @ v[b, h, keys]
    return out


def vectors(batch: int, heads: int, tokens: int, size: int = 8, seed: int = 0, dtype: Any = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, size, generator=generator, dtype=dtype) for _ in range(3))
    return [2 * q, k, v]


def right_padded(lengths: list[int], tokens: int) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def positions(tokens: int, *rows: list[int]) -> Tensor:
    """``(B, N)`` bool, True at each example's listed positions."""
    return torch.stack([torch.isin(torch.arange(tokens), torch.tensor(row)) for row in rows])


def rounds(batch: int, heads: int, tokens: int, slots: int, buckets: int, seed: int = 0) -> Buckets:
    """``slots`` rounds of random buckets with ids of their own: pairs share one, several or none."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, slots)
    offsets = torch.arange(slots) * buckets
    q_ids, k_ids = (torch.randint(buckets, shape, generator=generator) + offsets for _ in range(2))
    return Buckets(q_ids, k_ids, slots * buckets)


def nearest(batch: int, heads: int, tokens: int, top: int, buckets: int, seed: int = 0) -> Buckets:
    """``top`` different buckets of one numbering for each token: the same bucket turns up in different slots."""
    generator = torch.Generator().manual_seed(seed)
    q_ids, k_ids = (torch.rand(batch, heads, tokens, buckets, generator=generator).topk(top).indices for _ in range(2))
    return Buckets(q_ids, k_ids, buckets)


def routed(batch: int, heads: int, tokens: int, top: int, buckets: int, seed: int = 0) -> Buckets:
    """Every key in one bucket or none, every query in ``top`` buckets at most: some slots are empty (-1)."""
    chosen = nearest(batch, heads, tokens, top, buckets, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    empty_q, empty_k = (torch.rand(batch, heads, tokens, n, generator=generator) < 0.3 for n in (top, 1))
    return Buckets(chosen.q_ids.masked_fill(empty_q, -1), chosen.k_ids[..., :1].masked_fill(empty_k, -1), buckets)


def same_buckets(queries: list[int], keys: list[int], count: int) -> Buckets:
    """One head whose queries and keys are in the listed buckets."""
    return Buckets(torch.tensor(queries)[None, None, :, None], torch.tensor(keys)[None, None, :, None], count)


TOKENS = 75
GLOBALS = positions(TOKENS, [0, 40, 74], [0, 49])
LAYOUTS = {
    "one bucket each": Fixed(rounds(2, 2, TOKENS, 1, 5)),
    "rounds": Fixed(rounds(2, 2, TOKENS, 3, 4)),
    "top clusters": Fixed(nearest(2, 2, TOKENS, 3, 9)),
    "queries in several buckets, keys in one": Fixed(routed(2, 2, TOKENS, 3, 9)),
    "the same, window, globals": Fixed(routed(2, 2, TOKENS, 3, 9), 9, GLOBALS),
    "rounds, window, globals": Fixed(rounds(2, 2, TOKENS, 2, 3), 7, GLOBALS),
    "clusters, window, globals": Fixed(nearest(2, 2, TOKENS, 2, 9), 41, GLOBALS),
    "window": Fixed(window=5),
    "window beyond the text": Fixed(window=999),
    "window of one": Fixed(window=1),
    "globals": Fixed(is_global=GLOBALS),
    "all are global": Fixed(is_global=torch.ones(2, TOKENS, dtype=torch.bool)),
    "globals in padding only": Fixed(window=3, is_global=positions(TOKENS, [], [70])),
    "no slot": Fixed(rounds(2, 2, TOKENS, 0, 1), 3),
    "nothing": Fixed(),
    "from content": BySign(2, 6),
}


def with_gradients(attention: Callable[..., Tensor], inputs: list[Tensor], valid: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v, each output entry weighted differently."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves, valid, 0)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_same(first: list[Tensor], second: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- the outputs ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_the_reference(causal: bool, alpha: float) -> None:
    inputs = vectors(2, 1, 40)
    valid = right_padded([40, 25], 40)
    pattern = Fixed(nearest(2, 1, 40, 2, 9), 7, positions(40, [0, 39], [0, 20]))
    expected = reference(*inputs, pattern(QK(inputs[0], inputs[1], valid, causal), 0), alpha)
    for attention in (Masked, Blocks, Native):
        out = attention(pattern, Normalizer(alpha), causal)(*inputs, valid, 0)
        torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
@EXECUTORS
def test_bucketed_is_masked(executor: Any, name: str, causal: bool) -> None:
    """Output and gradients, in float32 and closer in float64, right-padded and with holes."""
    holes = right_padded([75, 50], TOKENS) & (torch.arange(TOKENS) % 7 != 3)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        inputs = vectors(2, 2, TOKENS, dtype=dtype)
        for valid in (right_padded([75, 50], TOKENS), holes):
            for alpha in ALPHAS:
                masked, bucketed = (a(LAYOUTS[name], Normalizer(alpha), causal) for a in (Masked, executor))
                assert_same(with_gradients(bucketed, inputs, valid), with_gradients(masked, inputs, valid), tolerance)
                assert not bucketed(*inputs, valid, 0)[(~valid)[:, None].expand(-1, 2, -1)].any()


@pytest.mark.parametrize(
    "buckets",
    [
        same_buckets([0] * 40, [0] * 40, 1),
        same_buckets(list(range(40)), list(range(40)), 40),
        same_buckets([0] * 40, [1] * 40, 2),
        same_buckets([0] * 39 + [1], [0] + [1] * 39, 2),
        same_buckets([5] * 17 + [0] + [3] * 22, [5] * 33 + [3, 0, 0, 3, 7, 9, 5], 10),
    ],
    ids=["all in one", "one each", "nobody meets", "crossed", "mixed"],
)
@pytest.mark.parametrize("causal", [False, True])
@EXECUTORS
def test_unbalanced_buckets(executor: Any, buckets: Buckets, causal: bool) -> None:
    inputs = vectors(1, 1, 40, dtype=torch.float64)
    valid = torch.ones(1, 40, dtype=torch.bool)
    for pattern in (Fixed(buckets), Fixed(buckets, 3, positions(40, [0, 39]))):
        masked, bucketed = (
            with_gradients(attention(pattern, causal=causal), inputs, valid) for attention in (Masked, executor)
        )
        assert_same(bucketed, masked, 1e-9)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 50), "tokens")
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=3), "lengths")
    heads, seed = data.draw(st.integers(1, 3), "heads"), data.draw(st.integers(0, 99), "seed")
    count = data.draw(st.integers(1, 9), "buckets")
    slots = data.draw(st.integers(0, min(count, 3)), "slots")
    make = data.draw(st.sampled_from([rounds, nearest]), "kind")
    buckets = make(len(lengths), heads, tokens, slots, count, seed)
    window = data.draw(st.sampled_from([0, 1, 3, 11, 101]), "window")
    listed = st.lists(st.integers(0, tokens - 1), max_size=4)
    is_global = positions(tokens, *(data.draw(listed, "globals") for _ in lengths))
    causal, alpha = data.draw(st.booleans(), "causal"), data.draw(st.sampled_from(ALPHAS), "alpha")
    pattern, valid = Fixed(buckets, window, is_global), right_padded(lengths, tokens)
    inputs = vectors(len(lengths), heads, tokens, 4, seed, torch.float64)
    at_once = data.draw(st.sampled_from([1, 60, 10_000]), "queries at once")
    masked = with_gradients(Masked(pattern, Normalizer(alpha), causal), inputs, valid)
    for executor in (partial(Blocks, queries_at_once=at_once), Native):
        bucketed = executor(pattern, Normalizer(alpha), causal)
        assert_same(with_gradients(bucketed, inputs, valid), masked, 1e-8)
        qk = QK(inputs[0], inputs[1], valid, causal)
        assert (bucketed.computed_pairs(qk, 0) >= pattern(qk, 0).sum((-1, -2))).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@EXECUTORS
def test_gradients_of_bucketed(executor: Any, alpha: float, causal: bool) -> None:
    inputs = [x.requires_grad_() for x in vectors(2, 1, 7, 2, seed=3, dtype=torch.float64)]
    valid = right_padded([7, 5], 7)
    pattern = Fixed(nearest(2, 1, 7, 2, 4), 3, positions(7, [0], [0, 4]))
    attention = executor(pattern, Normalizer(alpha), causal)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, valid, 0), inputs)


# ---- promises of every attention ----


@ATTENTIONS
def test_no_key_gives_zeros_and_padding_never_matters(attention: Any) -> None:
    inputs = vectors(1, 1, 6)
    valid = right_padded([4], 6)
    for x in inputs:
        x[:, :, 4:] = math.nan
    alone = Fixed(same_buckets([0, 0, 0, 1, 0, 0], [0] * 6, 2))
    out, *gradients = with_gradients(attention(alone), inputs, valid)
    assert not out[0, 0, 3:].any()
    assert out[0, 0, :3].all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[:, :, 4:].any()


@ATTENTIONS
def test_an_example_gets_the_same_output_alone_padded_and_in_a_batch(attention: Any) -> None:
    pattern, inputs = BySign(2, 6), vectors(3, 2, 60)
    lengths = [60, 41, 7]
    together = attention(pattern)(*inputs, right_padded(lengths, 60), 0)
    for example, length in enumerate(lengths):
        alone = [x[example : example + 1, :, :length] for x in inputs]
        out = attention(pattern)(*alone, right_padded([length], length), 0)
        torch.testing.assert_close(together[example : example + 1, :, :length], out, rtol=1e-5, atol=1e-5)


@ATTENTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_in_float32(attention: Any, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in vectors(2, 2, TOKENS)]
    valid = right_padded([75, 50], TOKENS)
    pattern = LAYOUTS["rounds, window, globals"]
    out, *gradients = with_gradients(attention(pattern), inputs, valid)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    expected = Masked(pattern)(*(x.float() for x in inputs), valid, 0)
    # only the product with v is in half precision: a few roundings of values near 1
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_computed_pairs_are_all_that_are_multiplied(name: str, causal: bool) -> None:
    """torch's own count of multiplications: a pair costs 2·D for its score and 2·D for its value."""
    q, k, v = vectors(2, 2, TOKENS)
    valid = right_padded([75, 50], TOKENS)
    qk = QK(q, k, valid, causal)
    for attention in (
        Masked(LAYOUTS[name], causal=causal),
        Blocks(LAYOUTS[name], causal=causal),
        Blocks(LAYOUTS[name], causal=causal, queries_at_once=1),
    ):
        with FlopCounterMode(display=False) as predicting:
            if isinstance(attention, Masked):
                attention.graph(qk, 0)  # the dense form of buckets is a product too, but not of queries and keys
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, valid, 0)
        pairs = attention.computed_pairs(qk, 0)
        assert pairs.shape == (2, 2)
        assert pairs.dtype == torch.int64
        assert counter.get_total_flops() - predicting.get_total_flops() == 4 * q.shape[-1] * int(pairs.sum())
        graph = attention.graph(qk, 0)
        assert torch.equal(graph, LAYOUTS[name](qk, 0))
        assert (pairs >= graph.sum((-1, -2))).all()
    native = Native(LAYOUTS[name], causal=causal)
    assert torch.equal(native.computed_pairs(qk, 0), native.graph(qk, 0).sum((-1, -2)))


def test_filling_follows_each_bucket_not_the_fullest() -> None:
    """One bucket of 400 and 400 of one token: filled up to the fullest, this would be 401 · 400² pairs."""
    ids = [0] * 400 + list(range(1, 401))
    q, k, _ = vectors(1, 1, 800)
    pairs = Blocks(Fixed(same_buckets(ids, ids, 401))).computed_pairs(QK(q, k, torch.ones(1, 800) > 0), 0)
    assert pairs.item() == 448**2 + 400 * 16**2  # 400 is 25 times 16, which becomes 28 times; 1 becomes 16


# ---- cost ----


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                # views such as an expanded mask own no memory of their own
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("causal", [False, True])
@EXECUTORS
def test_never_of_size_n_by_n(executor: Any, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entmax_newton, "WORTH_COMPILING", 1 << 40)
    largest = []
    for tokens in (2048, 4096, 8192):
        pattern = Fixed(rounds(1, 1, tokens, 2, tokens // 64), 11, positions(tokens, [0, tokens - 1]))
        valid = torch.ones(1, tokens, dtype=torch.bool)
        attention = executor(pattern, causal=causal)
        inputs = vectors(1, 1, tokens, 4)
        with LargestTensor() as mode:
            with_gradients(attention, inputs, valid)
            attention.computed_pairs(QK(inputs[0], inputs[1], valid, causal), 0)
        largest.append(mode.elements)
    assert largest[-1] < 8192 * 8192 / 16
    # linear: twice the tokens, twice the largest tensor, give or take a size of a bucket
    assert largest[1] < 2.3 * largest[0]
    assert largest[2] < 2.3 * largest[1]


# ---- errors ----


def test_a_pattern_without_layout_is_refused() -> None:
    @dataclass(frozen=True)
    class Everything:
        def __call__(self, qk: QK, layer: int) -> Tensor:
            return qk.allowed.expand(-1, qk.q.shape[1], -1, -1)

    with pytest.raises(UserError, match=r"Everything.*attention=masked"):
        Bucketed(Everything())
    assert Masked(Everything())(*vectors(1, 1, 5), torch.ones(1, 5) > 0, 0).shape == (1, 1, 5, 8)


def test_queries_at_once_must_be_positive() -> None:
    with pytest.raises(UserError, match="got 0"):
        Bucketed(Fixed(), queries_at_once=0)
