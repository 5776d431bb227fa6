"""Decoders and encoder-decoders of every family, tiny and random: plugged attention is the model's own, and what is recorded
gives its probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, masking_utils

from sparsefinder import models
from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.errors import UserError
from sparsefinder.models import masks
from sparsefinder.models.families import REFUSED, TRAITS, check_family
from sparsefinder.models.masks import pairs_of, past
from sparsefinder.models.observed_attention import Recorder, Watched
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.window import Window

SOFTMAX = Normalizer(1.0)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
OF_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 48},
    **{family: {"num_key_value_heads": 2} for family in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")},
    "lfm2": {"num_hidden_layers": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2},
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "dropout_rate": 0.0,
    },
}
MORE["mistral"]["sliding_window"] = None
MORE["qwen3"]["head_dim"] = 16


def tiny(family: str, **changes: Any) -> Any:
    """A random model; grouped heads wherever its family has them."""
    torch.manual_seed(0)
    decodes = TRAITS[family].kind == "decoder"
    own = {} if decodes else OF_SEQ2SEQ
    settings = {**SIZES, **own, **MORE.get(family, {}), **changes}
    if not decodes:
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
            settings.pop(name, None)
    config = AutoConfig.for_model(family, **settings)
    auto = AutoModelForCausalLM if decodes else AutoModelForSeq2SeqLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters() if family != "t5" else ():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # or attention is all but uniform
    return model.eval()


def batch(lengths: tuple[int, ...], left: bool = False, prefix: str = "") -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    valid = valid.flip(-1) if left else valid
    mask = valid.long()
    inputs = {f"{prefix}input_ids": ids.masked_fill(~valid, 0), f"{prefix}attention_mask": mask}
    if left and not prefix:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


decoders = pytest.mark.parametrize("family", models.DECODERS)
seq2seq = pytest.mark.parametrize("family", models.ENCODER_DECODERS)


@decoders
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_plugged_in_a_decoder_it_is_its_own_attention(family: str, left: bool) -> None:
    model = tiny(family)
    inputs = batch((17, 9, 12), left)
    real = inputs["attention_mask"].bool()
    own = model(**inputs, use_cache=False).logits[real]
    for attention in (Masked(Full(), SOFTMAX, causal=True), Bucketed(Window(99), SOFTMAX, causal=True)):
        with models.plugged(model, attention):
            torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], own, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], own, rtol=0, atol=0)


@decoders
@torch.no_grad()
def test_its_own_entmax_is_dense_entmax_plugged_in_on_either_side(family: str) -> None:
    model = tiny(family)
    models.set_normalizer(model, Normalizer(1.5))
    for left in (False, True):
        inputs = batch((17, 9, 12), left)
        real = inputs["attention_mask"].bool()
        own = model(**inputs, use_cache=False).logits[real]
        for attention in (Masked(Full(), causal=True), Dense(causal=True)):
            with models.plugged(model, attention):
                torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*models.DECODERS, *(x for x in models.ENCODER_DECODERS if x != "t5")])
@torch.no_grad()
def test_no_matrix_is_made_of_the_past(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask says which tokens are real, and what it says is what transformers' own would."""
    decodes = TRAITS[family].kind == "decoder"
    which: Any = {} if decodes else {"which": "dec"}
    model, inputs = (
        tiny(family),
        batch((17, 9, 12)) if decodes else {**batch((8, 8, 8)), **batch((17, 9, 12), prefix="decoder_")},
    )
    made: list[Tensor] = []

    def recorded(valid: Tensor) -> Tensor:
        made.append(past(valid))
        return made[-1]

    monkeypatch.setattr(masks, "past", recorded)
    largest: list[int] = []
    sdpa_mask = masking_utils.sdpa_mask

    def explicit(*args: Any, **kwargs: Any) -> Tensor | None:
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        largest.append(1 if mask is None else mask.shape[2])
        return mask

    monkeypatch.setattr(masking_utils, "sdpa_mask", explicit)
    with models.plugged(model, Masked(Full(), SOFTMAX, causal=True), **which):
        model(**inputs, use_cache=False)
    assert made
    assert max(largest, default=1) <= 2  # of the two tokens by which calls are found
    real = (inputs["attention_mask"] if decodes else inputs["decoder_attention_mask"]).bool()
    expected = real[:, None, None] & torch.ones(17, 17, dtype=torch.bool).tril()
    assert all(pairs_of(each, 17).equal(expected) for each in made)


@decoders
@torch.no_grad()
def test_recorded_queries_and_keys_give_a_layers_probabilities(family: str) -> None:
    model, recorder = tiny(family, attn_implementation="eager"), Recorder()
    shape = models.describe(model)
    inputs = batch((11, 6))
    expected = model(**inputs, output_attentions=True, use_cache=False).attentions
    expected = [each for each in expected if each is not None]
    with models.plugged(model, Watched(Masked(Full(), SOFTMAX, causal=True), recorder)):
        model(**inputs, use_cache=False)
    assert len(recorder.layers) == shape.layers == len(expected)
    for layer, probabilities in enumerate(expected):
        qk = recorder.layers[layer]
        assert qk.causal
        assert (qk.q.shape[1], qk.k.shape[1], qk.q.shape[3]) == (shape.heads, shape.key_heads, shape.head_size)
        real = qk.queries_valid[:, None, :, None]
        torch.testing.assert_close(SOFTMAX(qk.scores()) * real, probabilities * real, rtol=0, atol=1e-5)


def test_what_a_model_is_described_as() -> None:
    shapes = {family: models.describe(tiny(family)) for family in models.DECODERS}
    assert {family: shape.group for family, shape in shapes.items()} == {
        **dict.fromkeys(models.DECODERS, 2),
        "gpt2": 1,
        "gpt_neox": 1,
    }
    assert shapes["qwen3"].head_size == 16
    assert (shapes["lfm2"].layers, shapes["lfm2"].others, shapes["lfm2"].depths) == (2, 2, (0, 1))
    assert all(shape.max_length == 64 and shape.others == 0 for family, shape in shapes.items() if family != "lfm2")


@torch.no_grad()
def test_layers_with_a_window_of_their_own_keep_it() -> None:
    kinds = ["sliding_attention", "full_attention"]
    for family in ("qwen2", "qwen3", "smollm3"):
        model = tiny(family, layer_types=kinds, use_sliding_window=True, sliding_window=4, max_window_layers=1)
        assert models.describe(model).depths == (1,)
        inputs = batch((17, 9))
        real = inputs["attention_mask"].bool()
        own = model(**inputs, use_cache=False).logits[real]
        with models.plugged(model, Masked(Full(), SOFTMAX, causal=True)):
            torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], own, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="every layer looks through a sliding window"):
        models.describe(tiny("mistral", sliding_window=4))


def test_an_attention_that_sees_the_future_is_refused() -> None:
    model = tiny("llama")
    with (
        models.plugged(model, Masked(Full(), SOFTMAX)),
        pytest.raises(UserError, match="an attention with causal=True"),
    ):
        model(**batch((7, 5)))


def test_gradients_reach_every_weight() -> None:
    model = tiny("llama")
    models.set_normalizer(model, Normalizer(1.5))
    inputs = batch((17, 9))
    gradients = []
    for attention in (None, Bucketed(Window(99), causal=True)):
        model.zero_grad()
        if attention is None:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        else:
            with models.plugged(model, attention):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


@seq2seq
@torch.no_grad()
def test_each_attention_of_an_encoder_decoder_apart_and_together(family: str) -> None:
    model = tiny(family)
    for left, left_written in ((False, False), (True, False), (False, True), (True, True)):
        inputs = {**batch((17, 9, 12), left), **batch((8, 13, 5), left_written, prefix="decoder_")}
        inputs.pop("position_ids", None)
        real = inputs["decoder_attention_mask"].bool()
        own = model(**inputs, use_cache=False).logits[real]
        free = [which for which in TRAITS[family].attentions if which not in TRAITS[family].biased]
        recorded = {}
        for which in free:
            recorder = recorded[which] = Recorder()
            with models.plugged(model, Watched(Masked(Full(), SOFTMAX, causal=which == "dec"), recorder), which):
                torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], own, rtol=0, atol=1e-5)
            shape = models.describe(model, which)
            assert len(recorder.layers) == shape.layers == (2 if which == "enc" else 3)
            qk = recorder.layers[0]
            assert qk.crosses == (which == "cross")
            assert tuple(qk.graph_shape[2:]) == {"enc": (17, 17), "dec": (13, 13), "cross": (13, 17)}[which]
        attention = Masked(Full(), SOFTMAX)
        with models.plugged(model, attention, "cross"):
            if len(free) == 1:
                out = model(**inputs, use_cache=False)
            else:
                with (
                    models.plugged(model, attention, "enc"),
                    models.plugged(model, Masked(Full(), SOFTMAX, causal=True), "dec"),
                ):
                    out = model(**inputs, use_cache=False)
        torch.testing.assert_close(out.logits[real], own, rtol=0, atol=1e-5)


@seq2seq
@torch.no_grad()
def test_recorded_queries_and_keys_give_the_probabilities_of_each_attention(family: str) -> None:
    model = tiny(family, attn_implementation="eager")
    inputs = {**batch((11, 6)), **batch((5, 9), prefix="decoder_")}
    inputs.pop("position_ids", None)
    own = model(**inputs, output_attentions=True, use_cache=False)
    names = {"enc": "encoder_attentions", "dec": "decoder_attentions", "cross": "cross_attentions"}
    for which in TRAITS[family].replaceable:
        recorder = Recorder()
        with models.plugged(model, Watched(Masked(Full(), SOFTMAX, causal=which == "dec"), recorder), which):
            model(**inputs, use_cache=False)
        expected = own[names[which]]
        assert len(recorder.layers) == len(expected) == models.describe(model, which).layers
        for layer, probabilities in enumerate(expected):
            qk = recorder.layers[layer]
            assert qk.causal == (which == "dec")
            real = qk.queries_valid[:, None, :, None]
            torch.testing.assert_close(SOFTMAX(qk.scores()) * real, probabilities * real, rtol=0, atol=1e-5)


@seq2seq
@torch.no_grad()
def test_entmax_in_an_encoder_decoder(family: str) -> None:
    model = tiny(family)
    models.set_normalizer(model, Normalizer(1.5))
    inputs = {**batch((17, 9, 12)), **batch((8, 13, 5), prefix="decoder_")}
    real = inputs["decoder_attention_mask"].bool()
    own = model(**inputs, use_cache=False).logits[real]
    assert own.isfinite().all()
    with models.plugged(model, Masked(Full()), "cross"):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], own, rtol=0, atol=1e-5)


def test_which_attention_must_be_said_and_be_there() -> None:
    with pytest.raises(UserError, match="three attentions: say which of enc, dec, cross"):
        models.describe(tiny("bart"))
    with pytest.raises(UserError, match="no attention 'cross', only dec"):
        models.describe(tiny("llama"), "cross")
    with pytest.raises(UserError, match=r"learned bias to the scores of its attention 'enc'.* without a bias is cross"):
        models.describe(tiny("t5"), "enc")


@pytest.mark.parametrize("family", [*REFUSED, "nobody"])
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(UserError, match=f"model=x is a {family}, ") as caught:
        check_family(family, "model=x")
    assert "\n" not in str(caught.value)
    if family in REFUSED:
        assert REFUSED[family] in str(caught.value)


def test_a_family_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="a llama, a causal language model, and a masked language model was needed"):
        check_family("llama", "model=x", ("encoder",))


@torch.no_grad()
def test_a_learned_bias_is_added_before_entmax() -> None:
    model = tiny("t5")
    models.set_normalizer(model, Normalizer(1.5))
    inputs = {**batch((7, 4)), **batch((5, 3), prefix="decoder_")}
    layer = model.encoder.block[0].layer[0].SelfAttention
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out[0])))
    model(**inputs, use_cache=False)
    handle.remove()
    hidden, output = seen[0]
    q, k, v = (side(hidden).view(2, 7, 4, 8).transpose(1, 2) for side in (layer.q, layer.k, layer.v))
    scores = q @ k.mT + layer.compute_bias(7, 7)
    scores = scores.masked_fill(~inputs["attention_mask"].bool()[:, None, None], -torch.inf)
    expected = layer.o((Normalizer(1.5)(scores) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
