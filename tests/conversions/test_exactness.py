"""Where a conversion must be the source's function, on every length; where it cannot, that the distance is what is said."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_sources import FAMILIES, LENGTH, gap, hidden, make_source, make_tokenizer, padded_batch

from sparsefinder.conversions import (
    convert_longformer_to_led,
    convert_roberta_to_bigbird,
    convert_roberta_to_longformer,
    convert_roberta_to_nystromformer,
    full_attention,
    landmarks,
    resize_longformer,
)
from sparsefinder.conversions.bigbird import CAUSAL_SINCE
from sparsefinder.conversions.bigbird import EXACT_HEADS as BIGBIRD_EXACT
from sparsefinder.conversions.bigbird import HEADS as BIGBIRD_HEADS
from sparsefinder.conversions.longformer import HEADS as LONGFORMER_HEADS
from sparsefinder.conversions.nystromformer import EXACT_HEADS as NYSTROMFORMER_EXACT
from sparsefinder.conversions.nystromformer import HEADS as NYSTROMFORMER_HEADS
from sparsefinder.errors import UserError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("types", [1, 2])
def test_longformer_is_roberta_on_every_length(family: str, types: int) -> None:
    source = make_source(family=family, type_vocab_size=types)
    model, _ = convert_roberta_to_longformer(source, make_tokenizer(), 64, attention_window=48)
    for length in range(1, LENGTH + 1):
        ids, valid = padded_batch(length)
        expected = hidden(source, ids, valid)
        assert gap(expected, hidden(model, ids, valid), valid) < 1e-4
        for place in {0, length // 2}:
            marked = torch.zeros_like(ids)
            marked[:, place] = valid[:, place]
            assert gap(expected, hidden(model, ids, valid, global_attention_mask=marked), valid) < 1e-4


@pytest.mark.parametrize("window", [4, 10, [4, 20]])
def test_longformer_beyond_its_window_is_masked_roberta(window: Any) -> None:
    """A slow reference: RoBERTa with the window as a mask, layer by layer."""
    source = make_source()
    model, _ = convert_roberta_to_longformer(source, make_tokenizer(), 32, attention_window=window)
    windows = window if isinstance(window, list) else [window, window]
    ids, valid = padded_batch(LENGTH)
    with torch.no_grad():
        states = source.embeddings(ids)
        places = torch.arange(LENGTH)
        for layer, size in zip(source.encoder.layer, windows, strict=True):
            near = (places[:, None] - places[None]).abs() <= size // 2
            allowed = near[None, None] & valid[:, None, None].bool()
            states = layer(states, torch.zeros(allowed.shape).masked_fill(~allowed, -1e9))
    assert gap(states, hidden(model, ids, valid), valid) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_bigbird_in_full_attention_is_roberta_on_every_length(family: str, activation: str) -> None:
    source = make_source(family=family, hidden_act=activation)
    model, _ = convert_roberta_to_bigbird(source, make_tokenizer(), 40, block_size=2, num_random_blocks=1)
    full, _ = convert_roberta_to_bigbird(source, make_tokenizer(), 40, attention_type="original_full")
    for length in range(1, LENGTH + 1):
        ids, valid = padded_batch(length)
        expected = hidden(source, ids, valid)
        assert gap(expected, hidden(full, ids, valid), valid) < 1e-4
        with full_attention(model):
            assert gap(expected, hidden(model, ids, valid), valid) < 1e-4
    assert gap(expected, hidden(model, ids, valid), valid) > 1e-3, "sparse mode should differ here"


@pytest.mark.parametrize("family", FAMILIES)
def test_nystromformer_with_a_landmark_a_token_is_roberta(family: str) -> None:
    source = make_source(family=family)
    model, _ = convert_roberta_to_nystromformer(source, make_tokenizer(), 60)
    for length in range(1, LENGTH + 1):
        ids, valid = padded_batch(length)
        assert gap(hidden(source, ids, valid), hidden(model, ids, valid), valid) < 1e-4


def test_nystromformer_approaches_the_source_with_its_landmarks() -> None:
    """Half the landmarks are closer than one landmark, and all of them are there."""
    source = make_source(initializer_range=0.1)
    model, _ = convert_roberta_to_nystromformer(source, make_tokenizer(), 48, num_landmarks=8)
    ids, valid = torch.randint(5, 50, (8, LENGTH)), torch.ones(8, LENGTH, dtype=torch.long)
    expected = hidden(source, ids, valid)
    distance = {}
    for number in (1, 12, 24):
        with landmarks(model, number, LENGTH):
            distance[number] = float((expected - hidden(model, ids, valid)).square().mean().sqrt())
    assert distance[24] < 1e-5 < distance[12] < distance[1]
    assert [layer.attention.self.num_landmarks for layer in model.encoder.layer] == [8, 8]


def logits(model: Any, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": valid}
    if model.config.model_type == "longformer":
        inputs["global_attention_mask"] = torch.zeros_like(ids)
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs)
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)[valid.bool()]
    found: torch.Tensor = outputs.logits
    return found[valid.bool()] if found.dim() == 3 else found


@pytest.mark.parametrize("head", [head for head in LONGFORMER_HEADS if head != "Model"])
def test_longformer_heads_come_along(head: str) -> None:
    source = make_source(head, num_labels=2 if head == "ForQuestionAnswering" else 3)
    model, _ = convert_roberta_to_longformer(source, make_tokenizer(), 64, attention_window=48)
    ids, valid = padded_batch(LENGTH)
    torch.testing.assert_close(logits(source, ids, valid), logits(model, ids, valid), atol=1e-4, rtol=1e-4)
    assert model.config.num_labels == source.config.num_labels


@pytest.mark.parametrize("head", [head for head in BIGBIRD_HEADS if head != "Model"])
def test_bigbird_heads_come_along(head: str) -> None:
    source = make_source(head, num_labels=2 if head == "ForQuestionAnswering" else 3)
    model, _ = convert_roberta_to_bigbird(source, make_tokenizer(), 64)
    ids, valid = padded_batch(LENGTH)
    expected, found = logits(source, ids, valid), logits(model, ids, valid)
    if head in (*BIGBIRD_EXACT, "ForMaskedLM", "ForCausalLM"):
        torch.testing.assert_close(expected, found, atol=1e-4, rtol=1e-4)
    elif head == "ForSequenceClassification":
        torch.testing.assert_close(model.classifier.dense.weight, source.classifier.dense.weight)
        torch.testing.assert_close(model.classifier.out_proj.weight, source.classifier.out_proj.weight)
    else:
        # Beside the question, whose answers BigBird rules out, the layer in front of the head does little.
        context = found.abs() < 1e5
        error = (expected - found)[context].square().mean().sqrt() / expected[context].std()
        assert float(error) < 0.5


@pytest.mark.parametrize("head", [head for head in NYSTROMFORMER_HEADS if head != "Model"])
def test_nystromformer_heads_come_along(head: str) -> None:
    source = make_source(head, num_labels=2 if head == "ForQuestionAnswering" else 3)
    model, _ = convert_roberta_to_nystromformer(source, make_tokenizer(), 64)
    ids, valid = padded_batch(LENGTH)
    if head in (*NYSTROMFORMER_EXACT, "ForMaskedLM"):
        torch.testing.assert_close(logits(source, ids, valid), logits(model, ids, valid), atol=1e-4, rtol=1e-4)
    elif head == "ForMultipleChoice":
        torch.testing.assert_close(model.pre_classifier.weight, source.roberta.pooler.dense.weight)
        torch.testing.assert_close(model.classifier.weight, source.classifier.weight)
    else:
        torch.testing.assert_close(model.classifier.out_proj.weight, source.classifier.out_proj.weight)


def test_a_decoder_is_refused_where_bigbird_is_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsefinder.conversions.bigbird.CAUSAL_SINCE", Version("99"))
    with pytest.raises(UserError, match=r"see the future: install 99 or later"):
        convert_roberta_to_bigbird(make_source("ForCausalLM", is_decoder=True), make_tokenizer(), 40)


def test_a_decoder_becomes_a_causal_bigbird() -> None:
    source = make_source("ForCausalLM", is_decoder=True)
    if Version(transformers.__version__) < CAUSAL_SINCE:
        with pytest.raises(UserError, match="see the future"):
            convert_roberta_to_bigbird(source, make_tokenizer(), 40)
        return
    model, _ = convert_roberta_to_bigbird(source, make_tokenizer(), 40)
    assert model.config.attention_type == "original_full"
    ids = torch.randint(5, 50, (2, 12))
    expected = ids
    with torch.no_grad():
        torch.testing.assert_close(source(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        # Step by step: RoBERTa's own `generate` counts positions from 0 (transformers 5.23), its forward pass from 2.
        for _ in range(6):
            expected = torch.cat([expected, source(expected).logits[:, -1:].argmax(-1)], dim=1)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
        assert torch.equal(expected, model.generate(ids, attention_mask=torch.ones_like(ids), **settings))


def test_pooler_comes_along_or_stays_away() -> None:
    ids, valid = padded_batch(9)
    source = make_source()
    for convert in (convert_roberta_to_longformer, convert_roberta_to_bigbird):
        model, _ = convert(source, make_tokenizer(), 512)
        with torch.no_grad():
            torch.testing.assert_close(
                source(ids, valid).pooler_output, model(ids, valid).pooler_output, atol=1e-4, rtol=0
            )
    without = type(source)(source.config, add_pooling_layer=False)
    assert convert_roberta_to_longformer(without, make_tokenizer(), 64, 32)[0].pooler is None
    assert convert_roberta_to_bigbird(without, make_tokenizer(), 64)[0].pooler is None


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForQuestionAnswering", "ForTokenClassification"])
def test_resized_longformer_is_the_same_model(head: str) -> None:
    source, tokenizer = convert_roberta_to_longformer(make_source(head), make_tokenizer(), 32, [4, 8])
    model, resized = resize_longformer(source, tokenizer, 72)
    assert type(model) is type(source)
    assert (resized.model_max_length, tokenizer.model_max_length) == (72, 32)
    assert model.config.attention_window == [4, 8]
    ids, valid = padded_batch(32)
    assert torch.equal(hidden(source, ids, valid), hidden(model, ids, valid))


@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForQuestionAnswering"])
def test_led_encoder_is_the_longformer(head: str, types: int) -> None:
    source, tokenizer = convert_roberta_to_longformer(make_source(head, type_vocab_size=types), make_tokenizer(), 30, 8)
    model, led_tokenizer = convert_longformer_to_led(source, tokenizer, 40)
    assert led_tokenizer.model_max_length == 30
    led = getattr(model, "led", model)
    for length in (1, 7, 8, 29, 30):
        ids, valid = padded_batch(length)
        marked = torch.zeros_like(ids)
        marked[:, 0] = 1
        expected = hidden(source, ids, valid, global_attention_mask=marked)
        with torch.no_grad():
            found = led.encoder(ids, attention_mask=valid, global_attention_mask=marked).last_hidden_state
        assert gap(expected, found, valid) < 1e-4


def test_led_generates_and_keeps_the_bias_of_the_lm_head() -> None:
    source, tokenizer = convert_roberta_to_longformer(make_source("ForMaskedLM"), make_tokenizer(), 30, 8)
    model, _ = convert_longformer_to_led(source, tokenizer, 12)
    assert torch.equal(model.final_logits_bias[0], source.lm_head.bias)
    assert model.lm_head.weight is model.led.shared.weight
    with torch.no_grad():
        ids = model.generate(torch.randint(5, 50, (2, 30)), max_new_tokens=8, num_beams=2)
    assert ids.shape[0] == 2
    assert (ids[:, 0] == model.config.eos_token_id).all()
