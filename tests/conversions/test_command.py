"""From a folder to a folder, as the command line does it."""

from pathlib import Path
from typing import Any

import pytest
from tiny_sources import make_source, make_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import sparsefinder.conversions
from sparsefinder.conversions import TARGETS, convert_checkpoint
from sparsefinder.store import UserError


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
        ({"initial_model": "/nowhere/at/all"}, "no configuration can be loaded from /nowhere/at/all"),
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


def test_an_existing_folder_is_refused_before_any_work(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        convert_checkpoint("/nowhere/at/all", tmp_path, 64, target="longformer")


def test_every_name_of_the_package_is_there() -> None:
    for name in sparsefinder.conversions.__all__:
        assert getattr(sparsefinder.conversions, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'reformer'"):
        sparsefinder.conversions.reformer  # noqa: B018
