"""An index in a model of sentence-transformers: `encode` and `predict` as ever, saved and loaded as ever."""

from __future__ import annotations

from pathlib import Path

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


def test_an_embedder(embedder, tmp_path: Path, fitted: Fitted) -> None:
    dense = embedder.encode(TEXTS)
    index = sparsefinder.fit(embedder, embedder.tokenizer, sentences())
    assert index.base.content == fitted.index.base.content
    sparsefinder.attach(embedder, index, density=0.3, auto=False)
    sparse = embedder.encode(TEXTS)
    assert np.abs(sparse - dense).max() > 1e-4
    embedder.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), sparse, atol=1e-6)
    assert attachment(again).setting.target == "density=0.3"
    assert sparsefinder.explain(again, TEXTS).tokens == 38
    sparsefinder.detach(embedder)
    np.testing.assert_array_equal(embedder.encode(TEXTS), dense)


def test_a_cross_encoder(base: Path, tmp_path: Path, fitted: Fitted) -> None:
    model = library.CrossEncoder(str(base), num_labels=1, device="cpu")
    dense = model.predict(PAIRS)
    index: Index = fitted.index
    sparsefinder.attach(model, index, density=0.3, auto=False)
    sparse = model.predict(PAIRS)
    assert np.abs(sparse - dense).max() > 1e-6
    model.save(str(tmp_path / "saved"))
    again = library.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), sparse, atol=1e-6)
    sparsefinder.detach(model)
    np.testing.assert_array_equal(model.predict(PAIRS), dense)
