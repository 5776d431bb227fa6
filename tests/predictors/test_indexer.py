"""Index heads: the score by loops, the choice, training, and files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.metrics import Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.indexer import LightningIndexer
from sparsefinder.predictors.indexer import Indexer, IndexerSettings, fit_indexer, load_indexer
from sparsefinder.sparse_model.learning import learn
from sparsefinder.storage.samples import Samples
from sparsefinder.testing import random_qk
from tests.small_runs import samples

HEADS, SIZE, INDEX_HEADS, NUMBERS = 2, 4, 3, 2
SMALL = IndexerSettings(heads=2, size=3, steps=40, queries=12)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = HEADS * SIZE
    shapes = {"q": (INDEX_HEADS, width, NUMBERS), "k": (width, NUMBERS), "w": (width, INDEX_HEADS), "b": (INDEX_HEADS,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_one_choice_for_all_heads(causal: bool) -> None:
    tokens, share = 9, 0.4
    qk, own = random_qk([tokens], HEADS, SIZE, causal), weights()
    graph = LightningIndexer(share, Indexer([own]))(qk, 0)[0]
    x, y = (torch.cat([side[0, head] for head in range(HEADS)], dim=-1) for side in (qk.q, qk.k))
    for i in range(tokens):
        seen = range(i + 1) if causal else range(tokens)
        scores = {}
        for j in seen:
            products = [
                float((x[i] @ own["q"][h]) @ (y[j] @ own["k"])) / math.sqrt(NUMBERS) for h in range(INDEX_HEADS)
            ]
            shares = (x[i] @ own["w"] + own["b"]).tolist()
            scores[j] = sum(w * max(product, 0.0) for w, product in zip(shares, products, strict=True))
        best = sorted(scores, key=lambda j: -scores[j])[: math.ceil(share * len(seen) - 1e-9)]
        for head in range(HEADS):
            assert graph[head, i].nonzero().flatten().tolist() == sorted(best)


def recall(indexer: Indexer, held_out: Samples) -> float:
    counts = []
    for qk in (held_out.layer(index, 0) for index in range(len(held_out))):
        counts.append(count(LightningIndexer(0.3, indexer)(qk, 0), Gold.of(qk, 1.5), qk).macro()["recall"].mean())
    return float(torch.stack(counts).mean())


def test_it_learns_and_is_the_same_again() -> None:
    whole = samples(12)
    training, held_out = whole.part(0, 9), whole.part(9, 12)
    trained = fit_indexer(training, SMALL)
    start, another = fit_indexer(training, replace(SMALL, steps=0)), fit_indexer(training, SMALL)
    for mine, theirs in zip(trained.layers, another.layers, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert recall(trained, held_out) > recall(start, held_out)


def test_keys_that_heads_share_are_repeated() -> None:
    whole = samples(4)
    shared = Samples(whole.q, [k[:, :1] for k in whole.k])
    repeated = Samples(whole.q, [k[:, :1].expand_as(k) for k in whole.k])
    few = replace(SMALL, steps=3)
    for mine, theirs in zip(fit_indexer(shared, few).layers, fit_indexer(repeated, few).layers, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_files(tmp_path: Path) -> None:
    Indexer([weights()]).save(tmp_path / "indexer.pickle")
    loaded = load_indexer(tmp_path / "indexer.pickle")
    assert all(torch.equal(loaded.layers[0][name], x) for name, x in weights().items())


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"q": 1},
        [{name: x for name, x in weights().items() if name != "b"}],
        [weights() | {"k": torch.ones(3, NUMBERS)}],
        [weights() | {"b": torch.tensor([math.nan] * INDEX_HEADS)}],
        [weights(), {name: x[..., :1, :] if name == "q" else x for name, x in weights().items()}],
    ],
)
def test_bad_files(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "indexer.pickle")
    with pytest.raises(UserError, match="stage=bilinear"):
        load_indexer(tmp_path / "indexer.pickle")


def test_the_index_of_a_model_does_not_keep_them() -> None:
    with pytest.raises(UserError, match="choose another pattern"):
        learn(("indexer",), None, [], Normalizer(1.0), 0)


def test_what_does_not_fit() -> None:
    qk: QK = random_qk([5], HEADS, SIZE)
    with pytest.raises(UserError, match="share"):
        LightningIndexer(0.0)
    with pytest.raises(UserError, match="needs indexer"):
        LightningIndexer()(qk, 0)
    for layer, wrong in ((1, qk), (0, random_qk([5], HEADS, SIZE + 1))):
        with pytest.raises(UserError, match="run stage=bilinear"):
            LightningIndexer(0.1, Indexer([weights()]))(wrong, layer)
