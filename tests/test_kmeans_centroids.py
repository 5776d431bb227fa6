"""Centroids: as good as scikit-learn's own, deterministic, and clear errors for files that do not fit (trap 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ScikitKMeans

from sparsefinder.errors import UserError
from sparsefinder.kmeans_centroids import ClusterSettings
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.predictors.centroids import Centroids, load_centroids
from sparsefinder.predictors.fit_centroids import _drawn, _points, fit_centroids
from sparsefinder.predictors.projections import Projections, load_projections
from sparsefinder.storage.samples import Samples, load_samples
from tests.conftest import GRAPH, random_qk


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_samples(GRAPH / "golden_enc-attn.pt")


@pytest.fixture(scope="module")
def projections() -> Projections:
    return load_projections(GRAPH / "golden_projections.pickle")


def points(samples: Samples, projections: Projections, layer: int, head: int) -> np.ndarray:
    projected = [projections(samples.layer(index, layer), layer) for index in range(len(samples))]
    return torch.cat([x[0, head] for p in projected for x in (p.q, p.k)]).numpy()


def test_one_scikit_kmeans_per_layer_head_and_run(samples: Samples, projections: Projections) -> None:
    centroids = fit_centroids(samples, projections, ClusterSettings(n_clusters=6, runs=2, seed=3))
    assert [layer.shape for layer in centroids.layers] == [(3, 2, 6, 4)] * 2
    for layer in range(2):
        for head in range(3):
            x = points(samples, projections, layer, head)
            for run, init in enumerate(("k-means++", "random")):
                expected = ScikitKMeans(6, init=init, n_init=1, random_state=3 + run).fit(x).inertia_
                distances = ((x[:, None] - centroids.layers[layer][head, run].numpy()) ** 2).sum(-1)
                assert distances.min(-1).sum() == pytest.approx(expected, rel=1e-4)


def test_the_same_with_any_number_of_jobs(samples: Samples, projections: Projections) -> None:
    one, two = (fit_centroids(samples, projections, ClusterSettings(n_clusters=5, jobs=jobs)) for jobs in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.layers, two.layers, strict=True))


def test_blocks_are_clustered_as_chunks(samples: Samples, projections: Projections) -> None:
    centroids = fit_centroids(samples, projections, ClusterSettings(n_clusters=3, block_size=4))
    assert centroids.layers[0].shape == (3, 1, 3, 16)


def test_writes_what_it_reads(tmp_path: Path) -> None:
    Centroids([torch.randn(2, 1, 4, 3)]).save(tmp_path / "c.pickle")
    assert load_centroids(tmp_path / "c.pickle").clusters == 4


def test_too_few_points(samples: Samples, projections: Projections) -> None:
    with pytest.raises(UserError, match="only 48 projected"):
        fit_centroids(samples.part(0, 1), projections, ClusterSettings(n_clusters=100))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "list over layers"),
        ([torch.zeros(2, 3)], "layer 0 must be"),
        ([torch.full((1, 1, 2, 3), torch.nan)], "NaN"),
        ([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 3)], "layer 1 has"),
    ],
)
def test_wrong_files(value: object, message: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "c.pickle")
    with pytest.raises(UserError, match=message):
        load_centroids(tmp_path / "c.pickle")


def test_centroids_of_another_space_are_refused() -> None:
    pattern = KMeans(1, Centroids([torch.zeros(2, 1, 4, 3)], "mine"))
    with pytest.raises(UserError, match="size R=3, the projected queries have 2 heads and size R=8"):
        pattern(random_qk([5]), 0)
    with pytest.raises(UserError, match="has 4 clusters"):
        KMeans(5, Centroids([torch.zeros(2, 1, 4, 3)], "mine"))
    with pytest.raises(UserError, match="stage=cluster"):
        KMeans(1)(random_qk([5]), 0)


@pytest.mark.parametrize("most", [7, 100, 461, 462, 10_000])
def test_no_more_points_than_asked_for(most: int, samples: Samples, projections: Projections) -> None:
    """Every sample gives its share; with room for all, the points and so the centroids are the same."""
    settings = ClusterSettings(n_clusters=3, max_points=most)
    found = _points(samples, projections, 1, settings)
    everything = np.stack([points(samples, projections, 1, head) for head in range(3)])
    assert found.shape == (3, min(most, 462), 4)
    if most >= 462:
        np.testing.assert_array_equal(found, everything)
    else:
        known = {tuple(row) for row in everything[0]}
        rows = [tuple(row) for row in found[0]]
        assert set(rows) <= known
        assert len(set(rows)) == most
        assert np.array_equal(found, _points(samples, projections, 1, settings))
        first = {tuple(row) for row in points(samples.part(0, 1), projections, 1, 0)}
        assert abs(sum(row in first for row in rows) - most * 48 / 462) <= 1


def test_no_sample_of_one_seed_is_drawn_like_one_of_another() -> None:
    assert torch.equal(_drawn(99, 20, 1, 0), _drawn(99, 20, 1, 0))
    assert not torch.equal(_drawn(99, 20, 1, 0), _drawn(99, 20, 0, 1))


def test_more_clusters_than_points_are_drawn() -> None:
    with pytest.raises(UserError, match="max_points=3 is less than n_clusters=4"):
        ClusterSettings(n_clusters=4, max_points=3)
