"""The selectors of others, pair by pair: pages, antidiagonals, top-p after a selector, learned codes, multipoles."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.hashattention import HashAttention
from sparsefinder.patterns.multipole import Multipole
from sparsefinder.patterns.oracle_topp import OracleTopP
from sparsefinder.patterns.pages import Pages
from sparsefinder.patterns.support.kmeans_per_sentence import first_centres, lloyd
from sparsefinder.patterns.twilight import Twilight, pruned
from sparsefinder.patterns.xattention import XAttention
from sparsefinder.testing import random_qk


def threshold(means: list[float], deviations: list[float], numbers: list[int], alpha: float) -> float:
    """By quadrature and bisection."""
    power = 1 / (alpha - 1)

    def total(tau: float) -> float:
        def mass(m: float, s: float) -> float:
            if s < 1e-9:
                return max((alpha - 1) * m - tau, 0.0) ** power
            low = max(tau / (alpha - 1), m - 12 * s)
            if low >= m + 12 * s:
                return 0.0
            density = NormalDist(m, s).pdf
            return float(integrate.quad(lambda z: ((alpha - 1) * z - tau) ** power * density(z), low, m + 12 * s)[0])

        return sum(n * mass(m, s) for m, s, n in zip(means, deviations, numbers, strict=True)) - 1

    return float(optimize.brentq(total, -60, 60, xtol=1e-10))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("alpha", "level"), [(1.5, 0.1), (2.0, -0.2)])
def test_pages_by_quadrature(alpha: float, level: float, causal: bool) -> None:
    tokens, size, quantile = 10, 3, 0.8
    qk = random_qk([tokens], 1, 6, causal)
    graph = Pages(level, size, quantile, alpha)(qk, 0)[0, 0]
    q, k = qk.q[0, 0].double(), qk.k[0, 0].double()
    for i in range(tokens):
        seen = range(i + 1) if causal else range(tokens)
        pages = {j // size: [other for other in seen if other // size == j // size] for j in seen}
        means, deviations = {}, {}
        for page, keys in pages.items():
            means[page] = float(q[i] @ k[keys].mean(0)) / math.sqrt(6)
            deviations[page] = float((q[i].square() @ k[keys].var(0, correction=0)).sqrt()) / math.sqrt(6)
        tau = threshold(list(means.values()), list(deviations.values()), [len(keys) for keys in pages.values()], alpha)
        for j in range(tokens):
            taken = False
            if j in seen:
                page = j // size
                above = NormalDist().inv_cdf(quantile ** (1 / len(pages[page])))
                best = (alpha - 1) * (means[page] + above * deviations[page])
                assert abs(best - tau + level) > 1e-5, "too near to tell"
                taken = best >= tau - level
            assert bool(graph[i, j]) == taken, (i, j)


def test_a_page_of_one_key_is_that_key() -> None:
    qk = random_qk([12], 2, 8)
    support = Normalizer(1.5)(qk.scores()) > 0
    assert torch.equal(Pages(1e-5, size=1)(qk, 0), support)


@pytest.mark.parametrize("causal", [False, True])
def test_antidiagonals_tile_by_tile(causal: bool) -> None:
    tokens, stride, tiles, p = 12, 2, 3, 0.6
    qk = random_qk([tokens], 1, 4, causal)
    graph = XAttention(p, stride, tiles)(qk, 0)[0, 0]
    q, k = qk.q[0, 0], qk.k[0, 0]
    count, blocks = tokens // stride, tokens // (stride * tiles)
    weights = torch.zeros(blocks, blocks)
    for a in range(count):
        score = torch.full((count,), -math.inf)
        for b in range(a + 1 if causal else count):
            products = [q[a * stride + stride - 1 - t] @ k[b * stride + t] for t in range(stride)]
            score[b] = sum(products) / stride / 2
        for b, weight in enumerate(score.softmax(-1)):
            weights[a // tiles, b // tiles] += weight
    for i in range(tokens):
        row = weights[i // (stride * tiles)]
        held, taken = 0.0, set()
        for block in row.argsort(descending=True).tolist():
            if held < p * float(row.sum()):
                taken.add(block)
            held += float(row[block])
        for j in range(tokens):
            assert bool(graph[i, j]) == (j // (stride * tiles) in taken and (j <= i or not causal)), (i, j)


@pytest.mark.parametrize("queries", [6, 7, 18])
def test_antidiagonals_of_two_texts(queries: int) -> None:
    """A block of queries chooses by itself: a part of a text, as queries of the whole, takes what it takes within it."""
    qk = random_qk([18, 18], 2, 8)
    some = QK(qk.q[:, :, :queries], qk.k, qk.valid, query_valid=qk.valid[:, :queries])
    whole = queries // 6 * 6
    assert torch.equal(XAttention(0.5, 2, 3)(some, 1)[:, :, :whole], XAttention(0.5, 2, 3)(qk, 1)[:, :, :whole])


def test_top_p_after_a_selector() -> None:
    qk = random_qk([14, 9], 2, 8)
    everything = Full()(qk, 0)
    assert torch.equal(pruned(everything, qk, 0.7, bits=24), OracleTopP(0.7)(qk, 0)), "of all keys at full precision"
    chosen = Twilight(1.0, share=0.5, size=2)
    assert torch.equal(chosen(qk, 0), chosen.selector()(qk, 0)), "all of what was selected"
    smaller = Twilight(0.5, share=0.5, size=2)(qk, 0)
    assert not (smaller & ~chosen(qk, 0)).any()
    assert 0 < smaller.sum() < chosen(qk, 0).sum()


def test_few_bits_round_each_key() -> None:
    """Two keys that one bit cannot tell apart are equally probable, so the earlier is taken."""
    q = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(3, 4)
    k = torch.tensor([[0.7, 0.0, 1.0, 0.0], [0.9, 0.0, 1.0, 0.0], [0.1, 0.0, 1.0, 0.0]])
    qk = QK(q[None, None], k[None, None], torch.ones(1, 3, dtype=torch.bool))
    everything = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert pruned(everything, qk, 0.3, bits=1)[0, 0].tolist() == [[True, False, False]] * 3
    assert pruned(everything, qk, 0.3, bits=8)[0, 0].tolist() == [[False, True, False]] * 3


@pytest.mark.parametrize("causal", [False, True])
def test_codes_bit_by_bit(causal: bool) -> None:
    qk = random_qk([11], 1, 5, causal)
    graph = HashAttention(0.3)(qk, 0)[0, 0]
    q, k = qk.q[0, 0], qk.k[0, 0]
    for i in range(11):
        seen = list(range(i + 1 if causal else 11))
        agreeing = [-sum(bool(a > 0) == bool(b > 0) for a, b in zip(q[i], k[j], strict=True)) for j in seen]
        order = sorted(seen, key=lambda j: (agreeing[j], j))
        taken = set(order[: math.ceil(0.3 * len(seen) - 1e-9)])
        assert {j for j in range(11) if graph[i, j]} == taken


def test_multipoles_cluster_by_cluster() -> None:
    pattern = Multipole(0.4, n_clusters=4, iterations=2, seed=3)
    qk = random_qk([13], 1, 6)
    layout = pattern.layout(qk, 1)
    assert layout.tail
    centres: Tensor = lloyd(qk.k, qk.valid, first_centres(qk.k, qk, 4, 3, 1), 2)[0, 0]
    near = torch.cdist(qk.k[0, 0], centres).argmin(-1).tolist()
    graph = layout.graph(qk)[0, 0]
    for i in range(13):
        held, taken = 0, set()
        for cluster in (qk.q[0, 0, i] @ centres.mT).argsort(descending=True).tolist():
            number = near.count(cluster)
            if number and (not taken or held + number / 2 <= 0.4 * 13):
                taken.add(cluster)
            held += number
        assert [bool(edge) for edge in graph[i]] == [cluster in taken for cluster in near], i
