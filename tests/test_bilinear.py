"""Training an inner product: the losses by hand, where it starts, that it is deterministic, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsefinder import bilinear
from sparsefinder.bilinear import BilinearSettings, row_loss, row_thresholds, train_bilinear
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.selection import thresholds
from sparsefinder.patterns.bilinear import Bilinear
from sparsefinder.patterns.indexer import LightningIndexer
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.routed_bilinear import RoutedBilinear
from sparsefinder.predictors.centroids import Centroids, load_centroids
from sparsefinder.predictors.closed_form import fit_lowrank, normal_form
from sparsefinder.predictors.gold_pairs import GoldPairs
from sparsefinder.predictors.indexer import load_indexer
from sparsefinder.predictors.projections import LayerProjections, Linear, Projections, load_projections
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store
from tests.conftest import random_qk
from tests.small_runs import samples

SMALL = BilinearSettings(rounds=2, steps=60, queries=12, n_clusters=6, eval_every=20, jobs=1, indexer_steps=4)
NEVER = torch.Generator()


@pytest.fixture(scope="module")
def halves() -> tuple[Samples, Samples]:
    """Queries and keys of four topics, too many for two numbers, and held-out ones."""
    whole = samples(16)
    return whole.part(0, 10), whole.part(10, 16)


def rows(causal: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates of ``(H, n, N)`` scores, the true probabilities, and the allowed keys of each row."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(5, 7, dtype=torch.bool).tril(2) if causal else torch.ones(5, 7, dtype=torch.bool)
    estimates, true = (2 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    gold = Normalizer(1.5)(true.masked_fill(~allowed, -math.inf))
    return estimates.masked_fill(~allowed, -math.inf), gold, allowed


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_row_thresholds_and_their_gradient(alpha: float) -> None:
    scores = rows(causal=True)[0]
    expected = thresholds((alpha - 1) * scores, torch.ones_like(scores), alpha)
    torch.testing.assert_close(row_thresholds(scores, alpha), expected, atol=1e-5, rtol=0)
    free = rows(causal=False)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: row_thresholds(s, alpha), (free,), atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_divergence_by_hand(causal: bool) -> None:
    scores, gold, allowed = rows(causal)
    divergences = []
    for h in range(2):
        for i in range(5):
            weights = [math.exp(float(s)) for s, may in zip(scores[h, i], allowed[i], strict=True) if may]
            truth = [float(p) for p, may in zip(gold[h, i], allowed[i], strict=True) if may]
            pairs = zip(truth, weights, strict=True)
            divergences.append(sum(p * math.log(p / (w / sum(weights))) for p, w in pairs if p > 0))
    found = row_loss(scores, gold, allowed, BilinearSettings(loss="kl"), NEVER)
    assert found.item() == pytest.approx(sum(divergences) / 10)
    # the probabilities of softmax have no divergence from their own scores
    own = scores.softmax(-1).masked_fill(~allowed, 0.0)
    assert row_loss(scores, own, allowed, BilinearSettings(loss="kl"), NEVER).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_entropy_by_hand(causal: bool) -> None:
    scores, gold, allowed = rows(causal)
    settings = BilinearSettings(sharpness=3.0)
    tau = row_thresholds(scores, 1.5)[..., 0]
    heads = []
    for h in range(2):
        losses: dict[bool, list[float]] = {True: [], False: []}
        for i in range(5):
            for j in range(7):
                if allowed[i, j]:
                    chance = 1 / (1 + math.exp(-3.0 * (0.5 * float(scores[h, i, j]) - float(tau[h, i]))))
                    positive = bool(gold[h, i, j] > 0)
                    losses[positive].append(-math.log(chance if positive else 1 - chance))
        heads.append(sum(sum(each) / len(each) for each in losses.values()))
    assert row_loss(scores, gold, allowed, settings, NEVER).item() == pytest.approx(sum(heads) / 2)


@pytest.mark.parametrize("causal", [False, True])
def test_hinges_by_hand(causal: bool) -> None:
    scores, gold, allowed = rows(causal)
    settings = BilinearSettings(loss="pair", margin=0.7)
    found = row_loss(scores, gold, allowed, settings, torch.Generator().manual_seed(1))
    pairs = GoldPairs.of(gold > 0, allowed)
    kept, negatives = pairs.draw_negatives(torch.Generator().manual_seed(1))
    hinges: dict[int, list[float]] = {0: [], 1: []}
    for row, positive, negative in zip(pairs.rows[kept], pairs.columns[kept], negatives, strict=True):
        head, i = divmod(int(row), 5)
        assert allowed[i, negative]
        assert gold[head, i, negative] == 0
        hinges[head].append(max(0.0, 0.7 - float(scores[head, i, positive]) + float(scores[head, i, negative])))
    assert found.item() == pytest.approx(sum(sum(each) / len(each) for each in hinges.values()) / 2)


@pytest.mark.parametrize("loss", bilinear.LOSSES)
def test_gradients_of_the_losses(loss: str) -> None:
    scores, gold, allowed = rows(causal=False)
    settings = BilinearSettings(loss=loss)

    def value(s: Tensor) -> Tensor:
        return row_loss(s, gold, allowed, settings, torch.Generator().manual_seed(0))

    free = scores.requires_grad_()
    assert torch.autograd.gradcheck(value, (free,), atol=1e-4)
    gradient = torch.autograd.grad(value(free), free)[0]
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, 5).double(), atol=1e-6, rtol=0)  # shifts are invisible
    assert (gradient[gold > 0] <= 1e-6).sum() > (gradient[gold > 0] > 1e-6).sum(), "positives are pulled up"


@pytest.mark.parametrize("loss", bilinear.LOSSES)
def test_keys_that_are_not_allowed_give_no_gradient(loss: str) -> None:
    scores, gold, allowed = rows(causal=True)
    vectors = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_()
    row_loss(
        scores.nan_to_num(neginf=0.0) * 0 + vectors.masked_fill(~allowed, -math.inf),
        *(gold, allowed, BilinearSettings(loss=loss), torch.Generator().manual_seed(0)),
    ).backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
    assert not vectors.grad[:, ~allowed].any()


def test_without_a_step_it_is_the_closed_form(halves: tuple[Samples, Samples]) -> None:
    found = train_bilinear(*halves, replace(SMALL, steps=0))
    expected = fit_lowrank(halves[0], 2)
    assert [record["step"] for record in found.history] == [0]
    for layer, (a, b) in enumerate(zip(found.projections.layers, expected.layers, strict=True)):
        assert torch.equal(a.q.w, b.q.w), layer
        assert torch.equal(a.k.w, b.k.w), layer


def test_the_normal_form_of_the_closed_form_is_itself(halves: tuple[Samples, Samples]) -> None:
    start = fit_lowrank(halves[0], 2)
    for a, b in zip(normal_form(halves[0], start).layers, start.layers, strict=True):
        signs = (a.q.w * b.q.w).sum(1, keepdim=True).sign()  # of singular vectors: free
        torch.testing.assert_close(a.q.w * signs, b.q.w, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.k.w * signs, b.k.w, atol=1e-5, rtol=1e-4)


def test_the_normal_form_keeps_inner_products_and_whitens_queries(halves: tuple[Samples, Samples]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = Projections([LayerProjections(Linear(2, 8, 3), Linear(2, 8, 3)).requires_grad_(False) for _ in "12"])
    found = normal_form(halves[0], given)
    for layer in range(2):
        qk = halves[1].layer(0, layer)
        torch.testing.assert_close(found(qk, layer).scores(), given(qk, layer).scores(), atol=1e-5, rtol=1e-4)
        queries = torch.cat([found(halves[0].layer(i, layer), layer).q[0] for i in range(10)], dim=1)
        moment = queries.mT @ queries / queries.shape[1]
        torch.testing.assert_close(moment, (3 / 8 * torch.eye(3)).expand(2, 3, 3), atol=1e-4, rtol=0)
    biased = LayerProjections(Linear(2, 8, 3), Linear(2, 8, 3)).requires_grad_(False)
    biased.q.b += 1
    with pytest.raises(TypeError, match="without biases"):
        normal_form(halves[0], Projections([biased, biased]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loss", bilinear.LOSSES)
def test_training_is_deterministic_and_beats_its_start(
    loss: str, causal: bool, halves: tuple[Samples, Samples]
) -> None:
    settings = replace(SMALL, loss=loss, causal=causal)
    first, second = train_bilinear(*halves, settings), train_bilinear(*halves, settings)
    assert first.history == second.history
    for a, b in zip(first.projections.layers, second.projections.layers, strict=True):
        assert torch.equal(a.q.w, b.q.w)
        assert torch.equal(a.k.w, b.k.w)
    assert [record["step"] for record in first.history] == [0, 20, 40, 60]
    start, end = first.history[0], first.history[-1]
    assert end["sparsity"] == pytest.approx(start["sparsity"], abs=1e-6)
    assert end["recall"] > start["recall"] + 0.01, "on held-out samples"
    other = train_bilinear(*halves, replace(settings, seed=1))
    assert other.history[-1] != end


def test_margins_are_read_at_the_threshold_that_was_learned(halves: tuple[Samples, Samples]) -> None:
    """At about the density of the closed form's estimated support, the trained one recalls more."""
    start, end = (train_bilinear(*halves, replace(SMALL, steps=steps)).projections for steps in (0, 100))

    def found(space: Projections, level: float) -> tuple[float, float]:
        graphs, golds = [], []
        for index in range(len(halves[1])):
            for layer in range(2):
                qk = halves[1].layer(index, layer)
                graphs.append(Bilinear(level=level)(space(qk, layer), layer).flatten())
                golds.append((Normalizer(1.5)(qk.scores()) > 0).flatten())
        graph, gold = torch.cat(graphs), torch.cat(golds)
        return graph.double().mean().item(), (graph & gold).sum().item() / gold.sum().item()

    density, recall = found(start, 0.2)
    levels = [found(end, level / 100) for level in range(-100, 150, 5)]
    assert max(r for d, r in levels if d <= density) > recall + 0.01


def test_the_stage_writes_files_that_can_be_read(tmp_path: Path, halves: tuple[Samples, Samples]) -> None:
    store = Store(tmp_path)
    for name, part in zip(("qk", "qk_validation"), halves, strict=True):
        with store.writing(name) as path:
            part.save(path)
        store.finish(name, "extract", {}, {}, 0)
    settings = replace(SMALL, steps=4)
    bilinear.run(settings, store)
    for name in ("bilinear_projections", "bilinear_centroids", "indexer"):
        store.finish(name, "bilinear", {}, {}, 0)
    projections = load_projections(tmp_path / "bilinear.pickle")
    trained = train_bilinear(*halves, settings).projections
    for a, b in zip(projections.layers, trained.layers, strict=True):
        assert torch.equal(a.q.w, b.q.w)
        assert torch.equal(a.k.w, b.k.w)
        assert not a.q.b.any()
        assert not a.k.b.any()
    assert load_centroids(tmp_path / "bilinear_centroids.pickle").layers[1].shape == (2, 1, 6, 2)
    assert load_indexer(tmp_path / "indexer.pickle").sizes == (2, 16, 8)
    for pattern in (Bilinear(), RoutedBilinear(), LightningIndexer()):
        configuration = Configuration("tested", pattern, window=3)
        graph = configuration.build(Learned.load(store, configuration.needs))(halves[1].layer(0, 1), 1)
        assert 0 < graph.float().mean() < 1
    history = store.manifest("bilinear_projections").facts["history"]  # type: ignore[union-attr]
    assert [record["step"] for record in history] == [0, 4]


def test_routing_is_the_same_in_either_space() -> None:
    centroids = Centroids([torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(0))])
    qk = random_qk([12, 7], 2, 4)
    expected = Routed(level=0.1, key_centroids=centroids)(qk, 0)
    assert torch.equal(RoutedBilinear(level=0.1, bilinear_centroids=centroids)(qk, 0), expected)
    with pytest.raises(UserError, match="run stage=bilinear first"):
        RoutedBilinear()(qk, 0)


def test_samples_of_two_models_are_refused(halves: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match="of one model"):
        train_bilinear(halves[0], samples(2, size=6), SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"loss": "row"}, "choose one of bce, pair, kl"),
        ({"steps": -1}, "must be 0 or more"),
        ({"alpha": 1.0}, "softmax has no zeros"),
        ({"eval_density": 1.5}, "between 0 and 1"),
        ({"sharpness": 0.0}, "sharpness > 0"),
    ],
)
def test_wrong_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(BilinearSettings(), **changes)
