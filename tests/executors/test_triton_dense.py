"""Dense entmax attention in Triton, interpreted on the CPU, against the definition: `Masked` of every pair."""

from __future__ import annotations

import importlib.util
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Dense, Masked
from sparsefinder.errors import UserError
from sparsefinder.executors.triton.dense import TritonDenseExecutor
from sparsefinder.executors.workload import Pairs, Work
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.window import Window
from tests.executors.test_dense import assert_same, some_padding, vectors

Triton = partial(Dense, executor="triton")
kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'sparsefinder[gpu]'"
)
TOKENS = 70  # one block of 64 and a few more
REAL = torch.ones(1, TOKENS, dtype=torch.bool)


@kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_equals_the_definition(alpha: float, causal: bool) -> None:
    inputs, valid = vectors(2, 1, TOKENS, 17, peaked=2.5), some_padding(2, TOKENS)
    ours = Triton(Normalizer(alpha), causal)(*inputs, valid, 0)
    assert_same(ours, Masked(Full(), Normalizer(alpha), causal)(*inputs, valid, 0), inputs)


@kernels
def test_padding_anywhere_is_nowhere() -> None:
    inputs = vectors(2, 1, TOKENS, 8)
    valid = some_padding(3, TOKENS)[1:]  # holes, and nothing but padding
    ours = Triton()(*inputs, valid, 0)
    assert not ours[1].any()
    assert_same(ours, Masked(Full())(*inputs, valid, 0), inputs)
    poisoned = [x.detach().masked_fill(~valid[:, None, :, None], math.nan) for x in inputs]
    assert torch.equal(Triton()(*poisoned, valid, 0), ours)


@kernels
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_a_band(causal: bool) -> None:
    inputs, valid = vectors(2, 1, 2 * TOKENS, 8), some_padding(2, 2 * TOKENS)
    ours = Triton(causal=causal, window=21)(*inputs, valid, 0)
    assert_same(ours, Masked(Window(21), causal=causal)(*inputs, valid, 0), inputs)


@kernels
def test_grouped_heads_an_alpha_of_their_own_and_sides_of_two_lengths() -> None:
    q = vectors(2, 4, 20, 8)[0]
    k, v = vectors(2, 2, 37, 8, seed=3)[1:]
    alpha = torch.tensor([1.2, 1.5, 1.9, 2.0])
    valid = some_padding(2, 37)
    valid[1, ::2] = True
    pairs = Pairs(torch.ones(2, 20, dtype=torch.bool), valid, back=9)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ keys.mT / math.sqrt(8)).masked_fill(~pairs.allowed(0, 20), -math.inf)
    ours = TritonDenseExecutor(block=16).attend(q, k, v, pairs, PerHead(alpha), 0.0)
    assert_same(ours, PerHead(alpha)(scores) @ values, [q, k, v])


@kernels
def test_half_precision_has_float32_scores() -> None:
    dtype = torch.float16
    inputs = [x.detach().to(dtype).requires_grad_() for x in vectors(1, 1, TOKENS, 16)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    ours, reference = Triton()(*inputs, REAL, 0), Masked(Full())(*exact, REAL, 0)
    assert ours.dtype == dtype
    last = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.float(), reference, atol=last, rtol=last)
    got, expected = torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(reference.sum(), exact)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs, atol=4 * last, rtol=4 * last)


@kernels
@pytest.mark.parametrize("peaked", [0.0, 1e-3, 100.0])
def test_flat_and_peaked_rows(peaked: float) -> None:
    """The steps go on until the threshold stays, whatever the row."""
    q, k, v = (x.detach() for x in vectors(1, 1, TOKENS, 64, peaked=peaked))
    k[:, :, 1::5] = 0.0
    exact = Masked(Full())(q.double(), k.double(), v.double(), REAL, 0)
    rounding = 1e-6 * max(1.0, peaked)  # that of scores up to four times `peaked`
    torch.testing.assert_close(Triton()(q, k, v, REAL, 0).double(), exact, atol=rounding, rtol=rounding)


@kernels
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_is_not_hidden(where: str) -> None:
    inputs = dict(zip("qkv", (x.detach() for x in vectors(1, 1, 20, 8)), strict=True))
    inputs[where][0, 0, 5, 2] = math.nan
    out = Triton()(*inputs.values(), REAL[:, :20], 0)
    assert bool(out[0, 0, 5].isnan().all()) if where == "q" else bool(out.isnan().any())


@kernels
def test_second_derivatives_are_refused_and_not_wrong() -> None:
    q, k, v = vectors(1, 1, 5, 4)
    (slope,) = torch.autograd.grad(Triton()(q, k, v, REAL[:, :5], 0).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# ---- refusals and the choice ----


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    q, k, v = vectors(1, 3, 20, 4)
    with pytest.raises(ValueError, match="H a multiple of H_k"):
        TritonDenseExecutor().attend(q, k[:, :2], v[:, :2], Pairs(REAL[:, :20], REAL[:, :20]), Normalizer(1.5), 0.0)


def refusal(attention: Dense, *inputs: Tensor, mask: Tensor | None = None) -> str:
    with pytest.raises(UserError) as error:
        attention.attend(*inputs, mask)
    assert "\n" not in str(error.value)
    return str(error.value)


@kernels
def test_what_the_kernels_do_not_do_is_refused() -> None:
    q, k, v = (x.detach() for x in vectors(1, 2, 5, 4))
    assert "triton: has no masks but" in refusal(Triton(), q, k, v, mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert "triton: has no dropout" in refusal(Triton(dropout=0.1), q, k, v)
    learned = PerHead(torch.tensor([1.2, 1.5], requires_grad=True))
    assert "triton: has no gradient for alpha" in refusal(Triton(learned), q, k, v)
    with torch.no_grad():
        assert Triton(learned).attend(q, k, v).isfinite().all()
    assert "triton: needs queries, keys and values of one precision" in refusal(
        Triton(), q.double(), k.double(), v.double()
    )
    if not torch.cuda.is_available():
        assert "does not multiply bfloat16" in refusal(Triton(), q.bfloat16(), k.bfloat16(), v.bfloat16())
    with pytest.raises(UserError, match="block must be a power of two"):
        TritonDenseExecutor(block=48)


@kernels
def test_a_machine_without_a_gpu_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match="executor=triton: needs a GPU with CUDA, and torch sees none, or choose executor="
    ):
        Triton()


@kernels
def test_it_works_on_a_gpu_but_auto_leaves_it_until_it_was_measured_there() -> None:
    on_gpu = Work(torch.device("cuda"), (torch.float32,) * 3)
    assert not TritonDenseExecutor().why_not(on_gpu)
    assert "triton: only where it is asked for" in Dense().explain(torch.zeros(1, 1, 4, 2))
