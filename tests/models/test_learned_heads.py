"""An α and a temperature for each head: the plain model where they begin, their formula where they lie, kept and refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_batch, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.conversions.longformer import convert_roberta_to_longformer
from sparsefinder.errors import UserError
from sparsefinder.lsg.conversion import convert as convert_to_lsg
from sparsefinder.models import (
    get_normalizer,
    load_causal_lm,
    load_masked_lm,
    normalizers,
    plugged,
    set_normalizer,
    softmax,
)
from sparsefinder.models.learned_heads import (
    HeadValues,
    PerHeadSettings,
    get_heads,
    keep_bounds,
    learned_heads,
    set_heads,
)
from sparsefinder.models.masked_lm import gold_sparsity
from sparsefinder.models.observed_attention import OwnDense, Recorder, Watched
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.numerics.temperature import scales
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.window import Window
from sparsefinder.sparse_model.index import hash_of_weights

BOTH = PerHeadSettings(alpha=True, temperature=True)
ALPHA = torch.tensor([[1.2, 1.9], [1.5, 1.35]])
BETA, GAMMA = torch.tensor([[0.5, 0.0], [0.1, 1.0]]), torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
TEMPERATURE = HeadValues(beta=BETA, gamma=GAMMA)
VALUES = HeadValues(ALPHA, BETA, GAMMA)
FAMILIES = ("roberta", "bert", "camembert", "electra", "gpt2", "gpt_neox", "llama", "qwen3", "olmo2", "smollm3")


def tiny(family: str = "llama") -> Any:
    """Two layers of two heads of size 8 with 1.5-entmax; in the kin of llama both share their keys."""
    if family in ("roberta", "bert", "camembert", "electra"):
        model = tiny_model(family)
    else:
        torch.manual_seed(0)
        shared = {} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 1, "head_dim": 8}
        model = AutoModelForCausalLM.from_config(tiny_config(family, **shared)).eval()
    set_normalizer(model, Normalizer(1.5))
    return model


def states(model: Any, lengths: tuple[int, ...] = (9, 5)) -> Tensor:
    """Of the real tokens."""
    batch = tiny_batch(lengths)
    return model.base_model(**batch)[0][batch["attention_mask"].bool()]


def reads_back(model: Any) -> bool:
    return model.config.model_type in ("roberta", "bert", "camembert", "electra")


@pytest.mark.parametrize("family", FAMILIES)
def test_where_they_begin_it_is_the_plain_model_and_learns(family: str) -> None:
    model = tiny(family)
    plain = states(model).detach()
    names = dict(model.named_parameters()).keys()
    with learned_heads(model, BOTH):
        begun = states(model)
        torch.testing.assert_close(begun, plain, rtol=1e-5, atol=1e-5)
        begun.square().sum().backward()
        own = {name: p for name, p in model.named_parameters() if name not in names}
        assert len(own) == 6
        assert all(p.shape == (2,) and p.grad is not None and bool(p.grad.isfinite().all()) for p in own.values())
        assert all(bool((p.grad != 0).any()) for name, p in own.items() if not name.endswith("gamma"))
    assert dict(model.named_parameters()).keys() == names
    torch.testing.assert_close(states(model), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_learned_and_set_are_the_same(family: str) -> None:
    model, other = tiny(family), tiny(family)
    with learned_heads(model, BOTH):
        for layer, module in enumerate(m for m in model.modules() if hasattr(m, "entmax_heads")):
            for name, value in (("alpha", ALPHA), ("beta", BETA), ("gamma", GAMMA)):
                getattr(module.entmax_heads, name).data.copy_(value[layer])
        learning = states(model).detach()
    set_heads(other, VALUES)
    assert torch.equal(states(model), learning)
    assert torch.equal(states(other), learning)
    assert not torch.allclose(states(tiny(family)), learning, atol=1e-2)


def probabilities(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model.base_model(**batch, output_attentions=True).attentions


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama"])
@torch.no_grad()
def test_what_is_recorded_gives_the_layer_s_probabilities(family: str, left: bool) -> None:
    """And the queries are those of the plain layer, times the formula of the real tokens that each may see."""
    model, plain = tiny(family), tiny(family)
    set_heads(model, VALUES)
    batch = tiny_batch((9, 5))
    if left:
        batch = {name: tensor.flip(-1) for name, tensor in batch.items()}
    valid = batch["attention_mask"].bool()
    causal = not reads_back(model)
    recorders = []
    for each in (model, plain):
        recorders.append(recorder := Recorder())
        with plugged(each, Watched(OwnDense(normalizers(each), causal), recorder)):
            each.base_model(**batch)
    for layer, of_layer in enumerate(probabilities(model, batch)):
        own = PerHead(ALPHA[layer])(recorders[0].layers[layer].scores())
        real = valid[:, None, :, None].expand_as(own)
        torch.testing.assert_close(own[real], of_layer[real], rtol=1e-4, atol=1e-5)
    q, plain_q = (each.layers[0].q for each in recorders)
    keys = valid.cumsum(-1) if causal else valid.sum(-1, keepdim=True).expand(valid.shape)
    expected = plain_q * scales(keys, BETA[0], GAMMA[0])[..., None]
    torch.testing.assert_close(
        q.mT[:, :, 0][valid[:, None].expand(-1, 2, -1)], expected.mT[:, :, 0][valid[:, None].expand(-1, 2, -1)]
    )


@pytest.mark.parametrize("family", ["roberta", "llama"])
@torch.no_grad()
def test_every_attention_is_given_the_same_queries(family: str) -> None:
    model = tiny(family)
    set_heads(model, TEMPERATURE)
    own, causal = states(model), not reads_back(model)
    for attention in (
        Masked(Full(), causal=causal),
        Bucketed(Window(99), causal=causal),
        Bucketed(Window(99), causal=causal, executor="blocks"),
        Dense(causal=causal),
        Dense(causal=causal, executor="tiles"),
    ):
        with plugged(model, attention):
            torch.testing.assert_close(states(model), own, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_and_the_future_do_not_count() -> None:
    for family in ("roberta", "llama"):
        model = tiny(family)
        set_heads(model, VALUES)
        alone, beside = states(model, (5,)), states(model, (5, 9))
        torch.testing.assert_close(alone, beside[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        states(model, (9,))[:5], alone, rtol=1e-4, atol=1e-5
    )  # the same words, and more after them


@torch.no_grad()
def test_a_token_after_a_cache_counts_what_is_in_it() -> None:
    model = tiny("llama")
    set_heads(model, VALUES)
    ids = tiny_batch((9,))["input_ids"]
    whole = model(ids).logits
    before = model(ids[:, :6], use_cache=True)
    after = model(ids[:, 6:], past_key_values=before.past_key_values)
    torch.testing.assert_close(after.logits, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_every_way_of_saving_keeps_them(tmp_path: Path) -> None:
    model = tiny("roberta")
    set_heads(model, VALUES)
    expected = states(model)
    folder = save_tiny(tmp_path / "model", model)
    written = json.loads((folder / "config.json").read_text())
    assert written["attention_temperature"].keys() == {"delta", "beta", "gamma"}
    loaded = load_masked_lm(folder)[0]
    for each in (loaded, AutoModel.from_pretrained(folder), copy.deepcopy(loaded)):
        assert torch.equal(states(each), expected)
    kept = get_heads(loaded)
    assert all(torch.equal(getattr(kept, name), getattr(VALUES, name)) for name in ("alpha", "beta", "gamma"))
    with pytest.warns(UserWarning, match="would be softmax"):
        assert torch.equal(states(AutoModel.from_pretrained(folder, attn_implementation="eager")), expected)


def test_a_decoder_is_saved_with_them(tmp_path: Path) -> None:
    model = tiny("llama")
    set_heads(model, VALUES)
    assert torch.equal(states(load_causal_lm(save_tiny(tmp_path / "model", model))[0]), states(model))


@torch.no_grad()
def test_softmax_has_the_temperature_too(tmp_path: Path) -> None:
    """Scalable-Softmax: in a block, and for good."""
    model, plain = tiny("roberta"), tiny("roberta")
    set_heads(model, HeadValues(ALPHA, torch.full((2, 2), 0.7), torch.ones(2, 2)))
    before = states(model)
    with softmax(model):
        within = states(model)
    assert torch.equal(states(model), before)
    set_normalizer(model, Normalizer(1.0))
    assert get_heads(model).alpha is None
    torch.testing.assert_close(states(model), within)
    again = load_masked_lm(save_tiny(tmp_path / "model", model))[0]
    torch.testing.assert_close(states(again), within)
    with softmax(plain):
        assert not torch.allclose(states(plain), within, atol=1e-2)


def test_it_is_traced_for_other_lengths() -> None:
    model = tiny("roberta")
    set_heads(model, VALUES)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    recorded = torch.jit.trace(Logits().eval(), tuple(tiny_batch((9, 9)).values()), check_trace=False)
    for lengths in ((9, 4), (30, 8, 3)):
        batch = tuple(tiny_batch(lengths).values())
        with torch.no_grad():
            torch.testing.assert_close(recorded(*batch), Logits()(*batch), rtol=1e-4, atol=1e-4)


def test_gold_sparsity_is_that_of_each_head() -> None:
    model = tiny("llama")
    set_heads(model, VALUES)
    batch = tiny_batch((9, 9))
    zero = [(p == 0).float().sum() / (2 * 2 * 81) - 36 / 81 for p in probabilities(model, batch)]  # without the future
    expected = float(sum(zero)) / 2 * 81 / 45
    assert gold_sparsity(model, [batch]) == pytest.approx(expected, abs=1e-6)


def test_what_left_its_bounds_is_set_to_them() -> None:
    model = tiny()
    settings = PerHeadSettings(alpha=True, temperature=True, alpha_bounds=(1.4, 1.6), beta_bounds=(0.0, 0.5))
    with learned_heads(model, settings):
        for name, parameter in model.named_parameters():
            if "entmax_heads" in name:
                parameter.data.add_(torch.tensor([-9.0, 9.0]))
        keep_bounds(model, settings)
    kept = get_heads(model)
    for name, ends in (("alpha", (1.4, 1.6)), ("beta", (0.0, 0.5)), ("gamma", (-2.0, 2.0))):
        torch.testing.assert_close(getattr(kept, name), torch.tensor([ends, ends]))


def test_they_are_learned_on_from_where_they_are() -> None:
    model = tiny()
    set_heads(model, VALUES)
    before = states(model).detach()
    with learned_heads(model, BOTH):
        torch.testing.assert_close(states(model), before)
    with learned_heads(model, PerHeadSettings(temperature=True)):  # α stays
        torch.testing.assert_close(states(model), before)
    assert torch.equal(get_heads(model).alpha, ALPHA)


# ---- what cannot have them, and what is wrong ----


@pytest.mark.parametrize("family", ["albert", "distilbert", "modernbert"])
def test_a_family_without_an_attention_for_each_layer_is_refused(family: str) -> None:
    with (
        pytest.raises(UserError, match=f"is a {family}, whose layers do not have one attention each"),
        learned_heads(tiny_model(family), BOTH),
    ):
        pass


def test_one_alpha_is_asked_for_where_there_are_several() -> None:
    model = tiny("roberta")
    set_heads(model, VALUES)
    with pytest.raises(UserError, match="attention_alpha in this model's configuration differs from head to head"):
        get_normalizer(model)


@pytest.mark.parametrize("values", [VALUES, TEMPERATURE], ids=["alpha", "temperature"])
def test_no_conversion_drops_them(values: HeadValues, tmp_path: Path) -> None:
    model = tiny("roberta")
    set_heads(model, values)
    folder = save_tiny(tmp_path / "model", model)
    loaded, tokenizer = load_masked_lm(folder)
    with pytest.raises(UserError, match="attention_temperature for each head in its configuration, and longformer"):
        convert_roberta_to_longformer(loaded, tokenizer, 64)
    with pytest.raises(UserError, match="and an LSG model has no place for it"):
        convert_to_lsg(folder, max_sequence_length=64)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attention_alpha", [[1.5, 1.5]]),
        ("attention_alpha", [[1.5, 1.5], [1.5, 2.5]]),
        ("attention_alpha", [[1.5, 1.5], ["a", 1.5]]),
        ("attention_temperature", {"delta": 1.0, "beta": [[0.0, 0.0]] * 2}),
        ("attention_temperature", {"delta": 1.0, "beta": [[0.0, 0.0]] * 2, "gamma": [[1.0]] * 2}),
        ("attention_temperature", 3.0),
    ],
)
def test_a_damaged_configuration_is_one_line(setting: str, value: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tiny("roberta"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(UserError, match=r"attention_alpha.*in its config\.json is wrong") as caught:
        load_masked_lm(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_bounds": (1.0, 2.0)}, "alpha_bounds must lie above 1"),
        ({"alpha_bounds": (1.2,)}, r"alpha_bounds must be \[LOWEST, HIGHEST\]"),
        ({"gamma_bounds": (1.0, -1.0)}, r"gamma_bounds must be \[LOWEST, HIGHEST\]"),
        ({"beta_bounds": (-1.0, 1.0)}, "must not be negative"),
        ({"delta": -1.0}, "must not be negative"),
        ({"beta": 3.0}, r"beta=3.0 must lie within beta_bounds=\[0.0, 2.0\]"),
    ],
)
def test_wrong_settings_are_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PerHeadSettings(**settings)


def test_an_alpha_outside_of_its_bounds_is_said() -> None:
    model = tiny()
    with (
        pytest.raises(UserError, match=r"finetune.alpha=1.5 lies outside of finetune.per_head.alpha_bounds=\[1.6"),
        learned_heads(model, PerHeadSettings(alpha=True, alpha_bounds=(1.6, 2.0))),
    ):
        pass


def test_an_index_belongs_to_the_temperature_that_its_queries_had() -> None:
    plain, hot = tiny("roberta"), tiny("roberta")
    set_heads(hot, TEMPERATURE)
    assert hash_of_weights(plain.base_model) == hash_of_weights(tiny("roberta").base_model)
    assert hash_of_weights(hot.base_model) != hash_of_weights(plain.base_model)
