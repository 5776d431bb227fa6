"""An index in a model of sentence-transformers: `encode` and `predict` as ever, saved and loaded as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_index import Fitted, sentences
from tiny_models import save_tiny, tiny_model

import sparsefinder
from sparsefinder import Index
from sparsefinder.sparse_model.attaching import attachment

library = pytest.importorskip("sentence_transformers", reason="pip install 'sparsefinder[sentence-transformers]'")
TEXTS = sentences(5, seed=3)
PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", tiny_model())


@pytest.fixture
def embedder(base: Path):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return library.SentenceTransformer(modules=[Transformer(str(base)), Pooling(16)], device="cpu")


def check_attached(model, run: Callable[[Any], np.ndarray], index: Index, folder: Path, least: float):
    """What a model computes changes by ``least`` with an index attached, is kept by saving, and returns; gives what is loaded."""
    dense = run(model)
    sparsefinder.attach(model, index, density=0.3, auto=False)
    sparse = run(model)
    assert np.abs(sparse - dense).max() > least
    model.save(str(folder))
    again = type(model)(str(folder), device="cpu")
    np.testing.assert_allclose(run(again), sparse, atol=1e-6)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags:\n- sentence-transformers")  # theirs
    assert card.count("## Sparse attention") == 1
    assert "refined at density=0.3 + tail" in card
    sparsefinder.detach(model)
    np.testing.assert_array_equal(run(model), dense)
    model.save(str(folder))
    assert "Sparse attention" not in (folder / "README.md").read_text(encoding="utf-8")
    return again


def test_an_embedder(embedder, tmp_path: Path, fitted: Fitted) -> None:
    index = sparsefinder.fit(embedder, embedder.tokenizer, sentences())
    assert index.base.content == fitted.index.base.content
    again = check_attached(embedder, lambda model: model.encode(TEXTS), index, tmp_path / "saved", least=1e-4)
    assert attachment(again).setting.target == "density=0.3"
    assert sparsefinder.explain(again, TEXTS).tokens == 38


def test_a_cross_encoder(base: Path, tmp_path: Path, fitted: Fitted) -> None:
    model = library.CrossEncoder(str(base), num_labels=1, device="cpu")
    check_attached(model, lambda model: model.predict(PAIRS), fitted.index, tmp_path / "saved", least=1e-6)
