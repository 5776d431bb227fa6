"""A model for longer texts: what it could read before means the same, and what is longer follows from repeated rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer

from sparsefinder.conversions import lengthen as module
from sparsefinder.conversions.lengthen import lengthen
from sparsefinder.errors import UserError
from sparsefinder.finetune import Pretrained
from sparsefinder.models import FAMILIES, describe
from sparsefinder.models.position_tables import reserved_rows_of


@pytest.mark.parametrize("family", FAMILIES)
def test_short_texts_mean_what_they_did(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", tiny_model(family))
    source, _ = Pretrained(str(tmp_path / "source")).make(None, tmp_path)  # type: ignore[arg-type]
    longer, tokenizer = Pretrained(str(tmp_path / "source"), max_length=100).make(None, tmp_path)  # type: ignore[arg-type]
    old = describe(source).max_length
    assert describe(longer).max_length == tokenizer.model_max_length == 100
    ids = torch.randint(5, VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(source(input_ids=ids[:, :old]).logits, longer(input_ids=ids[:, :old]).logits)
        logits = longer(input_ids=ids).logits
        assert logits.isfinite().all()
        if family != "modernbert":  # the plain reference: row by row
            rows, reserved = longer.base_model.embeddings.position_embeddings.weight, reserved_rows_of(longer.config)
            given = source.base_model.embeddings.position_embeddings.weight
            assert all(torch.equal(rows[reserved + i], given[reserved + i % old]) for i in range(100))
    longer.save_pretrained(tmp_path / "longer")
    tokenizer.save_pretrained(tmp_path / "longer")
    again, _ = Pretrained(str(tmp_path / "longer")).make(None, tmp_path)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, logits)


def test_what_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="maximum length 20 is shorter than the source model's 38"):
        lengthen(tiny_model(), tiny_tokenizer(), 20)
    whole = module.tile_rows
    monkeypatch.setattr(module, "tile_rows", lambda *args, **named: whole(*args, **named).roll(1, 0))
    with pytest.raises(UserError, match=r"failed its certificate: short-input difference of hidden states"):
        lengthen(tiny_model(), tiny_tokenizer(), 100)
    monkeypatch.setattr(module, "tile_rows", lambda table, *args, **named: torch.cat([table, table.new_zeros(62, 16)]))
    with pytest.raises(UserError, match="position table, rows that differ: measured 62, allowed 0"):
        lengthen(tiny_model(), tiny_tokenizer(), 100)
