"""Clusters that are taken where their entry is too coarse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.graphs import QK, ChosenBuckets
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.refined import Refined
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import LayerProjections, Linear, Projections
from tests.test_attention import with_gradients

HEADS, TOKENS, SIZE = 2, 60, 6


def made(level: float, alpha: float = 1.0) -> tuple[Refined, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, TOKENS, SIZE, generator=generator, dtype=torch.float64) * 2 for _ in range(3))
    torch.manual_seed(0)
    space = Projections([LayerProjections(Linear(HEADS, SIZE, 4), Linear(HEADS, SIZE, 4)).requires_grad_(False)])
    centres = space.keys(QK(q, k, torch.ones(2, TOKENS, dtype=torch.bool)), 0)[0, :, :7, None].transpose(1, 2)
    return Refined(level, alpha, lowrank=space, key_centroids=Centroids([centres.float()])), [q, k, v]


VALID = torch.arange(TOKENS)[None] < torch.tensor([[60], [41]])


def test_a_query_takes_what_its_entries_say() -> None:
    """By the definition, one query and cluster at a time."""
    pattern, (q, k, _) = made(1.5)
    qk = QK(q, k, VALID)
    layout = pattern.layout(qk, 0)
    members = layout.buckets.k_ids[..., 0]
    taken = 0
    for b, h, i in [(0, 0, 0), (0, 1, 7), (1, 0, 40), (1, 1, 3)]:
        own = {}
        for c in range(7):
            keys = k[b, h, (members[b, h] == c) & VALID[b]]
            if len(keys):
                mean = (q[b, h, i] @ keys.mean(0)) / SIZE**0.5
                spread = ((q[b, h, i] ** 2 * keys.var(0, correction=0)).sum() / SIZE) ** 0.5
                own[c] = (len(keys), spread, len(keys) * mean.exp() * spread.cosh())
        total = sum(weight for _, _, weight in own.values())
        expected = {c for c, (n, s, weight) in own.items() if weight / total * s / n > 1.5 / VALID[b].sum()}
        found = {c for c in layout.buckets.q_ids[b, h, i].tolist() if c >= 0}
        assert found == expected
        taken += len(found)
    assert 0 < taken < 4 * 7


@pytest.mark.parametrize("causal", [False, True])
def test_cplusplus_chooses_as_torch_does(causal: bool) -> None:
    # entries may be weighed by another normalizer than that of the attention: then C++ is told what was chosen
    for level, alpha, other in ((0.0, 1.0, 1.0), (1.5, 1.0, 1.0), (1e9, 1.0, 1.0), (1.5, 1.5, 1.0), (1.5, 1.5, 1.5)):
        pattern, inputs = made(level, alpha)
        expected = with_gradients(Masked(pattern, Normalizer(other), causal), inputs, VALID)
        for executor in ("auto", "blocks"):
            run = Bucketed(pattern, Normalizer(other), causal, executor)
            for mine, theirs in zip(with_gradients(run, inputs, VALID), expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_clusters_grow_with_long_texts() -> None:
    """As many as their keys, 32 each, up to 4,096 tokens; beyond, eight times the tokens have four times the clusters."""
    pattern, _ = made(1.5)
    clusters = [pattern._fitting(tokens) for tokens in (1024, 4096, 8 * 4096)]
    torch.testing.assert_close(clusters, [32.0, 128.0, 512.0])


def test_the_levels_of_heads_and_who_asks_for_ids() -> None:
    pattern, (q, k, v) = made(1.5)
    qk = QK(q, k, VALID)
    layout = pattern.layout_of_heads(qk, 0, [0.0, 1e9])
    assert isinstance(layout.buckets, ChosenBuckets)
    assert (layout.buckets.q_ids[:, 1] < 0).all()
    assert (layout.buckets.q_ids[:, 0] >= 0).any()
    assert pattern(qk, 0)[:, 1].sum() > 0
    causal = Bucketed(pattern, Normalizer(1.5), causal=True)(q, k, v, VALID, 0)
    torch.testing.assert_close(causal, Masked(pattern, Normalizer(1.5), causal=True)(q, k, v, VALID, 0))
