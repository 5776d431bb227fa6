"""Attention can be replaced in every family, is given back, sees no padding, and survives saving."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_batch, tiny_config, tiny_model
from transformers import AttentionInterface, AutoModelForMaskedLM

from sparsefinder.errors import UserError
from sparsefinder.models import (
    FAMILIES,
    REGISTERED,
    describe,
    get_normalizer,
    load_masked_lm,
    plugged,
    set_normalizer,
    softmax,
)
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import hub

families = pytest.mark.parametrize("family", FAMILIES)


def dense(normalizer):
    """Dense attention in plain words, as an attention object."""

    def attention(q, k, v, valid, layer):
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~valid[:, None, None], -math.inf)
        return normalizer(scores) @ v

    return attention


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@families
def test_softmax_plugged_in_is_the_model_itself(family):
    model, batch = tiny_model(family), tiny_batch()
    expected = logits(model, batch)
    with plugged(model, dense(Normalizer(1.0))):
        inside = logits(model, batch)
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=0)


@families
def test_the_normalizer_is_used_in_every_layer(family):
    """A slow reference: entmax plugged in by hand where it can be, against the registered dense attention."""
    model, batch = tiny_model(family), tiny_batch()
    softmax = logits(model, batch)
    set_normalizer(model, Normalizer(1.5))
    entmax = logits(model, batch)
    assert (entmax - softmax).abs().max() > 1e-2
    with plugged(model, dense(Normalizer(1.5))):
        torch.testing.assert_close(logits(model, batch), entmax, rtol=1e-4, atol=1e-4)
    set_normalizer(model, Normalizer(1.0))
    torch.testing.assert_close(logits(model, batch), softmax, rtol=0, atol=0)


@families
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_padding_is_not_attended(family, alpha):
    """Trap 1: a name without a mask function gets no mask. The same tokens alone, padded, and next to others."""
    model, batch = tiny_model(family), tiny_batch((9, 5))
    set_normalizer(model, Normalizer(alpha))
    alone = {name: tensor[1:, :5] for name, tensor in batch.items()}
    expected = logits(model, alone)
    torch.testing.assert_close(logits(model, batch)[9:], expected, rtol=1e-4, atol=1e-4)
    with plugged(model, dense(Normalizer(alpha))):
        torch.testing.assert_close(logits(model, batch)[9:], expected, rtol=1e-4, atol=1e-4)


@families
def test_layers_are_numbered_by_depth(family):
    model, batch = tiny_model(family), tiny_batch()
    shape, seen = describe(model), []

    def record(q, k, v, valid, layer):
        assert q.shape == k.shape == v.shape == (2, shape.heads, 9, shape.head_size)
        assert valid.dtype == torch.bool
        assert torch.equal(valid, batch["attention_mask"].bool())
        seen.append(layer)
        return v

    with plugged(model, record):
        logits(model, batch)
        logits(model, batch)
    expected = {"albert": (0, 1, 2), "modernbert": (0, 2)}.get(family, (0, 1))
    assert shape.depths == expected
    assert shape.layers == len(expected)
    assert seen == 2 * list(range(shape.layers))
    assert (shape.family, shape.heads, shape.head_size) == (family, 2, 8)
    assert shape.max_length == (38 if family in ("roberta", "xlm-roberta", "camembert") else 40)


def test_valid_is_complete_where_nothing_is_padded():
    model, batch = tiny_model(), tiny_batch((6, 6))
    found = []
    with plugged(model, lambda q, k, v, valid, layer: found.append(valid) or v):
        model(**batch)
        model(input_ids=batch["input_ids"])
    assert all(valid.shape == (2, 6) and valid.all() for valid in found)
    assert len(found) == 4


def test_albert_counts_depth_anew_after_a_failed_pass():
    model, batch, seen = tiny_model("albert"), tiny_batch(), []

    def fail_once(q, k, v, valid, layer):
        seen.append(layer)
        if len(seen) == 2:
            raise RuntimeError("stop")
        return v

    with plugged(model, fail_once):
        with pytest.raises(RuntimeError, match="stop"):
            logits(model, batch)
        logits(model, batch)
    assert seen == [0, 1, 0, 1, 2]


def test_sliding_layers_of_modernbert_keep_their_window():
    """With values swapped far outside the window, the sliding layer alone must not notice."""
    model = tiny_model("modernbert", layer_types=["sliding_attention", "full_attention", "full_attention"])
    set_normalizer(model, Normalizer(1.5))
    batch = tiny_batch((12,))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 11] = 5 + (other["input_ids"][0, 11] - 4) % 10
    with plugged(model, lambda q, k, v, valid, layer: torch.zeros_like(v)), torch.no_grad():
        first, second = model(**batch).logits[0], model(**other).logits[0]
    torch.testing.assert_close(first[:9], second[:9], rtol=0, atol=1e-6)
    assert not torch.allclose(first[9:11], second[9:11])


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_softmax_for_a_while_is_transformers_own(family):
    model, batch = tiny_model(family), tiny_batch()
    expected = logits(model, batch)  # SDPA
    set_normalizer(model, Normalizer(1.5))
    entmax, before = logits(model, batch), model.config.to_dict()
    with softmax(model):
        assert torch.equal(logits(model, batch), expected)
    assert model.config.to_dict() == before
    assert torch.equal(logits(model, batch), entmax)
    assert not torch.equal(entmax, expected)


def test_everything_is_put_back_after_an_exception():
    model, batch = tiny_model(), tiny_batch()
    set_normalizer(model, Normalizer(1.5))
    expected, before = logits(model, batch), model.config.to_dict()
    keys = set(model.state_dict())

    def fail(q, k, v, valid, layer):
        raise KeyError("inside")

    with pytest.raises(KeyError), plugged(model, fail):
        logits(model, batch)
    assert model.config.to_dict() == before
    assert set(model.state_dict()) == keys
    assert all(not hasattr(module, "_sparsefinder_plug") for module in model.modules())
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=0)


def test_plugs_nest_and_modules_as_attention_add_no_weights():
    model, batch = tiny_model(), tiny_batch()

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, q, k, v, valid, layer):
            return v * self.weight

    keys = set(model.state_dict())
    with plugged(model, Outer()):
        outer = logits(model, batch)
        with plugged(model, lambda q, k, v, valid, layer: torch.zeros_like(v)):
            assert not torch.allclose(logits(model, batch), outer)
        torch.testing.assert_close(logits(model, batch), outer, rtol=0, atol=0)
        assert set(model.state_dict()) == keys


def test_plugging_changes_neither_mode_nor_random_state():
    model = tiny_model().train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    with plugged(model, dense(Normalizer(1.0))):
        assert model.training
        assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


# ---- trap 2: saving and loading ----


@families
def test_a_saved_entmax_model_comes_back_as_entmax(family, tmp_path):
    model, batch = tiny_model(family), tiny_batch()
    set_normalizer(model, Normalizer(1.4))
    expected = logits(model, batch)
    save_tiny(tmp_path, model)
    loaded, tokenizer = load_masked_lm(tmp_path)
    assert get_normalizer(loaded) == Normalizer(1.4)
    assert tokenizer.mask_token_id == 4
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=0)


def test_auto_class_gives_entmax_and_keeps_it(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    set_normalizer(model, Normalizer(1.5))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "first")
    auto = AutoModelForMaskedLM.from_pretrained(tmp_path / "first").eval()
    torch.testing.assert_close(logits(auto, batch), expected, rtol=0, atol=0)
    auto.save_pretrained(tmp_path / "second")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "second").eval()
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=0)


def test_auto_class_without_the_package_is_an_error_not_softmax(tmp_path):
    model = tiny_model()
    set_normalizer(model, Normalizer(1.5))
    model.save_pretrained(tmp_path)
    code = f"from transformers import RobertaForMaskedLM as M; M.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "the Python package sparsefinder: install it, then import sparsefinder" in done.stderr.splitlines()[-1]


def test_softmax_models_stay_plain(tmp_path):
    model = tiny_model()
    set_normalizer(model, Normalizer(1.5))
    set_normalizer(model, Normalizer(1.0))
    save_tiny(tmp_path, model)
    assert "attn" not in (tmp_path / "config.json").read_text()
    assert "alpha" not in (tmp_path / "config.json").read_text()
    assert get_normalizer(load_masked_lm(tmp_path)[0]) == Normalizer(1.0)


# ---- precision and training ----


def test_half_precision_takes_probabilities_in_float32():
    """Trap 4: rows of bfloat16 probabilities summed in bfloat16 are off by percents; the support must be float32's."""
    model = tiny_model().to(torch.bfloat16)
    set_normalizer(model, Normalizer(1.5))
    attend = AttentionInterface()[REGISTERED]
    module = next(m for m in model.modules() if type(m).__name__ == "RobertaSelfAttention")
    q, k = torch.randn(2, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = Normalizer(1.5)(q.float() @ k.float().transpose(-1, -2) / math.sqrt(8))
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            output, probabilities = attend(module, q, k, torch.ones_like(k), None, output_attentions=True)
        assert output.dtype == probabilities.dtype == torch.bfloat16
        torch.testing.assert_close(probabilities, expected.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("scaling", [None, 0.1, 1.0, 3.0])
def test_scores_are_scaled_as_the_model_asks(scaling):
    """By 1/√D where it does not say; dense and plugged attention are given queries that need 1/√D."""
    module = next(m for m in tiny_model().modules() if type(m).__name__ == "RobertaSelfAttention")
    module.config.attention_alpha = 1.5
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = Normalizer(1.5)(q @ k.transpose(-1, -2) * (8**-0.5 if scaling is None else scaling)) @ v
    module.__dict__["_sparsefinder_plug"] = lambda module, q, k, v, mask: dense(Normalizer(1.5))(
        q, k, v, torch.ones(1, 6) > 0, 0
    )
    for plugged_in in (True, False):
        if not plugged_in:
            del module.__dict__["_sparsefinder_plug"]
        output, _ = AttentionInterface()[REGISTERED](module, q, k, v, None, scaling=scaling)
        torch.testing.assert_close(output.transpose(1, 2), expected)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_weights_saved_in_half_precision_are_loaded_in_float32(saved, tmp_path):
    """An update a thousand times smaller than its weight is lost in bfloat16."""
    model = tiny_model().to(saved)
    loaded, _ = load_masked_lm(save_tiny(tmp_path, model))
    assert {weight.dtype for weight in loaded.parameters()} == {loaded.dtype} == {torch.float32}
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.float(), rtol=0, atol=0)


def test_attention_dropout_in_training_only():
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    set_normalizer(model, Normalizer(1.5))
    batch = tiny_batch()
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    assert not torch.allclose(logits(model, batch), logits(model, batch))


# ---- trap 3 and other refusals ----

DEAF = {
    "longformer": {"attention_window": [4, 4]},
    "big_bird": {},
    "nystromformer": {},
    "reformer": {
        "attn_layers": ["local"],
        "axial_pos_shape": [4, 10],
        "axial_pos_embds_dim": [8, 8],
        "is_decoder": False,
    },
}


@pytest.mark.parametrize("family", DEAF)
def test_models_that_never_call_the_registry_are_refused(family, tmp_path):
    model = AutoModelForMaskedLM.from_config(tiny_config(family, **DEAF[family]))
    for change in (lambda: set_normalizer(model, Normalizer(1.5)), lambda: plugged(model, dense(None)).__enter__()):
        with pytest.raises(UserError, match="choose a language model of one of these families: roberta, bert"):
            change()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a {model.config.model_type}, whose attention cannot be replaced"):
        load_masked_lm(tmp_path)


def test_missing_folders_and_strange_names_are_one_line(tmp_path):
    for name in (str(tmp_path / "nowhere"), "runs/some/model", "../x", str(tmp_path)):
        with pytest.raises(UserError) as caught:
            load_masked_lm(name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_an_unreachable_hub_is_one_line_within_seconds(monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        load_masked_lm("nobody/no-such-model")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 8


def test_a_head_may_be_missing_but_not_half_of_it(tmp_path, caplog):
    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in weights.items() if not k.startswith("lm_head.")}, folder / "model.safetensors")
    load_masked_lm(folder)
    assert "lm_head.layer_norm.bias, lm_head.layer_norm.weight: drawn anew" in caplog.text
    del weights["lm_head.layer_norm.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"1 of its weights are not in the checkpoint, the first is lm_head\.layer_norm\.bias",
    ):
        load_masked_lm(folder)


def test_a_weight_that_nobody_trained_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"][-1, 0] = 1e30
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="numbers above 1e"):
        load_masked_lm(folder)


def test_damaged_folders_are_one_line(tmp_path):
    folder = save_tiny(tmp_path / "model")
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot read its weights"):
        load_masked_lm(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for broken, message in (
        (config[:50], "cannot read its configuration"),
        (json.dumps({**json.loads(config), "attention_alpha": 7}), "attention_alpha"),
        (
            json.dumps({**json.loads(config), "num_hidden_layers": 5}),
            "weights are not in the checkpoint",
        ),
        (json.dumps({**json.loads(config), "is_decoder": True}), "decoder"),
    ):
        (folder / "config.json").write_text(broken)
        with pytest.raises(UserError, match=message) as caught:
            load_masked_lm(folder)
        assert "\n" not in str(caught.value)
