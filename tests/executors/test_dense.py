"""Dense attention without a matrix of N × N, against the definition: `Masked` of every pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparsefinder.executors.native.dense as native
from sparsefinder.attention import Dense, Masked
from sparsefinder.errors import UserError
from sparsefinder.executors.blocks import dense_tiles
from sparsefinder.executors.workload import Pairs
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer, PerHead, entmax15
from sparsefinder.numerics.pairs import band
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.window import Window

EXECUTORS = ("native", "tiles")
# of values and of gradients; in float32 the error is the reference's, whose scores are products of matrices in float32
TOLERANCE = {torch.float32: (1e-5, 5e-5), torch.float64: (1e-12, 1e-11)}


def vectors(*shape: int, dtype: torch.dtype = torch.float32, peaked: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(3))
    return [(q * peaked).requires_grad_(), k.requires_grad_(), v.requires_grad_()]


def some_padding(batch: int, tokens: int) -> Tensor:
    """Nothing padded, padding anywhere, an example of nothing but padding."""
    valid = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    valid[0], valid[-1] = True, False
    return valid


def assert_same(ours: Tensor, reference: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients of a sum with random weights."""
    values, slopes = TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(ours, reference, atol=values, rtol=values)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(2))
    got, expected = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, reference))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=slopes, rtol=slopes)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_definition(executor, causal, alpha, dtype):
    inputs = vectors(3, 2, 150, 17, dtype=dtype, peaked=2.5)
    valid = some_padding(3, 150)
    ours = Dense(Normalizer(alpha), causal, executor=executor)(*inputs, valid, 0)
    assert_same(ours, Masked(Full(), Normalizer(alpha), causal)(*inputs, valid, 0), inputs)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_a_band(executor, alpha, causal):
    inputs, valid = vectors(2, 2, 130, 8), some_padding(2, 130)
    ours = Dense(Normalizer(alpha), causal, window=21, executor=executor)(*inputs, valid, 0)
    assert_same(ours, Masked(Window(21), Normalizer(alpha), causal)(*inputs, valid, 0), inputs)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("shape", [(2, 1, 40, 70), (2, 4, 40, 70), (1, 1, 40, 70), (2, 1, 1, 70)])
def test_masks_grouped_heads_and_sides_of_two_lengths(executor, alpha, shape):
    q = vectors(2, 4, 40, 8)[0]
    k, v = vectors(2, 2, 70, 8, seed=3)[1:]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.5
    mask[..., 0, :] = False  # a query without keys, or all of them
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    reference = Normalizer(alpha)(scores.masked_fill(~mask, -math.inf)) @ v.repeat_interleave(2, 1)
    assert_same(Dense(Normalizer(alpha), executor=executor).attend(q, k, v, mask), reference, [q, k, v])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_alpha_of_its_own_for_each_head_can_be_learned(executor):
    inputs, valid = vectors(2, 3, 60, 8, dtype=torch.float64), some_padding(2, 60)
    alpha = torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64, requires_grad=True)
    ours = Dense(PerHead(alpha), executor=executor)(*inputs, valid, 0)
    assert_same(ours, Masked(Full(), PerHead(alpha))(*inputs, valid, 0), [*inputs, alpha])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_in_float32(dtype):
    q, k, v = (x.detach().to(dtype) for x in vectors(1, 2, 100, 16))
    valid = torch.ones(1, 100, dtype=torch.bool)
    ours = Dense()(q, k, v, valid, 0)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, Dense()(q.float(), k.float(), v.float(), valid, 0).to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("without", [0, 1], ids=["fastest", "avx2"])
@pytest.mark.parametrize("peaked", [0.0, 1e-3, 1.0, 2.5, 100.0])
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (47, 64), (48, 30), (49, 1), (700, 64)])
def test_rounding_to_bytes_loses_no_key(without, peaked, tokens, size):
    """Filters of rounded vectors and that of the vectors' own arithmetic lead to the same support, flat rows (0) included."""
    q, k, v = (x.detach() for x in vectors(1, 2, tokens, size, peaked=peaked))
    k[:, :, ::7] *= 30.0  # keys of other lengths, as trained models have them
    k[:, :, 1::5] = 0.0
    valid = torch.ones(1, tokens, dtype=torch.bool)
    alpha = torch.full((2,), 1.5, dtype=torch.float64)
    rounded, plain = (native.attend(q, k, v, Pairs(valid, valid), alpha, without=n) for n in (without, 2))
    torch.testing.assert_close(rounded, plain, atol=2e-6, rtol=2e-6)
    exact = Masked(Full())(q.double(), k.double(), v.double(), valid, 0)
    torch.testing.assert_close(plain.double(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("without", [0, 1], ids=["fastest", "avx2"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rounded_products_do_not_overflow(without, sign):
    """Vectors whose every coordinate is the largest have the largest sums there are: of 16 bits none may be cut."""
    tokens, size = 96, 128
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    q = signs.expand(1, 1, tokens, size).contiguous()
    lengths = torch.linspace(0.25, 0.5, tokens)[:, None]  # the longest key wins where the sign is positive
    k = (sign * lengths * signs)[None, None].contiguous()
    v = torch.randn(1, 1, tokens, size, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(1, tokens, dtype=torch.bool)
    ours = native.attend(q, k, v, Pairs(valid, valid), torch.full((1,), 1.5, dtype=torch.float64), without=without)
    exact = Masked(Full())(q.double(), k.double(), v.double(), valid, 0)
    torch.testing.assert_close(ours.double(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("without", [0, 1], ids=["fastest", "avx2"])
@pytest.mark.parametrize("rounded", ["query", "key"])
def test_what_rounding_takes_from_a_vector_is_allowed_for(without, rounded):
    """One coordinate makes the others of a vector round to zero: the best key's whole product is in those."""
    size = 64
    uneven = torch.full((size,), 0.49 / (127 if rounded == "query" else 63))
    uneven[0] = 1.0
    others = torch.cat([torch.zeros(1), torch.ones(size - 1)])
    rival = torch.eye(size)[0]
    query, best, second = (
        (uneven, others, 0.1 * rival) if rounded == "query" else (others + 0.1 * rival, uneven, 3.0 * rival)
    )
    q = 256.0 * query[None, None, None]
    k = torch.stack([second, best, *torch.zeros(46, size)])[None, None]
    v = torch.eye(48, size)[None, None]
    pairs = Pairs(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 48, dtype=torch.bool))
    ours = native.attend(q, k, v, pairs, torch.full((1,), 1.5, dtype=torch.float64), without=without)
    expected = Normalizer(1.5)(q.double() @ k.double().mT / 8.0) @ v.double()
    assert expected[0, 0, 0].argmax() == 1
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=2e-6)


def test_differs_from_the_entmax_package_by_rounding_only():
    """In float32 from the package in float64: its own rounding, mostly that of the scores, is several times as large."""
    from entmax import entmax15 as package

    inputs, valid = vectors(1, 4, 512, 64, peaked=2.5), torch.ones(1, 512, dtype=torch.bool)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    reference, ours = package(q @ k.mT / 8.0, dim=-1) @ v, Dense()(*inputs, valid, 0)
    assert (ours - reference).abs().max() < 2e-6
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((reference * weights).sum(), exact)
    assert max((a - b).abs().max() for a, b in zip(got, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("executor", EXECUTORS)
def test_dropout_takes_probabilities_and_keeps_their_mean(executor):
    tokens = 64
    q, k = torch.zeros(2, 1, 2, tokens, 4).unbind(0)  # all keys alike
    v = torch.eye(tokens).expand(1, 2, tokens, tokens)
    q, k = q.expand(1, 2, tokens, 4), k.expand(1, 2, tokens, 4)
    torch.manual_seed(0)
    q, k = (torch.cat([x, torch.zeros(1, 2, tokens, tokens - 4)], -1) for x in (q, k))
    valid = torch.ones(1, tokens, dtype=torch.bool)
    out = Dense(dropout=0.25, executor=executor)(q, k, v, valid, 0)
    kept = out > 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / tokens / 0.75))
    assert not torch.equal(kept[0, 0], kept[0, 1])


def test_gradients_are_those_of_what_dropout_left():
    q = vectors(2, 4, 20, 8, dtype=torch.float64)[0]
    k, v = vectors(2, 2, 30, 8, dtype=torch.float64)[1:]
    pairs = Pairs(*(torch.ones(2, n, dtype=torch.bool) for n in (20, 30)))
    alpha = torch.tensor([1.5, 1.3, 2.0, 1.5], dtype=torch.float64)
    torch.autograd.gradcheck(lambda *x: native.attend(*x, pairs, alpha, 0.3, 7), (q, k, v))


def test_a_sentence_gets_the_same_alone_padded_on_either_side_and_among_others():
    q, k, v = (x.detach() for x in vectors(1, 2, 90, 16))
    alone = Dense()(q, k, v, torch.ones(1, 90, dtype=torch.bool), 0)
    for before, after in ((0, 60), (60, 0), (5, 55)):
        wide = [torch.full((2, 2, 150, 16), math.nan) for _ in range(3)]
        valid = torch.zeros(2, 150, dtype=torch.bool)
        valid[1, before : 150 - after] = valid[0] = True
        for x, y in zip(wide, (q, k, v), strict=True):
            x[0], x[1, :, before : 150 - after] = torch.randn(2, 150, 16), y[0]
        out = Dense()(*wide, valid, 0)
        torch.testing.assert_close(out[1, :, before : 150 - after], alone[0], atol=1e-6, rtol=1e-6)
        assert bool((out[1][:, ~valid[1]] == 0).all())


def test_the_number_of_threads_changes_nothing():
    inputs, valid = vectors(1, 3, 300, 16), torch.ones(1, 300, dtype=torch.bool)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = Dense()(*inputs, valid, 0)
            found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_is_not_hidden(where):
    inputs = dict(zip("qkv", (x.detach() for x in vectors(1, 1, 60, 8)), strict=True))
    inputs[where][0, 0, 5, 2] = math.nan
    valid = torch.ones(1, 60, dtype=torch.bool)
    ours, reference = (each(*inputs.values(), valid, 0) for each in (Dense(executor="native"), Masked(Full())))
    # a NaN among the values times a probability of zero is NaN in a product of matrices; here it is never read
    if where != "v":
        assert torch.equal(ours.isnan(), reference.isnan())
    else:
        assert bool(ours.isnan().any())


def test_memory_is_linear():
    """Tiles hold no more scores than they were allowed, however long the text is."""
    seen = []

    def normalizer(scores: Tensor) -> Tensor:
        seen.append(scores.numel())
        return entmax15(scores)

    q, k, v = vectors(1, 2, 400, 8)
    out = dense_tiles.attend(
        q, k, v, lambda start, end: torch.ones(1, 1, 1, 400, dtype=torch.bool), normalizer, 0.0, 8000
    )
    out.sum().backward()
    assert max(seen) <= 8000
    torch.testing.assert_close(out, Masked(Full())(q, k, v, torch.ones(1, 400, dtype=torch.bool), 0))


def test_second_derivatives_are_refused_and_not_wrong():
    q, k, v = vectors(1, 1, 20, 4, dtype=torch.float64)
    out = Dense(executor="native")(q, k, v, torch.ones(1, 20, dtype=torch.bool), 0)
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_graph_and_pairs():
    q, k, _ = (x.detach() for x in vectors(2, 2, 30, 4))
    qk = QK(q, k, some_padding(2, 30), causal=True)
    dense = Dense(window=5, causal=True)
    expected = (band(30, 5) & qk.allowed).expand(2, 2, 30, 30)
    assert torch.equal(dense.graph(qk, 0), expected)
    assert torch.equal(dense.computed_pairs(qk, 0), expected.sum((-2, -1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "fast"}, "executor=fast is unknown"),
        ({"window": 4}, "window must be odd"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Dense(**settings)


def test_shapes_that_do_not_belong_together_are_refused():
    q, k, v = vectors(1, 3, 20, 4)
    pairs = Pairs(*(torch.ones(1, 20, dtype=torch.bool) for _ in range(2)))
    with pytest.raises(ValueError, match="H a multiple of H_k"):
        native.attend(q, k[:, :2], v[:, :2], pairs, torch.full((3,), 1.5))
