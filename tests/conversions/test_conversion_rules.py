"""Positions, lengths, dtypes, gradients, saving and bad input: the same rules for every target."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_sources import LENGTH, gap, hidden, make_source, make_tokenizer, padded_batch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from sparsefinder.conversions import (
    certificate,
    convert_longformer_to_led,
    convert_roberta_to_bigbird,
    convert_roberta_to_longformer,
    convert_roberta_to_nystromformer,
    resize_longformer,
    save,
)
from sparsefinder.errors import UserError
from sparsefinder.models import set_normalizer
from sparsefinder.numerics.normalizers import Normalizer

MAXIMUM = 60
CONVERT: dict[str, Callable[..., Any]] = {
    "longformer": lambda model, tokenizer, length=MAXIMUM: convert_roberta_to_longformer(model, tokenizer, length, 8),
    "nystromformer": convert_roberta_to_nystromformer,
    "bigbird": lambda model, tokenizer, length=MAXIMUM: convert_roberta_to_bigbird(
        model, tokenizer, length, block_size=3, num_random_blocks=1
    ),
}
OFFSET = {"longformer": 2, "nystromformer": 2, "bigbird": 0}
targets = pytest.mark.parametrize("target", CONVERT)


@targets
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1, 2 * LENGTH, 65])
def test_token_i_reads_the_sources_row_i_mod_its_length(target: str, length: int) -> None:
    source = make_source()
    model, tokenizer = CONVERT[target](source, make_tokenizer(), length)
    read = []
    model.embeddings.position_embeddings.register_forward_hook(lambda module, args, output: read.append(args[0]))
    ids = torch.randint(5, 50, (1, length))
    hidden(model, ids, torch.ones_like(ids))
    rows = model.embeddings.position_embeddings.weight
    assert read[0].max() < len(rows)
    table = source.embeddings.position_embeddings.weight
    for i in range(length):
        assert torch.equal(rows[read[0][0, i]], table[2 + i % LENGTH])
    assert tokenizer.model_max_length == length
    assert torch.equal(rows[: OFFSET[target]], table[: OFFSET[target]])


@targets
def test_a_longer_input_is_one_clear_line(target: str) -> None:
    model, _ = CONVERT[target](make_source("ForMaskedLM"), make_tokenizer(), MAXIMUM)
    ids = torch.randint(5, 50, (1, MAXIMUM + 1))
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.randn(1, MAXIMUM + 1, 16)}):
        with pytest.raises(UserError, match="input of 61 tokens, and the model's longest is 60") as error:
            model(**inputs)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        model(ids)


@targets
def test_padding_and_batch_order_never_change_an_output(target: str) -> None:
    model, _ = CONVERT[target](make_source(), make_tokenizer(), MAXIMUM)
    ids, valid = padded_batch(50)
    together = hidden(model, ids, valid)
    if target == "bigbird":  # alone, the shorter rows would run with full attention
        alone = hidden(model, ids[:1], valid[:1])
        torch.testing.assert_close(alone, together[:1], atol=1e-4, rtol=0)
    else:
        for row, real in enumerate(valid.sum(1).tolist()):
            alone = hidden(model, ids[row : row + 1, :real], valid[row : row + 1, :real])
            torch.testing.assert_close(alone, together[row : row + 1, :real], atol=1e-4, rtol=0)
    turned = hidden(model, ids.flip(0), valid.flip(0)).flip(0)
    assert gap(together, turned, valid) < 1e-4


@targets
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_every_parameter_gets_a_finite_gradient(target: str, head: str) -> None:
    model, _ = CONVERT[target](make_source(head).train(), make_tokenizer(), MAXIMUM)
    assert model.training
    ids, valid = padded_batch(MAXIMUM)
    extra = {}
    if target == "longformer":
        extra["global_attention_mask"] = torch.zeros_like(ids)
        extra["global_attention_mask"][:, 0] = 1
    outputs = model(input_ids=ids, attention_mask=valid, **extra)
    total = outputs[0].square().sum()
    if getattr(outputs, "pooler_output", None) is not None:
        total = total + outputs.pooler_output.sum()
    total.backward()
    used = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, p in used.items() if p.grad is None or not p.grad.isfinite().all()] == []
    frozen = [name for name in dict(model.named_parameters()) if name not in used]
    assert frozen == (
        ["bert.pooler.weight", "bert.pooler.bias"] if (target, head) == ("bigbird", "ForMaskedLM") else []
    )


@targets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_source("ForMaskedLM", initializer_range=0.05).to(dtype)
    model, tokenizer = CONVERT[target](source, make_tokenizer(), MAXIMUM)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids, valid = padded_batch(MAXIMUM)
    exact, _ = CONVERT[target](copy.deepcopy(source).float(), make_tokenizer(), MAXIMUM)
    found, expected = hidden(model, ids, valid), hidden(exact, ids, valid)
    assert found.isfinite().all()
    assert gap(expected, found.float(), valid) < 60 * torch.finfo(dtype).eps
    save(model, tokenizer, source, tmp_path / "out")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    assert torch.equal(found[0], hidden(again, ids, valid)[0])


@targets
def test_saved_with_a_certificate_and_loaded_anywhere(target: str, tmp_path: Path) -> None:
    source = make_source("ForMaskedLM")
    model, tokenizer = CONVERT[target](source, make_tokenizer(), MAXIMUM)
    result = save(model, tokenizer, source, tmp_path / "out")
    assert result.passed
    assert certificate.read(tmp_path / "out") == result
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["passed"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| short-input difference of hidden states |" in card
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    ids, valid = padded_batch(MAXIMUM)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=valid).logits, again(ids, attention_mask=valid).logits)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokens.model_max_length == MAXIMUM
    assert tokens("w5 w6 w7")["input_ids"] == make_tokenizer()("w5 w6 w7")["input_ids"]
    assert len(tokens(" ".join(["w5"] * 100), truncation=True)["input_ids"]) == MAXIMUM


@targets
def test_sharded_weights_are_the_same_weights(target: str, tmp_path: Path) -> None:
    model, _ = CONVERT[target](make_source("ForMaskedLM"), make_tokenizer(), MAXIMUM)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@targets
def test_fill_mask_at_once_without_saving(target: str) -> None:
    source = make_source("ForMaskedLM")
    model, tokenizer = CONVERT[target](source, make_tokenizer(), MAXIMUM)
    text = "w5 w6 <mask> w8"
    expected = pipeline("fill-mask", model=source, tokenizer=make_tokenizer())(text)
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer)(text)
    if target != "longformer":  # whose window of 8 does not cover the text
        assert [answer["token_str"] for answer in found] == [answer["token_str"] for answer in expected]
    assert pipeline("fill-mask", model=model, tokenizer=tokenizer)(text + " w9" * 50)[0]["score"] > 0


@targets
def test_conversion_leaves_the_source_and_the_random_state_alone(target: str) -> None:
    source, tokenizer = make_source("ForMaskedLM"), make_tokenizer()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    settings = source.config.to_dict()
    random = torch.get_rng_state()
    first, _ = CONVERT[target](source, tokenizer, MAXIMUM)
    assert torch.equal(random, torch.get_rng_state())
    second, _ = CONVERT[target](source, tokenizer, MAXIMUM)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    for parameter in first.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    assert source.config.to_dict() == settings
    assert tokenizer.model_max_length == LENGTH
    copy.deepcopy(second)


@targets
def test_settings_come_from_the_source(target: str) -> None:
    source = make_source(
        "ForTokenClassification", hidden_dropout_prob=0.3, layer_norm_eps=1e-3, type_vocab_size=3, id2label={0: "a", 1: "b"}
    )  # fmt: skip
    model, _ = CONVERT[target](source, make_tokenizer(), MAXIMUM)
    for name in ("hidden_dropout_prob", "layer_norm_eps", "type_vocab_size", "id2label", "hidden_act", "pad_token_id"):
        assert getattr(model.config, name) == getattr(source.config, name)
    assert model.config.sep_token_id == 2
    kept = model.base_model.embeddings.token_type_embeddings.weight
    assert torch.equal(kept, source.roberta.embeddings.token_type_embeddings.weight)


@targets
def test_another_padding_id(target: str) -> None:
    """CamemBERT-like special tokens: `<s>` and `</s>` not at 0 and 2, padding at 3, so that four rows are reserved."""
    tokenizer = make_tokenizer(special="<unk> <s> </s> <pad> <mask>")
    source = make_source(
        family="Camembert", pad_token_id=3, bos_token_id=1, eos_token_id=2, max_position_embeddings=LENGTH + 4
    )
    model, _ = CONVERT[target](source, tokenizer, MAXIMUM)
    ids = torch.randint(5, 50, (1, 5))
    assert (
        gap(hidden(source, ids, torch.ones_like(ids)), hidden(model, ids, torch.ones_like(ids)), torch.ones_like(ids))
        < 1e-4
    )


@targets
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "roberta-base"}, "'roberta-base' is no RoBERTa"),
        ({"model": "bert"}, "a BertModel is no RoBERTa; .* is made from roberta, xlm-roberta, camembert"),
        ({"model": "entailment"}, "no RoBERTa"),
        ({"length": LENGTH - 1}, "maximum length 23 is shorter than the source model's 24"),
        ({"length": "60"}, "needed: a whole number of tokens"),
        ({"tokenizer": make_tokenizer(51)}, "another vocabulary: it needs 51 word embeddings and the model has 50"),
        ({"tokenizer": make_tokenizer(40)}, "another vocabulary: 40 tokens for a model of 50"),
        ({"tokenizer": make_tokenizer(special="<pad> <s> </s> <unk> <mask>")}, "pad_token_id is 0 and the model's is 1"),
        ({"tokenizer": None}, "no tokenizer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(target: str, change: dict[str, Any], message: str) -> None:
    model: Any = change.get("model")
    if model == "bert":
        settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = transformers.BertModel(transformers.BertConfig(**settings, vocab_size=50))
    elif model == "entailment":
        model = torch.nn.Linear(2, 2)
    model = make_source() if model is None else model
    with pytest.raises(UserError, match=message) as error:
        CONVERT[target](model, change.get("tokenizer", make_tokenizer()), change.get("length", MAXIMUM))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_window": 7}, "attention_window is 7; needed: an even number"),
        ({"attention_window": 0}, "attention_window is 0"),
        ({"attention_window": 2}, "4 or more"),
        ({"attention_window": 62}, "attention_window 62 is larger than the maximum length 60"),
        ({"attention_window": [4]}, "1 entries for 2 layers"),
        ({"attention_window": [6, 8]}, "windows that divide it"),
        ({"attention_window": 8.0}, "attention_window is 8.0"),
    ],
)
def test_windows_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert_roberta_to_longformer(make_source(), make_tokenizer(), MAXIMUM, **settings)


def test_the_default_window_is_accepted_for_short_models() -> None:
    model, _ = convert_roberta_to_longformer(make_source(), make_tokenizer(), MAXIMUM)
    assert model.config.attention_window == [512, 512]
    ids = torch.randint(5, 50, (1, MAXIMUM))
    assert hidden(model, ids, torch.ones_like(ids)).isfinite().all()


def test_further_bad_input() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(
        UserError, match="RobertaForCausalLM has no counterpart in longformer; convert one of RobertaModel"
    ):
        convert_roberta_to_longformer(make_source("ForCausalLM"), tokenizer, MAXIMUM)
    with pytest.raises(UserError, match="is_decoder"):
        convert_roberta_to_nystromformer(make_source(is_decoder=True), tokenizer, MAXIMUM)
    with pytest.raises(UserError, match="add_cross_attention"):
        convert_roberta_to_bigbird(make_source(is_decoder=True, add_cross_attention=True), tokenizer, MAXIMUM)
    with pytest.raises(UserError, match="num_landmarks is 7 for a length of 60 tokens"):
        convert_roberta_to_nystromformer(make_source(), tokenizer, MAXIMUM, num_landmarks=7)
    with pytest.raises(UserError, match="conv_kernel_size is 4"):
        convert_roberta_to_nystromformer(make_source(), tokenizer, MAXIMUM, conv_kernel_size=4)
    with pytest.raises(UserError, match="block_sparse or original_full"):
        convert_roberta_to_bigbird(make_source(), tokenizer, MAXIMUM, attention_type="sparse")
    with pytest.raises(UserError, match="num_random_blocks is 0"):
        convert_roberta_to_bigbird(make_source(), tokenizer, MAXIMUM, num_random_blocks=0)
    with pytest.raises(UserError, match="is no Longformer"):
        resize_longformer(make_source(), tokenizer, MAXIMUM)
    with pytest.raises(UserError, match="is no Longformer"):
        convert_longformer_to_led(make_source(), tokenizer)
    longformer, longer = convert_roberta_to_longformer(make_source("ForMultipleChoice"), tokenizer, MAXIMUM)
    with pytest.raises(UserError, match="shorter than the source model's 60"):
        resize_longformer(longformer, longer, MAXIMUM - 1)
    with pytest.raises(UserError, match="LongformerForMultipleChoice has no counterpart in led"):
        convert_longformer_to_led(longformer, longer)


def test_landmarks_need_inputs_of_the_configured_length() -> None:
    model, _ = convert_roberta_to_nystromformer(make_source(), make_tokenizer(), MAXIMUM, num_landmarks=12)
    ids = torch.randint(5, 50, (2, MAXIMUM))
    assert hidden(model, ids, torch.ones_like(ids)).isfinite().all()
    with pytest.raises(
        UserError, match="input of 30 tokens, and with its landmarks this Nyströmformer needs exactly 60"
    ):
        model(ids[:, :30])  # which transformers would take for one sentence of 60 tokens


def test_led_states_what_its_layer_norms_cost(tmp_path: Path) -> None:
    longformer, tokenizer = convert_roberta_to_longformer(make_source(layer_norm_eps=1e-3), make_tokenizer(), 30, 8)
    model, led_tokenizer = convert_longformer_to_led(longformer, tokenizer, 10)
    checks = {check.name: check for check in save(model, led_tokenizer, longformer, tmp_path / "out").checks}
    assert checks["short-input difference of hidden states"].measured < 1e-4
    assert checks["difference at the source's maximum length"].measured > 1e-4
    model.encoder.layers[1].fc1.weight.data[0, 0] += 1
    with pytest.raises(UserError, match="difference of hidden states"):
        save(model, led_tokenizer, longformer, tmp_path / "other")


def test_led_reads_no_row_beyond_its_tables(tmp_path: Path) -> None:
    longformer, tokenizer = convert_roberta_to_longformer(make_source("ForMaskedLM"), make_tokenizer(), 30, 8)
    model, led_tokenizer = convert_longformer_to_led(longformer, tokenizer, 10)
    assert save(model, led_tokenizer, longformer, tmp_path / "out").passed
    source = longformer.longformer.embeddings
    expected = source.position_embeddings.weight[2:] + source.token_type_embeddings.weight[0]
    for side, rows in ((model.led.encoder, 32), (model.led.decoder, 10)):
        assert len(side.embed_positions.weight) == rows
        for i, row in enumerate(side.embed_positions.weight):
            torch.testing.assert_close(row, expected[i % 30])
    ids = torch.randint(5, 50, (1, 30))
    for inputs in (
        {"input_ids": torch.randint(5, 50, (1, 31)), "labels": ids[:, :5]},
        {"input_ids": ids, "labels": ids},
    ):
        with pytest.raises(UserError, match="longest is"):
            model(**inputs)
    marked = torch.zeros_like(ids)
    marked[:, 0] = 1
    model(input_ids=ids, labels=ids[:, :10], global_attention_mask=marked).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@targets
def test_an_entmax_source_becomes_softmax_and_the_certificate_says_so(target: str, tmp_path: Path) -> None:
    source = make_source("ForMaskedLM")
    set_normalizer(source, Normalizer(1.5))
    ids, valid = padded_batch(LENGTH)
    before = hidden(source, ids, valid)
    model, tokenizer = CONVERT[target](source, make_tokenizer())
    result = save(model, tokenizer, source, tmp_path / "out")
    assert {check.name: check.measured for check in result.checks}["alpha of the source's attention"] == 1.5
    assert torch.equal(before, hidden(source, ids, valid))
    assert not hasattr(model.config, "attention_alpha")
    assert not {"attention_alpha", "attn_implementation"} & {
        *json.loads((tmp_path / "out" / "config.json").read_text())
    }


@targets
def test_a_small_difference_is_no_rounding(target: str, tmp_path: Path) -> None:
    """A thousandth in one bias of the last layer: less than anyone would see, more than float32 explains."""
    source = make_source("ForMaskedLM")
    model, tokenizer = CONVERT[target](source, make_tokenizer(), MAXIMUM)
    layer = model.base_model.encoder.layer[-1].output
    layer.get_submodule("LayerNorm").bias.data[0] += 1e-3
    with pytest.raises(UserError, match=r"hidden states: measured 0\.001\d*, allowed 0\.0001"):
        save(model, tokenizer, source, tmp_path / "model")


def test_nothing_is_saved_when_a_check_fails(tmp_path: Path) -> None:
    source = make_source("ForMaskedLM")
    for target, convert in CONVERT.items():
        model, tokenizer = convert(source, make_tokenizer(), MAXIMUM)
        table = model.base_model.embeddings.position_embeddings.weight
        table.data[-1] += 1
        with pytest.raises(UserError, match="rows that differ: measured 1, allowed 0"):
            save(model, tokenizer, source, tmp_path / target)
        table.data[-1] -= 1
        tokenizer.model_max_length = MAXIMUM + 30
        with pytest.raises(UserError, match=r"model_max_length|last position row"):
            save(model, tokenizer, source, tmp_path / target)
    with pytest.raises(UserError, match="hidden states: measured"):
        save(*CONVERT["longformer"](make_source("ForMaskedLM"), make_tokenizer()), source, tmp_path / "other")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="exists"):
        save(*CONVERT["longformer"](source, make_tokenizer()), source, tmp_path)
