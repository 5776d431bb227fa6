"""Conversion of every family, its certificate, the code that a folder carries, and the command line."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lsg_tiny import (
    NAMES,
    POSITIONS,
    SPECIAL,
    VOCABULARY,
    heads,
    plain_config,
    plain_model,
    save_plain,
    text,
    tokenizer,
)
from safetensors.torch import load_file

from sparsefinder.conversions.certificate import Certificate, read
from sparsefinder.errors import UserError
from sparsefinder.lsg import convert, from_pretrained
from sparsefinder.lsg.embedding_tables import global_rows, global_table, position_tables, spread_positions, word_table
from sparsefinder.lsg.equivalence import certify
from sparsefinder.lsg.families import FAMILIES
from sparsefinder.lsg.smoke_test import try_heads
from sparsefinder.models import set_normalizer
from sparsefinder.numerics.normalizers import Normalizer

ROOT = Path(__file__).parents[2]
SMALL = {"block_size": 4, "sparse_block_size": 4}
LENGTH = 150


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return save_plain("roberta", tmp_path_factory.mktemp("source") / "roberta")


@pytest.fixture(scope="module")
def converted(roberta, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "lsg-roberta"
    return out, *convert(roberta, out, LENGTH, **SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_is_lengthened_checked_and_usable_at_once(name, tmp_path):
    source = save_plain(name, tmp_path / "source")
    plain, family = plain_model(name, FAMILIES[name].default), FAMILIES[name]
    model, new_tokenizer = convert(source, tmp_path / "out", LENGTH, **SMALL)
    assert new_tokenizer.model_max_length == LENGTH
    reserved = family.reserved(plain.config)
    for part, table in position_tables(model, family).items():
        before = position_tables(plain, family)[part].weight
        assert table.weight.shape[0] == reserved + LENGTH
        for token in (0, 1, POSITIONS - 1, POSITIONS, POSITIONS + 5, LENGTH - 1):
            if name == "pegasus":
                assert token >= POSITIONS or torch.allclose(table.weight[token], before[token])
            else:
                assert torch.equal(table.weight[reserved + token], before[reserved + token % POSITIONS])
    ids = text(LENGTH, 2)
    extra = {"decoder_input_ids": ids[:, :4]} if family.encoder_decoder else {}
    again = from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(ids, **extra)[0]
        assert torch.isfinite(logits).all()
        assert torch.equal(again(ids, **extra)[0], logits)
    certificate = read(tmp_path / "out")
    assert certificate.passed
    assert certificate.target == "lsg"
    names = " ".join(check.name for check in certificate.checks)
    for part in (
        "short-input difference",
        "position table",
        "largest token id",
        "model_max_length",
        "not finite",
        "reload",
    ):
        assert part in names
    assert "## Conversion certificate" in (tmp_path / "out" / "README.md").read_text()


def test_a_small_difference_is_no_rounding(tmp_path):
    """A hundredth in one bias of the last layer: less than anyone would see, more than float32 explains."""
    family = FAMILIES["roberta"]
    model, tokenizer = convert(save_plain("roberta", tmp_path / "source"), None, LENGTH, **SMALL)
    plain = plain_model("roberta", family.default)
    assert certify(model, tokenizer, plain, family, Certificate("source", "lsg")).passed
    model.base_model.encoder.layer[-1].output.LayerNorm.bias.data[0] += 1e-2
    failed = certify(model, tokenizer, plain, family, Certificate("source", "lsg")).failed
    assert [check.name for check in failed] == ["short-input difference to the source, global tokens out of view"]


@pytest.mark.parametrize("name", ["roberta", "bert", "albert", "electra", "distilbert", "bart", "pegasus"])
def test_global_tokens_are_words_at_spread_positions(name, tmp_path):
    """Row by row against the rule: positions 0, 64, …, 448, 1, 65, …; the first token's word, then the mask token's."""
    family = FAMILIES[name]
    long = {"max_position_embeddings": 512 + (2 if family.positions == "after_padding" else 0)}
    source = save_plain(name, tmp_path / "source", **long)
    plain = plain_model(name, family.default, **long)
    words = word_table(plain)
    positions = next(iter(position_tables(plain, family).values())).weight[family.reserved(plain.config) :]
    typed = name in ("bert", "albert", "electra")
    for use_token_ids in (True, False):
        model, _ = convert(source, None, 512, use_token_ids=use_token_ids, **SMALL)
        rows = global_table(model, family).weight
        assert rows.shape == (512, words.shape[1])
        for row in (0, 1, 7, 8, 9, 511):
            expected = words[0 if row == 0 else 4] + positions[(row % 8) * 64 + row // 8]
            if typed and use_token_ids:
                expected = expected + plain.base_model.embeddings.token_type_embeddings.weight[0]
            torch.testing.assert_close(rows[row], expected)


def test_positions_are_spread_over_longer_and_shorter_tables():
    rows = torch.arange(1024.0)[:, None].expand(-1, 3)
    assert spread_positions(rows, 64, 0)[:3, 0].tolist() == [0, 64, 128]
    assert sorted(spread_positions(rows, 64, 0)[:, 0].tolist()) == list(range(0, 1024, 2))
    short = spread_positions(rows[:100], 64, 0)
    assert short.shape == (512, 3)
    assert short[:2, 0].tolist() == [0, 64]
    with pytest.raises(UserError, match="global_positional_stride 48 does not fit"):
        spread_positions(rows, 48, 0)


def test_random_global_tokens_have_the_distribution_of_the_words():
    words = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) @ torch.tensor(
        [[2.0, 1, 0], [0, 1, 0], [0, 0, 0.1]]
    )
    rows = torch.cat([
        global_rows(words, torch.zeros(512, 3), 0, None, stride=64, seed=seed)[1:] for seed in range(20)
    ])  # fmt: skip
    torch.testing.assert_close(rows.mean(0), words.mean(0), atol=0.1, rtol=0.1)
    torch.testing.assert_close(rows.T.cov(), words.T.cov(), atol=0.15, rtol=0.1)
    first = global_rows(words, torch.zeros(512, 3), 7, None, stride=64, seed=1)
    assert torch.equal(first[0], words[7])
    assert torch.equal(first, global_rows(words, torch.zeros(512, 3), 7, None, stride=64, seed=1))


@pytest.mark.parametrize(("name", "architecture"), heads("bert") + heads("bart") + heads("roberta"))
def test_every_architecture_can_be_asked_for(name, architecture, tmp_path):
    source = save_plain(name, tmp_path / "source")
    model, _ = convert(source, None, LENGTH, architecture=architecture, **SMALL)
    assert type(model).__name__ == f"LSG{architecture}"
    assert torch.equal(word_table(model), word_table(plain_model(name, FAMILIES[name].default)))


def test_an_lsg_model_can_be_lengthened(converted, tmp_path):
    out, model, _ = converted
    table = model.roberta.embeddings.global_embeddings.weight.clone()
    longer, _ = convert(out, tmp_path / "longer", 2 * LENGTH, resize_lsg=True)
    assert torch.equal(longer.roberta.embeddings.global_embeddings.weight, table)
    ids = text(60)
    with torch.no_grad():
        assert torch.equal(longer(ids).logits, model(ids).logits)
    with torch.no_grad():
        trained = from_pretrained(out)
        trained.roberta.embeddings.global_embeddings.weight += 1.0
        trained.save_pretrained(tmp_path / "trained")
        tokenizer().save_pretrained(tmp_path / "trained")
    kept, _ = convert(tmp_path / "trained", None, 2 * LENGTH, keep_first_global_token=True)
    rows = kept.roberta.embeddings.global_embeddings.weight
    assert torch.equal(rows[0], table[0] + 1.0)
    assert (rows[1:] - table[1:] - 1.0).abs().max() > 0.1  # made again, from 150 positions


def test_settings_are_kept_and_overridden_at_load(roberta, tmp_path):
    out = tmp_path / "out"
    convert(roberta, out, LENGTH, model_kwargs={"sparsity_type": "pooling", "mask_first_token": True}, **SMALL)
    config = json.loads((out / "config.json").read_text())
    assert (config["sparsity_type"], config["mask_first_token"], config["block_size"]) == ("pooling", True, 4)
    overrides = {
        "num_global_tokens": 16,
        "block_size": 64,
        "sparse_block_size": 64,
        "sparsity_factor": 4,
        "sparsity_type": "none",
    }
    auto = transformers.AutoModelForMaskedLM.from_pretrained(out, **overrides)
    attention = auto.roberta.encoder.layer[0].attention.self.lsg()
    assert all(getattr(attention, name) == value for name, value in overrides.items())
    with pytest.raises(UserError, match="unknown sparsity_type"):
        transformers.AutoModelForMaskedLM.from_pretrained(out, sparsity_type="normal")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, num_labels=5, pool_with_global=False
    )
    assert type(classifier).__name__ == "LSGRobertaForSequenceClassification"
    assert classifier(text(30)).logits.shape == (1, 5)


def test_pipeline_fills_masks(converted):
    out, model, new_tokenizer = converted
    for given in ({"model": str(out)}, {"model": model, "tokenizer": new_tokenizer}):
        found = transformers.pipeline("fill-mask", **given)("w1 w2 <mask> w3 " + "w4 " * 60)
        assert len(found) == 5


def test_a_folder_loads_where_the_package_is_missing(converted, tmp_path):
    out, model, _ = converted
    ids = text(60, 2)
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["sparsefinder"] = None
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
path, saved = {str(out)!r}, torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
model = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True)
assert torch.equal(model(saved["ids"]).logits, saved["logits"])
fill = pipeline("fill-mask", model=path, trust_remote_code=True)
assert len(fill("w1 <mask>")) == 5
other = AutoModelForMaskedLM.from_pretrained(
    path, trust_remote_code=True, num_global_tokens=16, block_size=8, sparse_block_size=8, sparsity_factor=4,
    sparsity_type="none", mask_first_token=True, pool_with_global=True)
assert other.roberta.encoder.layer[0].attention.self.lsg().num_global_tokens == 16
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert torch.equal(again(saved["ids"]).logits, saved["logits"])
"""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr


def test_carried_code_is_the_package_s_own(converted):
    out = converted[0]
    for file in out.glob("lsg_*.py"):
        assert "sparsefinder" not in "".join(
            line for line in file.open() if line.lstrip().startswith(("from ", "import "))
        )
    ours = (ROOT / "sparsefinder" / "executors" / "local_sparse_global" / "sparse_keys.py").read_text()
    carried = (out / "lsg_sparse_keys.py").read_text()
    assert carried == re.sub(r"from sparsefinder\.[a-z_.]*?(\w+) import", r"from .lsg_\1 import", ours)


def test_trial_of_every_auto_class(converted):
    lines = list(try_heads(converted[0]))
    assert len(lines) == len(FAMILIES["roberta"].auto_classes()) + 1
    assert all("finite" in line for line in lines[:-1])
    assert not any("NOT FINITE" in line for line in lines)


# ---- the normalizer ----

OUT_OF_VIEW = "short-input difference to the source, global tokens out of view"


def entmax_source(name, folder, alpha=1.5):
    model = plain_model(name, FAMILIES[name].default)
    set_normalizer(model, Normalizer(alpha))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["roberta", "albert", "distilbert"])
def test_an_entmax_source_stays_one(name, tmp_path):
    source = entmax_source(name, tmp_path / "source")
    model, _ = convert(source, tmp_path / "out", LENGTH, **SMALL)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["normalizer_alpha"] == model.config.normalizer_alpha == 1.5
    assert not {"attention_alpha", "attn_implementation"} & {*raw}
    assert all(module.lsg().normalizer == Normalizer(1.5) for module in model.modules() if hasattr(module, "lsg"))
    checks = {check.name: check for check in read(tmp_path / "out").checks}
    assert checks[OUT_OF_VIEW].bound is not None
    assert "alpha of the source's attention" not in checks
    longer, _ = convert(tmp_path / "out", None, 2 * LENGTH, resize_lsg=True)
    assert longer.config.normalizer_alpha == 1.5


@pytest.mark.parametrize(("sources", "asked"), [(1.0, 1.5), (1.5, 1.0), (1.5, 2.0)])
def test_another_normalizer_than_the_source_s_is_said_and_not_called_equal(sources, asked, tmp_path, caplog):
    source = entmax_source("roberta", tmp_path / "source", sources)
    convert(source, tmp_path / "out", LENGTH, normalizer_alpha=asked, **SMALL)
    assert f"alpha {sources}, the LSG model with {asked}" in caplog.text
    checks = {check.name: check for check in read(tmp_path / "out").checks}
    assert checks["alpha of the source's attention"].measured == sources
    assert f"attends with alpha {asked}" in checks["alpha of the source's attention"].note
    assert checks[OUT_OF_VIEW].bound is None
    assert checks[OUT_OF_VIEW].measured > 1e-3
    assert checks[f"{OUT_OF_VIEW}, the model with the source's alpha"].bound is not None


def test_alphas_that_cannot_be_are_one_line(roberta, tmp_path):
    source = entmax_source("roberta", tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    for settings in ({}, {"normalizer_alpha": 1.5}):
        (source / "config.json").write_text(json.dumps({**raw, "attention_alpha": 7}))
        with pytest.raises(UserError, match=r"attention_alpha in the source.s config\.json is wrong") as error:
            convert(source, None, LENGTH, **settings, **SMALL)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="alpha must lie between 1"):
        convert(roberta, None, LENGTH, normalizer_alpha=7.0, **SMALL)
    bart = save_plain("bart", tmp_path / "bart")
    raw = json.loads((bart / "config.json").read_text())
    (bart / "config.json").write_text(json.dumps({**raw, "attention_alpha": 1.5}))
    with pytest.raises(UserError, match="in its decoder too, where an LSG model has softmax"):
        convert(bart, None, LENGTH, **SMALL)


# ---- what is refused ----


def test_refusals(roberta, tmp_path):
    def refused(words, *arguments, **settings):
        with pytest.raises(UserError, match=words) as error:
            convert(*arguments, **settings)
        assert "\n" not in str(error.value)

    (tmp_path / "there").mkdir()
    refused("exists", roberta, tmp_path / "there")
    refused("maximum length 63 is shorter than the source model's 64", roberta, None, 63)
    refused("there is no such folder", tmp_path / "nothing")
    refused("unknown setting blocks; LSG has", roberta, None, LENGTH, blocks=3)
    refused("unknown sparsity_type", roberta, None, LENGTH, sparsity_type="random")
    refused("block_size 6 is not divisible", roberta, None, LENGTH, block_size=6, sparsity_factor=4)
    refused(
        "architecture 'BertForMaskedLM' is not one of model type 'roberta'",
        roberta,
        None,
        LENGTH,
        architecture="BertForMaskedLM",
    )
    refused("global_positional_stride", roberta, None, LENGTH, global_positional_stride=0)
    with pytest.raises(UserError, match="no LSG checkpoint"):
        from_pretrained(roberta)
    other = tmp_path / "gpt2"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    refused("model type 'gpt2' has no LSG form; supported are albert, bart, barthez", other)
    (tmp_path / "relative").mkdir()
    raw = plain_config("bert").to_dict() | {
        "position_embedding_type": "relative_key",
        "architectures": ["BertForMaskedLM"],
    }
    (tmp_path / "relative" / "config.json").write_text(json.dumps(raw))
    refused("position_embedding_type is 'relative_key'", tmp_path / "relative")


def test_mask_id_outside_the_vocabulary_is_refused(tmp_path):
    source = save_plain("bart", tmp_path / "source")
    raw = json.loads((source / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["<mask>"], vocabulary["old"] = VOCABULARY, vocabulary["<mask>"]
    next(token for token in raw["added_tokens"] if token["content"] == SPECIAL["mask"])["id"] = VOCABULARY
    (source / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="mask id 96 is outside the model's vocabulary of 96"):
        convert(source, tmp_path / "out", LENGTH, **SMALL)
    assert not (tmp_path / "out").exists()


def test_nothing_is_saved_when_a_check_fails(roberta, tmp_path, monkeypatch):
    from sparsefinder.lsg import conversion

    def forgetful(model, family, length):
        model.roberta.embeddings.position_embeddings.weight.data[20] += 1.0
        return lengthen(model, family, length)

    lengthen = conversion.lengthen_positions
    monkeypatch.setattr(conversion, "lengthen_positions", forgetful)
    with pytest.raises(UserError, match="position table, rows that differ"):
        convert(roberta, tmp_path / "out", LENGTH, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_new_heads_are_named_in_the_log(roberta, caplog):
    with caplog.at_level(logging.WARNING):
        first, _ = convert(roberta, None, LENGTH, architecture="RobertaForSequenceClassification", seed=5, **SMALL)
    assert "classifier.dense.weight" in caplog.text
    second, _ = convert(roberta, None, LENGTH, architecture="RobertaForSequenceClassification", seed=5, **SMALL)
    assert torch.equal(first.classifier.dense.weight, second.classifier.dense.weight)


def test_a_head_of_another_size_is_drawn_anew(tmp_path, caplog):
    names = {0: "contradiction", 1: "entailment", 2: "neutral"}
    source = save_plain("roberta", tmp_path / "source", "RobertaForSequenceClassification", id2label=names)
    model, _ = convert(source, tmp_path / "out", LENGTH, num_labels=5, seed=5, **SMALL)
    assert model(text(30)).logits.shape == (1, 5)
    assert "has no classifier.out_proj.bias, classifier.out_proj.weight: drawn anew" in caplog.text
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == 5
    again, _ = convert(source, None, LENGTH, num_labels=5, seed=5, **SMALL)
    assert torch.equal(again.classifier.out_proj.weight, model.classifier.out_proj.weight)
    caplog.clear()
    same, _ = convert(source, None, LENGTH, num_labels=3, **SMALL)
    assert same.config.id2label == names
    assert not caplog.text
    with pytest.raises(UserError, match="only the head may have"):
        convert(source, None, LENGTH, num_labels=5, intermediate_size=40, **SMALL)


# ---- the command line ----


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "scripts" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_as_published(command, roberta, tmp_path, capsys):
    out = tmp_path / "out"
    code = command.main([
        "--initial_model", str(roberta), "--model_name", str(out), "--max_sequence_length", str(LENGTH),
        "--model_kwargs", "{'mask_first_token': true, 'sparsity_type': 'lsh', 'block_size': 32}",
        "--architecture", "RobertaForSequenceClassification", "--random_global_init", "--global_positional_stride", "32",
        "--dont_use_token_ids", "--seed", "7", "--run_test",
    ])  # fmt: skip
    assert code == 0
    assert "checks passed" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LSGRobertaForSequenceClassification"]
    assert (config["sparsity_type"], config["block_size"], config["sparse_block_size"]) == ("lsh", 32, 128)
    assert "roberta.embeddings.global_embeddings.weight" in load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model_kwargs", "{'block_size': "], "is not a dictionary of settings"),
        (["--model_kwargs", "[1]"], "is not a dictionary of settings"),
        (["--max_sequence_length", "10"], "shorter than the source model's 64"),
        (["--max_sequence_length", "ten"], "invalid int value"),
        (["--target", "reformer"], "choose one of lsg, longformer, nystromformer, bigbird, led"),
        (["--target", "longformer", "--resize_lsg"], "--resize_lsg belongs to --target lsg"),
        (["--architecture", "T5Model"], "architecture 'T5Model' is not one of model type 'roberta'"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(command, roberta, tmp_path, capsys, extra, words):
    arguments = [
        "--initial_model",
        str(roberta),
        "--model_name",
        str(tmp_path / "out"),
        "--max_sequence_length",
        "128",
        *extra,
    ]
    try:
        code = command.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_json_file_as_the_only_argument(command, roberta, tmp_path, capsys):
    file, out = tmp_path / "arguments.json", tmp_path / "out"
    content = {
        "initial_model": str(roberta),
        "model_name": str(out),
        "max_sequence_length": LENGTH,
        "model_kwargs": {"block_size": 32, "mask_first_token": True},
        "architecture": None,
        "dont_use_token_ids": True,
        "run_test": False,
        "seed": 7,
    }
    file.write_text(json.dumps(content))
    assert command.parse([str(file)]).use_token_ids is False
    assert command.main([str(file)]) == 0
    assert json.loads((out / "conversion.json").read_text())["settings"]["seed"] == 7
    config = json.loads((out / "config.json").read_text())
    assert (config["block_size"], config["mask_first_token"]) == (32, True)
    assert config["architectures"] == ["LSGRobertaForMaskedLM"]
    capsys.readouterr()
    wrong = {
        json.dumps(content | {"colour": "red"}): "unrecognized arguments: --colour=red",
        json.dumps(content | {"seed": 1.5}): "--seed: invalid int value",
        json.dumps(content | {"run_test": "perhaps"}): "'perhaps' is neither true nor false",
        json.dumps({"initial_model": "x"}): "required: --model_name",
        "[]": "holds no arguments but a list",
        "{": "is no JSON",
    }
    for written, words in wrong.items():
        file.write_text(written)
        with contextlib.suppress(SystemExit):
            assert command.main([str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert command.main([str(tmp_path / "absent.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
