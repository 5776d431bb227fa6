"""Online k-means: against a plain version, the same for a seed, better than its start, and its files, ours and published."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import TRAINING, make_learned
from torch import Tensor

from sparsefinder import online_centroids
from sparsefinder.errors import UserError
from sparsefinder.online_centroids import OnlineSettings, fit_online, moved, train_online
from sparsefinder.predictors.centroids import load_centroids
from sparsefinder.predictors.projections import load_projections


def directions(count: int, heads: int = 2, size: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(1, heads, 20 + i, size, generator=generator), dim=-1) for i in range(count)]


def plain_moved(centres: Tensor, points: Tensor, decay: float) -> Tensor:
    """One head: ``(C, R)`` after ``(M, R)``."""
    came: list[list[Tensor]] = [[] for _ in centres]
    for point in points:
        came[max(range(len(centres)), key=lambda c: float(centres[c] @ point))].append(point)
    new = []
    for centre, mine in zip(centres, came, strict=True):
        if mine:
            mean = torch.stack(mine).sum(0)
            centre = decay * centre + (1 - decay) * mean / mean.norm()
            centre = centre / centre.norm()
        new.append(centre)
    return torch.stack(new)


def test_a_sample_moves_centroids_as_the_plain_version_says() -> None:
    (points,) = directions(1)
    centres = directions(1, seed=5)[0][:, :, :6]
    centres[:, :, 5] = centres[:, :, 4]  # nothing comes to the second of equals
    found = moved(centres, points, 0.7)
    for head in range(2):
        assert torch.allclose(found[0, head], plain_moved(centres[0, head], points[0, head], 0.7), atol=1e-6)
    assert torch.equal(found[:, :, 5], centres[:, :, 5])


def test_a_seed_has_one_result_and_training_brings_centroids_nearer() -> None:
    points, settings = directions(6), OnlineSettings(n_clusters=4, decay=0.9, epochs=20, start_iterations=0)
    centres = train_online(points, settings)
    assert centres.shape == (2, 1, 4, 3)
    assert torch.allclose(centres.norm(dim=-1), torch.ones(2, 1, 4))
    assert torch.equal(centres, train_online(points, settings))
    assert not torch.equal(centres, train_online(points, replace(settings, seed=1)))
    assert not torch.equal(centres, train_online(points, settings, layer=1))

    def nearness(centres: Tensor) -> float:
        return (torch.cat(points, dim=2)[0] @ centres[:, 0].mT).amax(-1).mean().item()

    still = train_online(points, replace(settings, decay=1 - 1e-9))  # where it started
    assert nearness(centres) > nearness(still) + 0.02


def test_the_stage_reads_writes_and_refuses(tmp_path: Path) -> None:
    store = make_learned(tmp_path / "run")
    online_centroids.run(OnlineSettings(n_clusters=5, epochs=2), store)
    saved = load_centroids(tmp_path / "run" / "online_centroids.pickle")
    expected = fit_online(TRAINING, load_projections(store.path("projections")), OnlineSettings(n_clusters=5, epochs=2))
    assert [tuple(layer.shape) for layer in saved.layers] == [(2, 1, 5, 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(saved.layers, expected.layers, strict=True))
    with pytest.raises(UserError, match="n_clusters=9999, but there are only"):
        online_centroids.run(OnlineSettings(n_clusters=9999), store)


def test_files_of_the_published_routing_code_are_read(tmp_path: Path) -> None:
    means = torch.randn(2, 4, 3)
    states = [OrderedDict({"kmeans.means": means + layer, "kmeans.initted": torch.tensor(True)}) for layer in range(2)]
    torch.save(states, tmp_path / "routing_all_km.pt")
    centroids = load_centroids(tmp_path / "routing_all_km.pt")
    assert torch.equal(centroids.layers[1], (means + 1)[:, None])


@pytest.mark.parametrize(
    "wrong", [{"n_clusters": 0}, {"epochs": 0}, {"decay": 1.0}, {"decay": float("nan")}, {"start_iterations": -1}]
)
def test_settings_check_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"cluster_online.{next(iter(wrong))} must be"):
        OnlineSettings(**wrong)


def test_no_layer_of_one_seed_is_drawn_like_one_of_another() -> None:
    points, settings = directions(4), OnlineSettings(n_clusters=3, epochs=1)
    one, other = (train_online(points, replace(settings, seed=seed), layer) for seed, layer in ((1, 0), (0, 1)))
    assert not torch.allclose(one, other)
