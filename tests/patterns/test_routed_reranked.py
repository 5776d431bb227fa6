"""Reranking the keys of routed clusters, against a loop over queries and keys."""

from __future__ import annotations

import math

import pytest
import torch

from sparsefinder.errors import UserError
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.bilinear import Bilinear
from sparsefinder.patterns.routed_reranked import RoutedReranked
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.testing import random_cross, random_qk

HEADS, CLUSTERS, SIZE = 2, 5, 4


def centroids() -> Centroids:
    return Centroids([torch.randn(HEADS, 1, CLUSTERS, SIZE, generator=torch.Generator().manual_seed(3))])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("level", "share"), [(0.1, 0.4), (-0.2, 0.7)])
def test_pair_by_pair(level: float, share: float, causal: bool) -> None:
    tokens = 14
    qk = random_qk([tokens], HEADS, SIZE, causal)
    pattern = RoutedReranked(level, share, bilinear_centroids=centroids())
    graph = pattern(qk, 0)[0]
    for head in range(HEADS):
        q, k, centres = qk.q[0, head], qk.k[0, head], centroids().layers[0][head, 0]
        own = [int((key - centres).square().sum(-1).argmin()) for key in k]
        for i in range(tokens):
            seen = [j for j in range(tokens) if j <= i or not causal]
            members = {c: [j for j in seen if own[j] == c] for c in range(CLUSTERS)}
            means = {c: centres[c] if causal else k[js].mean(0) for c, js in members.items() if js}
            candidates, held = [], 0
            for c in sorted(means, key=lambda c: -float(q[i] @ means[c])):
                if candidates and held + len(members[c]) / 2 > share * len(seen):
                    break
                candidates += members[c]
                held += len(members[c])
            scores = k[candidates] @ q[i] / math.sqrt(SIZE)
            probabilities = Normalizer(1.5)(scores)
            tau = float(scores.max() / 2 - probabilities.max().sqrt())
            taken = {j for j, score in zip(candidates, scores.tolist(), strict=True) if score / 2 >= tau - level}
            assert set(graph[head, i].nonzero().flatten().tolist()) == taken, (head, i)


def test_with_every_key_a_candidate_it_is_bilinear() -> None:
    """Which compares every pair."""
    for qk in (random_qk([9, 6], HEADS, SIZE), random_cross((5, 3), (7, 4), HEADS, SIZE)):
        assert torch.equal(RoutedReranked(0.1, 1.0, bilinear_centroids=centroids())(qk, 0), Bilinear(level=0.1)(qk, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"share": 0.0}, "share"), ({"alpha": 1.0}, "alpha"), ({"keys_per_cluster": 0.0}, "keys_per_cluster")],
)
def test_bad_settings(given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RoutedReranked(**given)


def test_it_needs_clusters() -> None:
    with pytest.raises(UserError, match="stage=bilinear"):
        RoutedReranked()(random_qk([4], HEADS, SIZE), 0)
