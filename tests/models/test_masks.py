"""Layers with a window of their own multiply a band, and give what the mask alone would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import masking_utils

from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.graphs import QK, Pattern, band
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.models.masks import window_of
from sparsefinder.models.replacement import registered_function
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.combine import Union
from sparsefinder.patterns.longformer import Longformer
from sparsefinder.patterns.sinks import Sinks
from sparsefinder.patterns.window import GlobalTokens, Window


def test_no_matrix_is_made_of_a_window_that_no_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("modernbert", layer_types=["full_attention"] * 2, num_hidden_layers=2)
    ids, valid = torch.randint(5, 12, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    valid[1, 20:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=valid).logits[valid > 0]
    made: list[tuple[int, ...]] = []
    sdpa_mask = masking_utils.sdpa_mask

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        made.append(() if mask is None else tuple(mask.shape))
        return mask

    monkeypatch.setattr(masking_utils, "sdpa_mask", recorded)
    with torch.no_grad(), plugged(model, Dense(Normalizer(1.0))):
        found = model(input_ids=ids, attention_mask=valid).logits[valid > 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [shape for shape in made if shape] == [(2, 1, 1, 30)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_modernbert_is_what_its_mask_says(alpha: float, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With entmax of its own, and with softmax beside something that is plugged into its global layers; and their gradients."""
    model = tiny_model("modernbert")
    set_normalizer(model, Normalizer(alpha))
    ids = torch.randint(5, 12, (2, 30), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 30, dtype=torch.long)
    valid[1, slice(0, 9) if side == "left" else slice(21, 30)] = 0
    bands: list[object] = []

    def seen(mask: torch.Tensor | None, reach: int) -> object:
        bands.append(window_of(mask, reach))
        return bands[-1]

    def run(window: object) -> list[torch.Tensor]:
        monkeypatch.setattr(registered_function, "window_of", window)
        with plugged(model, Dense(Normalizer(1.5))):
            logits = model(input_ids=ids, attention_mask=valid).logits[valid > 0]
        weights = [parameter for name, parameter in model.named_parameters() if "Wqkv" in name]
        return [logits, *torch.autograd.grad(logits.square().sum(), weights)]

    for found, expected in zip(run(seen), run(lambda *_: None), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(bands) == 1
    assert bands[0] is not None


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_read_from_a_mask(causal: bool) -> None:
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :5] = False
    mask = (band(20, 7) & valid[:, None, :])[:, None]
    mask = mask & (torch.ones(20, 20) > 0).tril() if causal else mask
    found = window_of(mask, 3)
    assert found is not None
    assert torch.equal(found[0], valid)
    assert found[1] == causal
    for reach in (2, 4):
        assert window_of(mask, reach) is None, "another width"
    for i, j, is_seen in ((10, 17, True), (10, 3, True), (10, 11 - 2 * causal, False)):
        other = mask.clone()
        other[0, 0, i, j] = is_seen
        assert window_of(other, 3) is None, "a pair outside, or one that is missing"
    assert window_of(mask, 10) is None, "nothing to gain"
    assert window_of(None, 3) is None
    assert window_of(mask[:, :, :1], 3) is None


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("pattern", [Window(7), Sinks(7, 2), Longformer(7, 2), Union((Window(5), GlobalTokens(1)))])
def test_patterns_of_a_window_are_bands_too(pattern: Pattern, alpha: float) -> None:
    """In C++ the pairs of their graphs are multiplied, and no others."""
    q, k, v = torch.randn(3, 2, 2, 40, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 30:] = False
    bucketed = Bucketed(pattern, Normalizer(alpha), executor="native")
    expected = Masked(pattern, Normalizer(alpha))(q, k, v, valid, 0)
    torch.testing.assert_close(bucketed(q, k, v, valid, 0), expected, atol=1e-5, rtol=1e-5)
    pairs = bucketed.graph(QK(q, k, valid), 0).sum((-2, -1))
    assert torch.equal(bucketed.computed_pairs(QK(q, k, valid), 0), pairs)
