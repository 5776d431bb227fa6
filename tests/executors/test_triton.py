"""Block-sparse attention: its plan against the graph, and its kernels, interpreted on the CPU, against masked attention."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.errors import UserError
from sparsefinder.executors.triton.plan import Plan, Side, plan
from sparsefinder.graphs import QK, Buckets
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.full import Full
from tests.test_attention import (
    ALPHAS,
    LAYOUTS,
    TOKENS,
    Fixed,
    assert_same,
    nearest,
    positions,
    right_padded,
    rounds,
    routed,
    same_buckets,
    vectors,
    with_gradients,
)

Triton = partial(Bucketed, executor="triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
kernels = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install 'sparsefinder[gpu]'")


# ---- the plan ----


def counted(side: Side, other: Side, ids: Tensor, other_ids: Tensor, causal_sign: int) -> Tensor:
    """How often each pair of flat tokens counts, walking the blocks of one side as the kernels do: ``(M, M)``."""
    total = torch.zeros(len(side.positions), len(side.positions), dtype=torch.int64)
    for start, count, first, number, limit, reach in side.blocks.tolist():
        mine, theirs = side.order[start : start + count].long(), other.order[first : first + number].long()
        mine, theirs = mine[mine >= 0], theirs[theirs >= 0]
        distance = theirs[None, :] - mine[:, None]
        counts = distance.abs() <= reach
        if causal_sign:
            counts &= distance * causal_sign <= 0
        for a in ids[mine].unbind(1):
            for b in other_ids[theirs].unbind(1):
                counts &= ~((a[:, None] == b[None, :]) & (a >= 0)[:, None] & (a < limit)[:, None])
        total[mine[:, None], theirs[None, :]] += counts.long()
    return total


def block_diagonal(graph: Tensor) -> Tensor:
    """``(B, H, N, N)`` → ``(M, M)``."""
    return torch.block_diag(*graph.flatten(0, 1).long())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pair_of_the_graph_is_in_exactly_one_block(name: str, causal: bool) -> None:
    q, k, _ = vectors(2, 2, TOKENS)
    holes = right_padded([75, 50], TOKENS) & (torch.arange(TOKENS) % 7 != 3)
    for valid in (right_padded([75, 50], TOKENS), holes):
        qk = QK(q, k, valid, causal)
        made = plan(LAYOUTS[name].layout(qk, 0), qk, 16)
        graph = block_diagonal(LAYOUTS[name](qk, 0))
        assert torch.equal(counted(made.q, made.k, made.q_ids, made.k_ids, int(causal)), graph)
        # by key the smaller id of a common bucket is the same id
        assert torch.equal(counted(made.k, made.q, made.k_ids, made.q_ids, -int(causal)), graph.T)
        assert (made.pairs >= LAYOUTS[name](qk, 0).sum((-1, -2))).all()


def test_positions_are_where_tokens_are_listed() -> None:
    q, k, _ = vectors(2, 2, TOKENS)
    qk = QK(q, k, right_padded([75, 50], TOKENS))
    made = plan(LAYOUTS["clusters, window, globals"].layout(qk, 0), qk, 16)
    for side in (made.q, made.k):
        listed = [[] for _ in side.positions]
        for position, token in enumerate(side.order.tolist()):
            if token >= 0:
                listed[token].append(position)
        assert listed == [sorted(p for p in row if p >= 0) for row in side.positions.tolist()]


def test_blocks_are_linear_in_tokens() -> None:
    def size(tokens: int) -> tuple[int, int]:
        ids = (torch.arange(tokens) // 64).tolist()
        qk = QK(*vectors(1, 1, tokens)[:2], torch.ones(1, tokens, dtype=torch.bool))
        pattern = Fixed(same_buckets(ids, ids, tokens // 64), 11, positions(tokens, [0]))
        made: Plan = plan(pattern.layout(qk, 0), qk, 64)
        return int(made.pairs), sum(x.numel() for s in (made.q, made.k) for x in (s.order, s.positions, s.blocks))

    (pairs, memory), (more_pairs, more_memory) = size(1024), size(8192)
    assert more_pairs <= 8.5 * pairs
    assert more_memory <= 8.5 * memory


# ---- refusals ----


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wanted = (
        r"executor=triton: needs a GPU with CUDA, the queries are on cpu, or choose executor=native or executor=blocks"
    )
    with pytest.raises(UserError, match=wanted):
        Triton(Fixed())(*vectors(1, 1, 5), torch.ones(1, 5) > 0, 0)


@kernels
def test_precisions_that_the_kernels_do_not_multiply_are_refused() -> None:
    q, k, v = vectors(1, 1, 5)
    for wrong in ((q.double(), k.double(), v.double()), (q, k, v.half())):
        with pytest.raises(UserError, match="executor=triton: needs queries, keys and values of one precision"):
            Triton(Fixed())(*wrong, torch.ones(1, 5) > 0, 0)


def test_without_triton_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"executor=triton: needs triton, which is not installed: pip install"):
        Triton(Fixed())


@pytest.mark.parametrize("make", [lambda: Triton(Full()), lambda: Triton(Fixed(), block=48)])
def test_what_cannot_run_is_refused_at_once(make: Any) -> None:
    with pytest.raises(UserError):
        make()


# ---- the kernels ----

SMALL = 37
GLOBALS = positions(SMALL, [0, 20], [])
CASES = {
    "one bucket each": Fixed(rounds(2, 1, SMALL, 1, 3)),
    "rounds, window, globals": Fixed(rounds(2, 1, SMALL, 2, 2), 5, GLOBALS),
    "clusters": Fixed(nearest(2, 1, SMALL, 2, 5)),
    "queries in several buckets, keys in one": Fixed(routed(2, 1, SMALL, 2, 5), 3),
    "window beyond the text": Fixed(window=99),
    "nothing": Fixed(),
}


def run(attention: Any, inputs: list[Tensor], valid: Tensor) -> list[Tensor]:
    pytest.importorskip("triton")
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(), "see conftest.py"
    return with_gradients(attention, inputs, valid)


@kernels
@pytest.mark.parametrize("name", CASES)
def test_block_sparse_is_masked(name: str) -> None:
    inputs, valid = vectors(2, 1, SMALL), right_padded([37, 21], SMALL)
    expected = with_gradients(Masked(CASES[name]), inputs, valid)
    assert_same(run(Triton(CASES[name], block=16), inputs, valid), expected, 2e-5)


@kernels
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_alpha_causal(alpha: float) -> None:
    inputs, valid = vectors(1, 1, SMALL, size=20), right_padded([33], SMALL)
    pattern = Fixed(nearest(1, 1, SMALL, 2, 5), 5, GLOBALS[:1])
    expected = with_gradients(Masked(pattern, Normalizer(alpha), causal=True), inputs, valid)
    found = run(Triton(pattern, Normalizer(alpha), causal=True, block=16), inputs, valid)
    assert_same(found, expected, 2e-5)


@kernels
def test_no_key_gives_zeros_and_padding_never_matters() -> None:
    inputs, valid = vectors(1, 1, 6), right_padded([4], 6)
    for x in inputs:
        x[:, :, 4:] = float("nan")
    alone = Fixed(same_buckets([0, 0, 0, 1, 0, 0], [0] * 6, 2))
    out, *gradients = run(Triton(alone, block=16), inputs, valid)
    assert not out[0, 0, 3:].any()
    assert out[0, 0, :3].all()
    assert all(gradient.isfinite().all() and not gradient[:, :, 4:].any() for gradient in gradients)


@kernels
def test_half_precision() -> None:
    inputs, valid = [x.half() for x in vectors(1, 1, SMALL)], right_padded([37], SMALL)
    pattern = Fixed(rounds(1, 1, SMALL, 1, 2), 3)
    found = run(Triton(pattern, block=16), inputs, valid)
    assert {x.dtype for x in found} == {torch.float16}
    expected = with_gradients(Masked(pattern), [x.float() for x in inputs], valid)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), reference, rtol=5e-3, atol=5e-3 * reference.abs().max().item())


@kernels
def test_few_sweeps_are_enough() -> None:
    pytest.importorskip("triton")
    from sparsefinder.executors.triton.block_sparse import Walk

    q, k, _ = vectors(1, 1, 100)
    ids = [0] * 100
    qk = QK(q, k, torch.ones(1, 100, dtype=torch.bool))
    made = plan(Fixed(same_buckets(ids, ids, 1)).layout(qk, 0), qk, 32)
    peaks, thresholds, sweeps = Walk(made, 1.5, 32, q.shape[-1]).thresholds(q, k)
    assert sweeps <= 7, "the maximum, at most five steps of Newton, and one that does not move"
    excess = (qk.scores()[0, 0] / 2 - peaks[:, None] / 2 - thresholds[:, None]).clamp_min(0)
    # scores up to four are rounded by some 2e-7 in another order here than there, and a sum of squares twice that for each term
    torch.testing.assert_close((excess**2).sum(-1), torch.ones(100), rtol=0, atol=4e-6)


def test_buckets_with_no_slot_have_no_block() -> None:
    q, k, _ = vectors(1, 1, 5)
    empty = Buckets(*(torch.zeros(1, 1, 5, 0, dtype=torch.int64),) * 2, 1)
    qk = QK(q, k, torch.ones(1, 5, dtype=torch.bool))
    assert not len(plan(Fixed(empty).layout(qk, 0), qk, 16).q.blocks)
