"""From a folder to a folder, as the command line does it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sources import FAMILIES, make_source, make_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import sparsefinder.conversions
from sparsefinder.conversions import (
    TARGETS,
    certify,
    convert_checkpoint,
    convert_longformer_to_led,
    convert_roberta_to_longformer,
)
from sparsefinder.conversions.length_guard import guard_length
from sparsefinder.errors import UserError


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "source"
    make_source("ForMaskedLM").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("longformer", {"attention_window": 8}),
        ("nystromformer", {"num_landmarks": 8}),
        ("bigbird", {"block_size": 2, "num_random_blocks": 1}),
        ("led", {"attention_window": 8, "decoder_output_max_length": 16}),
    ],
)
def test_every_target(target: str, settings: dict[str, Any], checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    certificate = convert_checkpoint(checkpoint, out, 64, target=target, settings=settings)
    assert certificate.passed
    assert AutoTokenizer.from_pretrained(out).model_max_length == 64
    assert target in TARGETS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_an_led_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """LED's position rows are sums of two tables, rounded once more; beside that the conversion is as exact as ever."""
    source = make_source("ForMaskedLM", type_vocab_size=2)
    source.roberta.embeddings.token_type_embeddings.weight.data[0] += 1.0
    source.to(dtype).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    settings = {"attention_window": 8, "decoder_output_max_length": 16}
    assert convert_checkpoint(str(tmp_path / "source"), tmp_path / "led", 30, target="led", settings=settings).passed
    longformer, tokenizer = convert_roberta_to_longformer(source, make_tokenizer(), 30, 8)
    led, tokenizer = convert_longformer_to_led(longformer, tokenizer, 16)
    assert led.dtype == dtype
    assert certify(led, tokenizer, longformer).passed
    led.base_model.encoder.embed_positions.weight.data[3] += 0.1
    assert (
        len(certify(led, tokenizer, longformer).failed) == 3
    )  # the states, with and without a global token, and the table


def test_a_longformer_is_lengthened_and_becomes_led(checkpoint: str, tmp_path: Path) -> None:
    short, long, led = (tmp_path / name for name in ("short", "long", "led"))
    convert_checkpoint(checkpoint, short, 32, target="longformer", settings={"attention_window": 8})
    assert convert_checkpoint(str(short), long, 64, target="longformer").passed
    assert convert_checkpoint(str(short), led, 48, target="led", settings={"decoder_output_max_length": 20}).passed
    assert AutoModelForSeq2SeqLM.from_pretrained(led).config.max_encoder_position_embeddings == 48
    with pytest.raises(UserError, match="attention_window of a Longformer stays"):
        convert_checkpoint(str(short), tmp_path / "no", 64, target="longformer", settings={"attention_window": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "reformer"}, "choose one of longformer, nystromformer, bigbird, led"),
        ({"settings": {"block_size": 2}}, "longformer has no setting block_size; it has attention_window"),
        ({"architecture": "BertForMaskedLM"}, "architecture BertForMaskedLM .* cannot be converted"),
        ({"architecture": "CamembertForMaskedLM"}, "does not load a roberta checkpoint"),
        ({"architecture": "RobertaForNothing"}, "cannot be converted"),
        ({"architecture": "RobertaTokenizer"}, "architecture RobertaTokenizer .* cannot be converted"),
        ({"architecture": "RobertaConfig"}, "architecture RobertaConfig .* cannot be converted"),
        ({"initial_model": "/nowhere/at/all"}, "/nowhere/at/all: there is no such folder"),
        ({"max_sequence_length": 10}, "shorter than"),
    ],
)
def test_bad_input_is_one_clear_line(change: dict[str, Any], message: str, checkpoint: str, tmp_path: Path) -> None:
    arguments = {
        "initial_model": checkpoint, "model_name": tmp_path / "out", "max_sequence_length": 64, "target": "longformer",
    }  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        convert_checkpoint(**{**arguments, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lost", "first"),
    [
        ("roberta.encoder.layer.1.", "roberta.encoder.layer.1.attention.output.LayerNorm.bias"),
        ("lm_head.dense.", "lm_head.dense.bias"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_checkpoint_with_a_gap_is_refused(
    target: str, lost: str, first: str, checkpoint: str, tmp_path: Path
) -> None:
    file = Path(checkpoint) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(lost)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"not in the checkpoint, the first is {first}; it is damaged") as error:
        convert_checkpoint(checkpoint, tmp_path / "out", 64, target=target)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM", "ForMultipleChoice"])
def test_a_head_that_the_checkpoint_has_not_is_named_and_the_same_every_time(
    head: str, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    make_source("ForQuestionAnswering", family).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with caplog.at_level(logging.WARNING):
            convert_checkpoint(
                str(source), tmp_path / str(seed), 32, target="longformer", architecture=f"{family}{head}",
                settings={"attention_window": 8},
            )  # fmt: skip
        assert torch.equal(before, torch.get_rng_state())
        weights.append(load_file(tmp_path / str(seed) / "model.safetensors"))
    assert "drawn anew, train them" in caplog.text
    assert ("lm_head.dense.weight" if head == "ForMaskedLM" else "classifier.") in caplog.text
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_loaded_led_is_guarded_on_both_sides(checkpoint: str, tmp_path: Path) -> None:
    """As `docs/reference/conversions.md` says: `generate` never shows its input to the model below the head."""
    settings = {"attention_window": 8, "decoder_output_max_length": 16}
    convert_checkpoint(checkpoint, tmp_path / "led", 30, target="led", settings=settings)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "led")
    long = torch.full((1, 31), 7)
    with guard_length(model.base_model, 30):
        assert model.generate(long, max_new_tokens=2).shape[1] > 1
    guard_length(model.base_model.encoder, 30)
    guard_length(model.base_model.decoder, 16)
    with pytest.raises(UserError, match="input of 31 tokens, and the model's longest is 30"):
        model.generate(long, max_new_tokens=2)
    with pytest.raises(UserError, match="input of 17 tokens, and the model's longest is 16"):
        model(input_ids=long[:, :30], decoder_input_ids=long[:, :17])
    advice = (Path(__file__).parents[2] / "docs" / "reference" / "conversions.md").read_text(encoding="utf-8")
    assert "guard_length(model.base_model.encoder, length)" in advice


def test_an_existing_folder_is_refused_before_any_work(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        convert_checkpoint("/nowhere/at/all", tmp_path, 64, target="longformer")


def test_every_name_of_the_package_is_there() -> None:
    for name in sparsefinder.conversions.__all__:
        assert getattr(sparsefinder.conversions, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'reformer'"):
        sparsefinder.conversions.reformer  # noqa: B018
