"""An index of a tiny encoder, learned once."""

from __future__ import annotations

import pytest
from tiny_index import LENGTHS, Fitted, sentences
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer

import sparsefinder


@pytest.fixture(scope="session")
def fitted() -> Fitted:
    index = sparsefinder.fit(tiny_model(), tiny_tokenizer(), sentences())
    return Fitted(index, tiny_batch(LENGTHS))
