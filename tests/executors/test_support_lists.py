"""The support of dense entmax attention as lists, by C++ and by tiles, against the matrix of probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefinder.executors.blocks import dense_tiles
from sparsefinder.executors.native.dense import NativeDenseExecutor
from sparsefinder.executors.support_lists import Support, support
from sparsefinder.graphs import QK
from sparsefinder.metrics import Gold
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.predictors.gold_pairs import gold_pairs
from tests.conftest import random_qk


@pytest.fixture(params=["in C++", "in tiles"])
def executed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, tiles of a few queries."""
    if request.param == "in tiles":
        monkeypatch.setattr(NativeDenseExecutor, "why_not", lambda *_: "of this test")
        monkeypatch.setattr(dense_tiles.support, "__defaults__", (100,))


def in_tiles(qk: QK, alpha: float) -> Support:
    allowed = qk.allowed
    return Support(*dense_tiles.support(qk.q, qk.k, lambda i, j: allowed[:, :, i:j], Normalizer(alpha), 150))


@pytest.mark.parametrize("way", [support, in_tiles], ids=["in C++", "in tiles"])
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from([0.1, 1.0, 6.0]),  # nearly all, some, and few keys are positive
    st.sampled_from([1.0, 1.05, 1.3, 1.5, 2.0]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_against_the_probabilities_of_whole_rows(way, seed, tokens, size, scale, alpha, causal, dtype):
    """Pairs within rounding of the threshold may be either."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 2, tokens, size, dtype=dtype, generator=generator) * scale for _ in range(2))
    valid = torch.rand(2, tokens, generator=generator) < 0.8
    found = way(QK(q, k, valid, causal), alpha)
    assert torch.equal(found.counts.flatten(), torch.bincount(found.rows, minlength=4 * tokens))
    places = found.rows * tokens + found.keys
    assert torch.equal(places, places.unique()), "sorted, each once"
    exact = Normalizer(alpha)(QK(q.double(), k.double(), valid, causal).scores()).flatten(0, 2)
    dense = torch.zeros_like(exact)
    dense[found.rows, found.keys] = found.probabilities.double()
    torch.testing.assert_close(dense, exact, atol=1e-4 if dtype == torch.float32 else 1e-9, rtol=0)
    peak = exact.amax(-1, keepdim=True)
    sure = (exact == 0) | (exact > (1e-4 * (alpha - 1)) ** (1 / max(alpha - 1, 1e-2)) + 1e-30)
    assert torch.equal((dense > 0) & sure & (peak > 0), (exact > 1e-30) & sure)


@pytest.mark.usefixtures("executed")
def test_of_what_is_no_number():
    """A row that meets a NaN has no support, as in torch; no tokens have none."""
    q, k = (torch.randn(1, 1, 40, 3, generator=torch.Generator().manual_seed(n)) for n in range(2))
    k[0, 0, 30] = math.nan
    valid = torch.ones(1, 40, dtype=torch.bool)
    assert support(QK(q, k, valid), 1.5).counts.sum() == 0
    counts = support(QK(q, k, valid, causal=True), 1.5).counts[0, 0]
    assert (counts[:30] > 0).all()
    assert (counts[30:] == 0).all()
    assert support(QK(q[:, :, :0], k[:, :, :0], valid[:, :0]), 1.5).keys.shape == (0,)


@pytest.mark.usefixtures("executed")
@pytest.mark.parametrize("causal", [False, True])
def test_gold_is_that_of_the_matrix(causal: bool) -> None:
    qk = random_qk([5, 9, 7], heads=2, causal=causal)
    found, expected = Gold.of(qk, 1.5), Gold.of_matrix(Normalizer(1.5)(qk.scores()))
    assert found.shape == expected.shape
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.mass, expected.mass, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("executed")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 3])
def test_both_directions_and_blocks_of_pairs(causal: bool, block: int) -> None:
    qk = random_qk([11], heads=2, causal=causal)
    graph = (Normalizer(1.5)(qk.scores()) > 0)[0]
    allowed, blocks = qk.allowed[0, 0], -(-11 // block)
    expected = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    may = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(11):
        for j in range(11):
            expected[:, i // block, j // block] |= graph[:, i, j]
            may[i // block, j // block] |= allowed[i, j]
    expected = (expected | expected.mT) & may
    pairs = gold_pairs(qk, 1.5, block, symmetric=True)
    rows, columns = expected.flatten(0, 1).nonzero(as_tuple=True)
    assert torch.equal(pairs.rows, rows)
    assert torch.equal(pairs.columns, columns)
    assert torch.equal(pairs.zeros, may.sum(-1).repeat(2) - expected.flatten(0, 1).sum(-1))
