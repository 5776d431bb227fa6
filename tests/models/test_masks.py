"""Layers with a window of their own multiply a band, and give what the mask alone would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import masking_utils

from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Pattern
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.models.masks import is_past, keys_seen, pairs_of, past, window_of
from sparsefinder.models.packing import read_mask
from sparsefinder.models.replacement import registered_function
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.pairs import band
from sparsefinder.patterns.combine import Union
from sparsefinder.patterns.longformer import Longformer
from sparsefinder.patterns.sinks import Sinks
from sparsefinder.patterns.window import GlobalTokens, Window
from tests.models.test_decoders import tiny


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_window_of_a_sliding_layer_is_no_matrix_either(
    causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks grow with the length of a text, not with its square; what is asked of them is the same."""
    kinds = ["sliding_attention", "full_attention"]
    window = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 9}
    model = tiny("qwen3", **window) if causal else tiny_model("modernbert")
    attention = Dense(Normalizer(1.0), causal=causal)
    ids, valid = torch.randint(5, 12, (2, 60)), torch.ones(2, 60, dtype=torch.long)
    if padded:
        valid[0, 50:], valid[1, :9] = 0, 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=valid).logits[valid > 0]
    masks: list[torch.Tensor] = []
    attend = registered_function._attend

    def recorded(module: Any, q: Any, k: Any, v: Any, mask: Any, dense: Dense) -> torch.Tensor:
        masks.append(mask)
        return attend(module, q, k, v, mask, dense)

    monkeypatch.setattr(registered_function, "_attend", recorded)
    with torch.no_grad(), plugged(model, attention):
        found = model(input_ids=ids, attention_mask=valid).logits[valid > 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    reach = 8 if causal else model.config.sliding_window
    assert masks
    assert {mask.shape for mask in masks} == {(2, 1, 2 * reach + 1 + causal, 60)}
    assert all(mask.stride(2) == 0 for mask in masks)  # a view: nothing is written for each diagonal
    assert window_of(masks[0], reach, 60) is not None
    assert window_of(masks[0], reach + 1, 60) is None
    between = (torch.arange(60) - torch.arange(60)[:, None]).abs() <= reach
    if causal:
        between = between.tril()
    pairs = between & (valid > 0)[:, None]
    assert pairs_of(masks[0], 60).equal(pairs[:, None])
    nothing = torch.empty(2, 1, 60, 1)
    assert keys_seen(masks[0], nothing, nothing).equal(pairs.sum(-1))


def test_what_the_past_is() -> None:
    valid = torch.tensor([[True, True, False, True], [False, True, True, True]])
    pairs = valid[:, None, None] & torch.ones(4, 4, dtype=torch.bool).tril()
    nothing = torch.empty(2, 1, 4, 1)
    assert pairs_of(past(valid), 4).equal(pairs)
    assert keys_seen(past(valid), nothing, nothing).equal(pairs[:, 0].sum(-1))
    assert past(valid).stride(2) == 0  # a view: nothing is written for each query
    assert not is_past(pairs, 4)
    assert window_of(past(valid), 1, 4) is None
    causal = read_mask(past(valid), nothing, nothing, causal=True)
    assert causal[0].equal(valid)
    assert causal[1] is None
    with pytest.raises(UserError, match="an attention with causal=True"):
        read_mask(past(valid), nothing, nothing, causal=False)


def test_the_weights_of_a_window_can_be_asked_for() -> None:
    """Where a matrix is wanted, the band becomes one."""
    model = tiny_model("modernbert")
    ids, valid = torch.randint(5, 12, (1, 40)), torch.ones(1, 40, dtype=torch.long)
    set_normalizer(model, Normalizer(1.5))
    with torch.no_grad():
        weights = model(input_ids=ids, attention_mask=valid, output_attentions=True).attentions
    reach = model.config.sliding_window
    outside = (torch.arange(40) - torch.arange(40)[:, None]).abs() > reach
    sliding = [
        each for each, kind in zip(weights, model.config.layer_types, strict=True) if kind == "sliding_attention"
    ]
    assert sliding
    for each in sliding:
        assert not each[..., outside].any()
        torch.testing.assert_close(each.sum(-1), torch.ones(1, each.shape[1], 40))


def test_a_window_that_something_is_added_to_is_a_matrix() -> None:
    """Only transformers' own window and nothing besides is known by its rule; all else by its numbers."""
    explicit = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sparsefinder"]
    window = masking_utils.sliding_window_bidirectional_mask_function(3)
    settings: dict[str, Any] = {"batch_size": 1, "q_length": 20, "kv_length": 20, "q_offset": 0, "kv_offset": 0}
    settings |= {"attention_mask": None, "allow_is_bidirectional_skip": False, "device": torch.device("cpu")}
    assert explicit(**settings, mask_function=window).shape == (1, 1, 7, 20)
    causal = masking_utils.sliding_window_causal_mask_function
    assert explicit(**settings, mask_function=causal(3)).shape == (1, 1, 6, 20)
    others = [
        masking_utils.and_masks(window, masking_utils.causal_mask_function),
        masking_utils.or_masks(window, masking_utils.causal_mask_function),
        masking_utils.and_masks(causal(3), window),
        causal(1),
        causal(10),
        masking_utils.and_masks(masking_utils.sliding_window_overlay(3), masking_utils.bidirectional_mask_function),
    ]
    for function in others:
        token = torch.arange(20)
        expected = function(0, 0, token[:, None], token[None])
        assert explicit(**settings, mask_function=function)[0, 0].equal(expected)


def test_rows_of_new_words_after_a_cache_are_no_band() -> None:
    """Three queries that see nine keys are three rows, not the diagonals of a window of three."""
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()[:, :, 6:]
    assert pairs_of(mask, 3) is mask
    assert window_of(mask, 1, 3) is None
    assert keys_seen(mask, torch.empty(1, 1, 3, 1), torch.empty(1, 1, 9, 1)).tolist() == [[7, 8, 9]]


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

    def seen(mask: torch.Tensor | None, reach: int, queries: int) -> object:
        bands.append(window_of(mask, reach, queries))
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
    found = window_of(mask, 3, mask.shape[2])
    assert found is not None
    assert torch.equal(found[0], valid)
    assert found[1] == causal
    for reach in (2, 4):
        assert window_of(mask, reach, mask.shape[2]) is None, "another width"
    for i, j, is_seen in ((10, 17, True), (10, 3, True), (10, 11 - 2 * causal, False)):
        other = mask.clone()
        other[0, 0, i, j] = is_seen
        assert window_of(other, 3, other.shape[2]) is None, "a pair outside, or one that is missing"
    assert window_of(mask, 10, mask.shape[2]) is None, "nothing to gain"
    assert window_of(None, 3, 30) is None
    assert window_of(mask[:, :, :1], 3, 30) is None


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
