"""Training projections: which negatives are drawn (trap 6), the two losses by hand, and whether it learns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefinder.errors import UserError
from sparsefinder.executors.native import gold_pairs as native
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import entmax15
from sparsefinder.predictors.all_layers import clip_each_layer
from sparsefinder.predictors.contrastive import contrastive_loss
from sparsefinder.predictors.gold_pairs import gold_pairs
from sparsefinder.predictors.projections import LayerProjections, Linear, load_projections
from sparsefinder.quantization import ProjectSettings, train_projections
from sparsefinder.storage.samples import Samples, load_samples
from tests.conftest import random_qk


@pytest.fixture(params=["in C++", "in torch"])
def executed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to list and to learn from pairs."""
    if request.param == "in torch":
        monkeypatch.setattr(native, "works_on", lambda _: False)


def gold_of(qk: QK) -> torch.Tensor:
    return (entmax15(qk.scores()) > 0)[0]


@pytest.mark.usefixtures("executed")
class TestPairs:
    @pytest.mark.parametrize("causal", [False, True])
    def test_positives_are_the_gold_graph(self, causal: bool) -> None:
        qk = random_qk([12], causal=causal)
        pairs = gold_pairs(qk, 1.5)
        graph = torch.zeros(2 * 12, 12, dtype=torch.bool)
        graph[pairs.rows, pairs.columns] = True
        assert torch.equal(graph.view(2, 12, 12), gold_of(qk))

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])  # nearly all, some, and few keys are positive
    def test_negatives_are_allowed_zeros_of_the_row(self, causal: bool, scale: float) -> None:
        qk = random_qk([15], causal=causal)
        qk = qk.with_vectors(qk.q * scale, qk.k)
        pairs = gold_pairs(qk, 1.5)
        graph = gold_of(qk).view(-1, 15)
        allowed = qk.allowed[0, 0].repeat(2, 1)
        for seed in range(20):
            kept, negatives = pairs.draw_negatives(torch.Generator().manual_seed(seed))
            rows = pairs.rows[kept]
            assert (allowed & ~graph)[rows, negatives].all()
            has_zero = (allowed & ~graph).any(-1)
            assert torch.equal(kept, has_zero[pairs.rows].nonzero().squeeze(-1)), "as many negatives as positives"

    def test_negatives_are_uniform_over_the_zeros(self) -> None:
        qk = random_qk([8], heads=1, causal=True)
        pairs, graph = gold_pairs(qk, 1.5), gold_of(qk)[0]
        generator = torch.Generator().manual_seed(0)
        drawn: Counter[tuple[int, int]] = Counter()
        for _ in range(3000):
            kept, negatives = pairs.draw_negatives(generator)
            drawn.update(zip(pairs.rows[kept].tolist(), negatives.tolist(), strict=True))
        for row in range(8):
            zeros = [j for j in range(row + 1) if not graph[row, j]]
            shares = [drawn[row, j] for j in zeros]
            if zeros:
                expected = sum(shares) / len(zeros)
                assert max(abs(share - expected) for share in shares) < 6 * expected**0.5, (row, shares)

    def test_blocks_are_positive_where_any_pair_is(self) -> None:
        qk = random_qk([7], heads=1)
        pairs, graph = gold_pairs(qk, 1.5, block_size=2), gold_of(qk)[0]
        found = torch.zeros(4, 4, dtype=torch.bool)
        found[pairs.rows, pairs.columns] = True
        for i in range(4):
            for j in range(4):
                assert found[i, j] == graph[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].any()

    def test_padding_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without padding"):
            gold_pairs(random_qk([3, 5]), 1.5)


@pytest.mark.usefixtures("executed")
@pytest.mark.parametrize("loss", ["pair", "row"])
@pytest.mark.parametrize("distance", ["l2", "min"])
def test_the_losses_by_hand(loss: str, distance: str) -> None:
    qk = random_qk([9], size=4)
    settings = ProjectSettings(loss=loss, distance=distance, margin=0.7)
    pairs = gold_pairs(qk, 1.5)
    found = contrastive_loss(qk, pairs, settings, torch.Generator().manual_seed(3))
    kept, negatives = pairs.draw_negatives(torch.Generator().manual_seed(3))

    def d(head: int, i: int, j: int) -> float:
        squared = (qk.q[0, head, i] - qk.k[0, head, j]) ** 2
        return float(squared.sum() if distance == "l2" else squared.min())

    heads = []
    for head in range(2):
        triples = [
            (row - 9 * head, positive, negative)
            for row, positive, negative in zip(
                pairs.rows[kept].tolist(), pairs.columns[kept].tolist(), negatives.tolist(), strict=True
            )
            if row // 9 == head
        ]
        if loss == "pair":
            hinges = [max(0.0, 0.7 + d(head, i, p) - d(head, i, n)) for i, p, n in triples]
            heads.append(sum(hinges) / len(hinges))
        else:
            rows = {i: [t for t in triples if t[0] == i] for i in range(9)}
            sums = [0.7 + sum(d(head, i, p) - d(head, i, n) for _, p, n in ts) if ts else 0.0 for i, ts in rows.items()]
            heads.append(sum(max(0.0, s) for s in sums) / 9)
    assert found.item() == pytest.approx(sum(heads) / 2, rel=1e-5)


@pytest.fixture(scope="module")
def halves() -> tuple[Samples, Samples]:
    from tests.conftest import GRAPH

    samples = load_samples(GRAPH / "golden_enc-attn.pt")
    return samples.part(0, 3), samples.part(3, 5)


CASES = {
    "defaults": {},
    "row": {"loss": "row"},
    "min": {"distance": "min"},
    "hidden": {"kind": "hidden"},
    "concat": {"kind": "concat"},
    "apart": {"share_projectors": False},
    "blocks": {"block_size": 3},
    "causal": {"causal": True},
    "accumulation": {"accumulation": 2, "batch_size": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_deterministic_and_lowers_the_loss(
    case: str, halves: tuple[Samples, Samples], tmp_path: Path
) -> None:
    settings = ProjectSettings(epochs=25, eval_every=1, **CASES[case])
    first, second = train_projections(*halves, settings), train_projections(*halves, settings)
    assert first.history == second.history
    losses = [record["loss"] for record in first.history]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    first.projections.save(tmp_path / "p.pickle")
    shared = settings.share_projectors or settings.kind == "concat"
    for layer in load_projections(tmp_path / "p.pickle").layers:
        same = all(torch.equal(a, b) for a, b in zip(layer.q.parameters(), layer.k.parameters(), strict=True))
        assert same == shared


def test_gold_pairs_on_disk_teach_the_same(halves: tuple[Samples, Samples], tmp_path: Path) -> None:
    settings = ProjectSettings(epochs=2)
    memory, disk = train_projections(*halves, settings), train_projections(*halves, settings, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(halves[0])
    assert memory.history == disk.history


def test_training_beats_chance(halves: tuple[Samples, Samples]) -> None:
    record = train_projections(*halves, ProjectSettings(epochs=40)).history[-1]
    assert record["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert record["recall"] > 1.5 * (1 - record["sparsity"]), "a random prediction recalls its density"


def test_no_projection_needs_no_training(halves: tuple[Samples, Samples]) -> None:
    trained = train_projections(*halves, ProjectSettings(kind="none"))
    qk = halves[1].layer(0, 1)
    assert torch.equal(trained.projections(qk, 1).q, qk.q)


def test_gradients_are_clipped_for_each_layer() -> None:
    """A huge gradient in one layer must not shrink the step of another: layers are trained as if alone."""
    stack = LayerProjections(Linear(4, 3, 2), Linear(4, 3, 2))
    for parameter in stack.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[2:] *= 1000
    clip_each_layer(stack, layers=2, limit=1.0)
    of_layers = [[p.grad[part] for p in stack.parameters()] for part in (slice(0, 2), slice(2, 4))]
    for gradients in of_layers:
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(norm, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"kind": "cubic"}, "linear, hidden, concat, none"),
        ({"loss": "l1"}, "pair, row"),
        ({"distance": "cos"}, "l2, min"),
        ({"alpha": 1.0}, "softmax has no zeros"),
        ({"alpha": 3.0}, "at most 2, got 3"),
        ({"clip": 0.0}, "clip > 0"),
        ({"steps": 0}, "steps must be"),
        ({"eval_density": 1.5}, "between 0 and 1"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_wrong_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(ProjectSettings(), **changes)
