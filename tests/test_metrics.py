"""Metrics against their definitions, written as loops over sets of pairs."""

from __future__ import annotations

import math

import pytest
import torch

from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.graphs import QK, Buckets
from sparsefinder.metrics import Counts, Gold, balance, count, count_rows
from sparsefinder.numerics.normalizers import entmax15
from sparsefinder.numerics.pairs import band
from sparsefinder.patterns.clustered import Clustered
from sparsefinder.patterns.oracle_topp import OracleTopP
from sparsefinder.score import ScoreSettings, metrics_table, score
from sparsefinder.storage.samples import Samples
from tests.conftest import random_qk, single_sentence


def by_hand(predicted, gold, probabilities, allowed, near, real) -> dict[str, float]:
    n = len(real)
    pairs = [(i, j) for i in range(n) for j in range(n) if allowed[i, j]]
    pred, true = {p for p in pairs if predicted[p]}, {p for p in pairs if gold[p]}
    far = {p for p in true if not near[p]}
    queries = [i for i in range(n) if real[i]]
    exact = sum(all((i, j) in pred for j in range(n) if (i, j) in true) for i in queries) / len(queries)
    hits = len(pred & true)
    return {
        "sparsity": 1 - len(pred) / len(pairs),
        "gold_sparsity": 1 - len(true) / len(pairs),
        "recall": hits / len(true),
        "precision": hits / len(pred) if pred else math.nan,
        "f1": 2 * hits / (len(pred) + len(true)),
        "exact": exact,
        "kept_mass": sum(float(probabilities[p]) for p in pred) / len(queries),
        "recall_far": len(pred & far) / len(far) if far else math.nan,
    }


@pytest.mark.parametrize("causal", [False, True])
def test_counts_and_means_by_hand(causal: bool) -> None:
    qk = random_qk([5, 9, 7], heads=2, causal=causal)
    gold, probabilities = Gold.of(qk, 1.5), entmax15(qk.scores())
    predicted = (torch.rand(gold.shape, generator=torch.Generator().manual_seed(0)) < 0.4) & qk.allowed
    predicted[0, 1] = False  # an empty prediction has no precision
    near = band(9, 3)
    found = count(predicted, gold, qk, near).ratios()
    macro = count(predicted, gold, qk, near).macro()
    for head in range(2):
        each = [
            by_hand(
                predicted[b, head],
                (probabilities[b, head] > 0),
                probabilities[b, head],
                qk.allowed[b, 0],
                near,
                qk.valid[b],
            )
            for b in range(3)
        ]
        for name in each[0]:
            values = torch.tensor([example[name] for example in each], dtype=torch.float64)
            torch.testing.assert_close(found[name][:, head].double(), values, equal_nan=True, atol=1e-6, rtol=0)
            torch.testing.assert_close(macro[name][head], values.nanmean(), atol=1e-6, rtol=0)
    for around in (near, None):
        listed = count(predicted, gold, qk, around)
        of_matrices = count_rows(predicted, probabilities, qk.allowed, qk.valid, around)
        for name, values in vars(listed).items():
            torch.testing.assert_close(getattr(of_matrices, name), values, atol=1e-5, rtol=1e-6)


def test_a_batch_counts_as_its_sentences_alone() -> None:
    qk = random_qk([4, 8])
    probabilities = entmax15(qk.scores())
    together = count(probabilities > 0, Gold.of_matrix(probabilities), qk)
    for b in range(2):
        one = single_sentence(qk, b)
        p = entmax15(one.scores())
        single = count(p > 0, Gold.of_matrix(p), one)
        for name in ("allowed", "predicted", "gold", "hits", "queries", "exact"):
            assert torch.equal(getattr(together, name)[b : b + 1], getattr(single, name))


def test_the_gold_graph_is_perfect() -> None:
    qk = random_qk([6])
    p = entmax15(qk.scores())
    macro = Counts.cat([count(p > 0, Gold.of_matrix(p), qk)] * 2).macro()
    for name in ("recall", "precision", "exact", "f1", "kept_mass"):
        torch.testing.assert_close(macro[name], torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_share_is_exact() -> None:
    """12 of 120 pairs are 10 %, neither more nor less, so that a table of recall at 10 % has them."""
    allowed = torch.ones(1, 12, dtype=torch.bool)
    qk = QK(torch.zeros(1, 1, 12, 2), torch.zeros(1, 1, 12, 2), allowed)
    graph = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    graph[..., :10, 0] = graph[..., :5, 1] = True
    probabilities = graph / graph.sum(-1, keepdim=True).clamp_min(1)
    ratios = count(graph, Gold.of_matrix(probabilities), qk).ratios()
    assert ratios["sparsity"].dtype == torch.float64
    assert ratios["sparsity"].item() == 1 - 15 / 144


def test_one_bucket_is_as_full_as_all() -> None:
    ids = torch.zeros(1, 1, 3, 1, dtype=torch.long)
    assert balance(Buckets(ids, ids, 1), torch.ones(1, 3) > 0)["bucket_entropy"].item() == 1


def test_bucket_balance() -> None:
    ids = torch.tensor([[[[0], [0], [0], [1], [3]]]])  # the last token is padding
    valid = torch.tensor([[True, True, True, True, False]])
    found = balance(Buckets(ids, ids, 4), valid)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["bucket_entropy"].item() == pytest.approx(expected)
    assert found["bucket_largest"].item() == pytest.approx(0.75)
    assert found["bucket_empty"].item() == pytest.approx(0.5)


def test_the_table_keeps_the_settings_of_a_pattern() -> None:
    """Not overwritten by the sizes of artefacts that it does not use, nor by the α of the gold graph."""
    samples = Samples([torch.randn(1, 2, 9, 4)], [torch.randn(1, 2, 9, 4)])
    chosen = tuple(Configuration("clustered", Clustered(n_clusters=n)) for n in (3, 5))
    settings = ScoreSettings((*chosen, Configuration("oracle_topp", OracleTopP(alpha=1.0))), alpha=2.0)
    table = metrics_table(score(samples, settings, Learned()), settings, Learned(), 4)
    assert table.groupby("configuration")["n_clusters"].first().dropna().tolist() == [3, 5]
    assert table["alpha"].tolist() == [2.0] * 6
    assert table["pattern_alpha"].dropna().tolist() == [1.0] * 2
