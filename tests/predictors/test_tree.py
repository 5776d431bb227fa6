"""Trees of centroids: how they are grown, kept and descended, and that every sentence uses the level of its own length."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.native import nearest_centroids
from sparsefinder.executors.native import predictors as native
from sparsefinder.graphs import QK
from sparsefinder.numerics.selection import select, thresholds
from sparsefinder.patterns.routed import Routed
from sparsefinder.predictors.centroids import Centroids, load_centroids
from sparsefinder.predictors.fit_centroid_tree import nested_centroids
from sparsefinder.predictors.fit_centroids import KeyClusterSettings, fit_tree
from sparsefinder.predictors.nearest_clusters import (
    clusters_of_keys,
    clusters_of_unprojected_keys,
    nearest_by_products,
    nearest_child_by_products,
)
from sparsefinder.predictors.projections import Hidden, Identity, LayerProjections, Linear, Projections
from sparsefinder.storage.samples import Samples
from sparsefinder.testing import CHECKS, Check, Subject, random_qk, single_sentence

HEADS, SIZE, SIZES = 2, 8, (2, 4, 8, 16)


def points(count: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, SIZE, generator=generator)[torch.arange(count) % 9] * 2 + torch.randn(
        count, SIZE, generator=generator
    )


def tree(sizes: tuple[int, ...] = SIZES, layers: int = 2) -> Centroids:
    heads = [nested_centroids(x := points(seed=seed), x[: sizes[0]], sizes, 20, seed) for seed in range(layers * HEADS)]
    levels = [torch.stack(level).unflatten(0, (layers, HEADS)).unsqueeze(2) for level in zip(*heads, strict=True)]
    made = [Centroids(list(level)) for level in levels]
    return Centroids(made[-1].layers, coarser=tuple(made[:-1]))


class TestGrowing:
    def test_every_child_is_the_mean_of_what_is_nearest_to_it_among_its_siblings(self) -> None:
        x = points()
        levels = nested_centroids(x, x[:2], SIZES, 100, 0)
        owner = torch.cdist(x, levels[0]).argmin(-1)
        for coarse, fine in itertools.pairwise(levels):
            branching = len(fine) // len(coarse)
            families = fine.unflatten(0, (len(coarse), branching))
            for parent in range(len(coarse)):
                members = x[owner == parent]
                own = torch.cdist(members, families[parent]).argmin(-1)
                for child in range(branching):
                    torch.testing.assert_close(members[own == child].mean(0), families[parent, child])
            owner = owner * branching + torch.stack(
                [(families[p] - v).norm(dim=-1).argmin() for p, v in zip(owner.tolist(), x, strict=True)]
            )

    def test_more_levels_lie_nearer(self) -> None:
        x = points()
        levels = nested_centroids(x, x[:2], SIZES, 20, 0)
        spread = [torch.cdist(x, level).amin(-1).square().mean() for level in levels]
        assert spread == sorted(spread, reverse=True)
        assert spread[-1] < 0.6 * spread[0]

    def test_a_seed_has_one_tree(self) -> None:
        x = points()
        first, again, other = (nested_centroids(x, x[:2], SIZES, 20, seed)[-1] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_fewer_points_than_children(self) -> None:
        x = points(3)
        levels = nested_centroids(x, x[:2], SIZES, 20, 0)
        assert [len(level) for level in levels] == list(SIZES)
        assert levels[-1].isfinite().all()
        assert torch.cdist(x, levels[-1]).amin(-1).max() < 1e-4, "each point is a cluster of its own"

    def test_of_a_run(self, caplog: pytest.LogCaptureFixture) -> None:
        space = Projections([LayerProjections(Identity(), Identity()) for _ in range(2)])
        keys = [points(n, seed=n).expand(2, HEADS, -1, -1) for n in (60, 68)]
        settings = KeyClusterSettings(n_clusters=32, coarsest=4, jobs=1)
        assert settings.sizes == (4, 8, 16, 32)
        assert KeyClusterSettings(n_clusters=6, coarsest=16).sizes == (6,)
        assert KeyClusterSettings().sizes == (64, 128, 256, 512, 1024)
        made = fit_tree(Samples(keys, keys), space, settings)
        assert [level.clusters for level in (*made.coarser, made)] == [4, 8, 16, 32]
        with caplog.at_level("INFO"):
            few = fit_tree(Samples(keys[:1], keys[:1]), space, settings)
        assert few.clusters == 8
        assert "60 keys are few: 8 clusters on the finest level instead of 32" in caplog.text
        with pytest.raises(UserError, match="choose fewer clusters"):
            fit_tree(Samples(keys[:1], keys[:1]), space, KeyClusterSettings(n_clusters=64, coarsest=64, jobs=1))


class TestFile:
    def test_a_tree_comes_back(self, tmp_path: Path) -> None:
        made = tree()
        made.save(tmp_path / "tree")
        found = load_centroids(tmp_path / "tree")
        assert found.source == str(tmp_path / "tree")
        for a, b in zip((*made.coarser, made), (*found.coarser, found), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True))
            assert not b.coarser or b is found

    def test_one_level_is_the_published_form(self, tmp_path: Path) -> None:
        tree().level(4).coarser[0].save(tmp_path / "one")
        content = torch.load(tmp_path / "one", weights_only=True)
        assert [tuple(layer.shape) for layer in content] == [(HEADS, 1, 2, SIZE)] * 2
        found = load_centroids(tmp_path / "one")
        assert found.level(1000).clusters == 2
        assert found.entrance is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"levels": []}, "must be a list named levels"),
            ({"levels": [[torch.zeros(2, 1, 2, 4)]], "more": 1}, "and nothing else"),
            ({"levels": [[torch.zeros(2, 1, 4, 4)], [torch.zeros(2, 1, 6, 4)]]}, "does not lie inside"),
            ({"levels": [[torch.zeros(2, 1, 4, 4)], [torch.zeros(2, 1, 8, 3)]]}, "does not lie inside"),
            ({"levels": [[torch.zeros(2, 2, 4, 4)], [torch.zeros(2, 2, 8, 4)]]}, "one run of k-means"),
            ({"levels": [torch.zeros(2, 1, 4, 4)]}, "must be a list over layers"),
        ],
    )
    def test_no_tree(self, content: Any, message: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "file")
        with pytest.raises(UserError, match=message):
            load_centroids(tmp_path / "file")


class TestDescending:
    def test_the_level_is_the_nearest_one(self) -> None:
        made = tree()
        assert [made.level(n).clusters for n in (0, 1, 2.5, 3, 5.6, 5.7, 1e6)] == [2, 2, 2, 4, 4, 8, 16]
        assert [level.clusters for level in made.level(8).coarser] == [2, 4]

    @pytest.mark.parametrize("sizes", [(2, 16), (4, 8, 64), (3, 24, 240)])
    def test_a_key_joins_the_nearest_child_of_its_nearest_parent(self, sizes: tuple[int, ...]) -> None:
        made, qk = tree(sizes), random_qk([70, 31], HEADS, SIZE)
        entrance = made.entrance
        assert entrance is not None
        branching = made.clusters // entrance.clusters
        found = clusters_of_keys(qk, made, 1)
        parents = nearest_by_products(qk.k, entrance.layers[1], 1)[..., 0]
        plain = nearest_child_by_products(qk.k, made.layers[1][:, 0], parents, branching)
        assert torch.equal(found, plain)
        for head in range(HEADS):
            for j, key in enumerate(qk.k[0, head]):
                parent = int((entrance.layers[1][head, 0] - key).norm(dim=-1).argmin())
                children = made.layers[1][head, 0, parent * branching : (parent + 1) * branching]
                assert found[0, head, j] == parent * branching + int((children - key).norm(dim=-1).argmin())
        doubles = clusters_of_keys(qk.with_vectors(qk.q.double(), qk.k.double()), made, 1)
        assert torch.equal(doubles, found)

    @pytest.mark.parametrize("projection", ["identity", "linear", "hidden"])
    @pytest.mark.parametrize("sizes", [(3,), (4, 8, 64), (3, 240)])
    def test_keys_are_compared_without_being_projected(self, sizes: tuple[int, ...], projection: str) -> None:
        """More keys than are sorted at a time, lying apart, in more coordinates than are multiplied at a time."""
        wide = SIZE if projection == "identity" else 40
        torch.manual_seed(0)
        makers = {
            "identity": Identity,
            "linear": lambda: Linear(HEADS, wide, SIZE),
            "hidden": lambda: Hidden(HEADS, wide, 3, SIZE),
        }
        own = makers[projection]()
        if isinstance(own, Linear):
            own.b.data = torch.randn_like(own.b)
        space = Projections([LayerProjections(own, own).requires_grad_(False)])
        keys = torch.randn(2, 2100, HEADS, wide, dtype=torch.float64).transpose(1, 2) * 2
        keys[0, 0, 3] = torch.nan  # padding
        valid = torch.ones(2, 2100, dtype=torch.bool)
        valid[0, 3] = False
        qk, made = QK(keys, keys, valid), tree(sizes)
        found = clusters_of_unprojected_keys(qk, space, made, 0)
        assert 0 <= int(found.min()) <= int(found.max()) < made.clusters
        projected, entrance = space.keys(qk, 0), made.entrance
        plain = nearest_by_products(projected, made.layers[0], 1)[..., 0]
        if entrance is not None:
            parents = nearest_by_products(projected, entrance.layers[0], 1)[..., 0]
            branching = made.clusters // entrance.clusters
            plain = nearest_child_by_products(projected, made.layers[0][:, 0], parents, branching)
        real = valid[:, None].expand_as(found)
        assert torch.equal(found[real], plain[real])


def routed(rule: str = "margin", level: float = 0.2) -> Routed:
    return Routed(rule, level, keys_per_cluster=1.0, key_centroids=tree())


@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize(
    ("pattern", "sweep"),
    [
        pytest.param(routed("margin"), [0.0, 0.5, 2.0], id="margin"),
        pytest.param(routed("budget"), [0.1, 0.3, 0.6], id="budget"),
        pytest.param(
            Routed(keys_per_cluster=0.1, key_centroids=tree((4, 16, 128))),
            [0.0, 0.5, 2.0],
            id="margin, queries descend",
        ),
    ],
)
def test_it_keeps_every_promise_of_a_pattern(pattern: Routed, sweep: list[float], check: Check) -> None:
    check(Subject(pattern, sweep=sweep, heads=HEADS, size=SIZE))


def opened_plainly(q: Tensor, k: Tensor, ids: list[int], pattern: Routed, branching: int, families: int) -> list[int]:
    """What one query opens: cluster by cluster of the entrance."""
    scores, reaches, numbers = [], [], []
    for family in range(families):
        members = k[[j for j, c in enumerate(ids) if c // branching == family]]
        numbers.append(len(members))
        each = members @ q / math.sqrt(len(q)) if len(members) else torch.zeros(1)
        spread = ((q**2 * members.var(0, correction=0)).sum() / len(q)).sqrt() if len(members) else torch.zeros(())
        scores.append(float(each.mean() + spread))
        reaches.append(float(each.mean() + 3 * spread))
    row, count = torch.tensor([reaches if pattern.rule == "budget" else scores]), torch.tensor([numbers]).float()
    if pattern.rule == "budget":
        kept = select(row, count, "budget", min(1.0, 4 * pattern.level), 1.5)[0]
        return kept.nonzero().flatten().tolist()
    tau = float(thresholds((row / 2).masked_fill(count == 0, -torch.inf), count, 1.5))
    return [c for c in range(families) if numbers[c] and reaches[c] / 2 >= tau - pattern.level]


@pytest.mark.parametrize("sizes", [(4, 128), (3, 144)])
@pytest.mark.parametrize(("rule", "level"), [("margin", 0.1), ("margin", -0.2), ("budget", 0.05)])
def test_a_query_looks_into_what_it_opens(
    rule: str, level: float, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++, torch, and pair by pair; queries are long, so that some clusters of the entrance stay closed."""
    pattern = Routed(rule, level, keys_per_cluster=0.1, key_centroids=tree(sizes))
    families, branching = sizes[0], sizes[1] // sizes[0]
    assert pattern.centroids.families == families
    qk = random_qk([60, 41], HEADS, SIZE)
    qk = qk.with_vectors(3 * qk.q, qk.k)
    graph = pattern(qk, 0)
    for library in (native, nearest_centroids):
        monkeypatch.setattr(library, "works_on", lambda _: False)
    assert (pattern(qk, 0) ^ graph).sum() <= 2, "ties"
    ids = clusters_of_keys(qk, pattern.centroids, 0)
    closed = 0
    for head in range(HEADS):
        k, own = qk.k[1, head, :41], ids[1, head, :41].tolist()
        for i in range(0, 41, 5):
            q = qk.q[1, head, i]
            opened = opened_plainly(q, k, own, pattern, branching, families)
            closed += families - len(opened)
            scores, numbers = torch.zeros(1, sizes[1]), torch.zeros(1, sizes[1])
            for c in {c for c in own if c // branching in opened}:
                members = k[[j for j, other in enumerate(own) if other == c]]
                spread = ((q**2 * members.var(0, correction=0)).sum() / len(q)).sqrt()
                scores[0, c], numbers[0, c] = (members @ q).mean() / math.sqrt(len(q)) + spread, len(members)
            share = level if rule == "margin" else level * 41 / float(numbers.sum())
            kept = select(scores, numbers, rule, share, 1.5)[0]
            expected = {j for j in range(41) if kept[own[j]]}
            assert {*graph[1, head, i].nonzero().flatten().tolist()} == expected
    assert closed > 5


@pytest.mark.parametrize("causal", [False, True])
def test_every_sentence_uses_the_level_of_its_length(causal: bool) -> None:
    qk = random_qk([16, 3, 9, 40], HEADS, SIZE, causal)
    together, pattern = routed()(qk, 0), routed()
    for index, clusters in enumerate((16, 4, 8, 16)):
        level = pattern.centroids.level(clusters)
        alone = Routed(keys_per_cluster=1e9, key_centroids=level if level.entrance else Centroids(level.layers))
        if level.entrance:
            alone = Routed(keys_per_cluster=1.0, key_centroids=level)
        one = single_sentence(qk, index)
        length = one.k.shape[2]
        assert torch.equal(together[index : index + 1, :, :length, :length], alone(one, 0))
    assert pattern.layout(qk, 0).buckets.count == 16
    assert pattern.layout(single_sentence(qk, 1), 0).buckets.count == 4


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="keys_per_cluster must be above 0"):
        Routed(keys_per_cluster=0.0)


def test_examples_are_taken_by_their_numbers() -> None:
    qk = random_qk([5, 3, 4], HEADS, SIZE)
    part = qk.part(torch.tensor([2, 0]))
    assert part.lengths.tolist() == [4, 5]
    assert torch.equal(part.k[1], qk.k[0])
    crossed = QK(qk.q, qk.k[:, :, :2], qk.valid[:, :2], query_valid=qk.valid).part(torch.tensor([1]))
    assert crossed.queries_valid.sum() == 3
