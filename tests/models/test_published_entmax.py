"""Configurations of SparseModernBERT: entmax in the global layers, softmax in the sliding ones, no remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_batch, tiny_model
from transformers import AutoModel

from sparsefinder.errors import UserError
from sparsefinder.models import get_normalizer, load_masked_lm, softmax
from sparsefinder.numerics.normalizers import Normalizer


def published(folder: Path, alpha: Any) -> Path:
    save_tiny(folder, tiny_model("modernbert"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "initial_alpha": alpha,
        "pre_iter": 5,
        "auto_map": {"AutoModel": "sparse_modern_bert.CustomModernBertModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def zeros(model: Any) -> list[float]:
    """Share of the probabilities of two real sentences that are zero, in each layer."""
    batch = tiny_batch((9, 9))
    with torch.no_grad():
        return [float((p == 0).float().mean()) for p in model(**batch, output_attentions=True).attentions]


@pytest.mark.parametrize("alpha", [1.5, [2.0, 1.7, 1.5]])
def test_global_layers_have_entmax_and_sliding_ones_softmax(alpha, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(published(tmp_path / "published", alpha))
    first, sliding, last = zeros(model)
    dense = tiny_model("modernbert").base_model
    dense.set_attn_implementation("eager")
    assert (first > 0.1, last > 0.1) == (True, True)
    assert sliding == zeros(dense)[1]  # nothing but the window
    model.save_pretrained(tmp_path / "again")
    assert zeros(AutoModel.from_pretrained(tmp_path / "again")) == [first, sliding, last]
    with softmax(model):
        batch = tiny_batch()
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch)[0][mask], dense(**batch)[0][mask], atol=1e-5, rtol=1e-4)
    assert zeros(model) == [first, sliding, last]


def test_the_pipeline_loads_it_with_one_alpha(tmp_path: Path) -> None:
    model, _ = load_masked_lm(published(tmp_path / "one", [2.0, 1.7, 2.0]))
    assert get_normalizer(model) == Normalizer(2.0)
    assert zeros(model)[1] < zeros(model)[0]
    with pytest.raises(UserError, match="differs from layer to layer"):
        load_masked_lm(published(tmp_path / "more", [2.0, 1.7, 1.5]))
