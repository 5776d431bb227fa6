"""`--run_test`: a saved LSG model under every Auto class of its family, whatever head it was saved with."""

import os

import pytest
import transformers
from lsg_tiny import NAMES, heads, save_plain
from safetensors.torch import load_file, save_file

from scripts import convert_checkpoint
from sparsefinder.errors import UserError
from sparsefinder.lsg import convert, smoke_test
from sparsefinder.lsg.families import FAMILIES
from sparsefinder.lsg.smoke_test import try_heads

KINDS = [
    ("bert", "BertForMultipleChoice"),  # `classifier` with one row, where other heads have two
    ("distilbert", "DistilBertForTokenClassification"),  # and without the layer in front of it that others have
    ("electra", "ElectraForTokenClassification"),  # the same by another name
    ("bart", "BartForCausalLM"),  # a decoder alone: no encoder for other heads
]
EVERY = [pair for name in NAMES for pair in heads(name)]
FULL = int(os.environ.get("SPARSEFINDER_KILLS", "10")) > 10
SMALL = {"block_size": 16, "sparse_block_size": 16}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize(("name", "architecture"), EVERY if FULL else KINDS)
def test_every_head_of_every_architecture_runs(name, architecture, tmp_path, capsys):
    source = save_plain(name, tmp_path / "source", architecture)
    given = ["--initial_model", str(source), "--model_name", str(tmp_path / "out"), "--max_sequence_length", "128"]
    assert convert_checkpoint.main([*given, "--model_kwargs", repr(SMALL), "--run_test"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "→" in line]
    assert all(line.endswith("finite") for line in lines)
    assert any(f"→ LSG{architecture}: 128 tokens" in line for line in lines)
    alone = architecture.endswith("ForCausalLM") and FAMILIES[name].encoder_decoder
    assert len(lines) == (1 if alone else len(FAMILIES[name].auto_classes()))


def test_a_head_that_does_not_run_is_named_after_the_others_and_the_model_stays(tmp_path, monkeypatch):
    source = save_plain("bert", tmp_path / "source")
    convert(source, tmp_path / "out", 128, **SMALL)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())

    def broken(model, auto, ids, mask):
        if auto == "AutoModelForMultipleChoice":
            raise KeyError("choices")
        return inputs(model, auto, ids, mask)

    inputs = smoke_test._inputs
    monkeypatch.setattr(smoke_test, "_inputs", broken)
    lines = []
    with pytest.raises(UserError, match=r"is saved and whole, but AutoModelForMultipleChoice cannot run it") as error:
        lines.extend(try_heads(tmp_path / "out"))  # keeps what came before the error
    assert "\n" not in str(error.value)
    assert [line for line in lines if "FAILED" in line] == [
        "AutoModelForMultipleChoice → LSGBertForMultipleChoice: FAILED (KeyError: 'choices')"
    ]
    assert lines[-1].startswith("fill-mask")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_a_body_that_does_not_fit_is_no_head(tmp_path):
    """Another size is the business of heads: of a damaged body it is an error, not a new start."""
    source = save_plain("bert", tmp_path / "source", "BertForSequenceClassification")
    convert(source, tmp_path / "out", 128, **SMALL)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file(weights | {name: weights[name][:3].clone()}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    lines = []
    with pytest.raises(UserError):
        lines.extend(try_heads(tmp_path / "out"))
    assert len(lines) == len(FAMILIES["bert"].auto_classes())
    assert all("FAILED" in line for line in lines)
    assert all(f"{name.removeprefix('bert.')} has another size there" in line for line in lines)
