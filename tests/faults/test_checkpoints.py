"""Checkpoints of others that are damaged, quantized, incomplete or edited: one clear line from every target, and no folder."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import convert_checkpoint
from sparsefinder import models
from sparsefinder.errors import UserError
from tests.faults.test_fuzz_files import Bomb
from tests.tiny_models import SPECIAL

TARGETS = ("lsg", "longformer", "bigbird", "nystromformer", "led")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 498818054\n"
Damage = Callable[[Path], Any]


def overwritten(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, share: float) -> Damage:
    return lambda folder: (folder / name).write_bytes((data := (folder / name).read_bytes())[: int(share * len(data))])


def gone(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def edited(name: str, **changes: Any) -> Damage:
    """A JSON file with other values."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return damage


def config(**changes: Any) -> Damage:
    return edited("config.json", **changes)


def as_pickle(made: Callable[[Path, dict[str, Any]], Any], share: float = 1.0) -> Damage:
    """`pytorch_model.bin` instead of safetensors."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        torch.save(made(folder, weights), file)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return damage


def in_shards(absent: bool, data: bytes = b"") -> Damage:
    """An index of two files, of which one is there, and the other is absent or damaged."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        files = {name: "one.safetensors" if at else "two.safetensors" for at, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        if not absent:
            (folder / "two.safetensors").write_bytes(data)

    return damage


def reweighted(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return damage


def other_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


QUERY = "roberta.encoder.layer.0.attention.self.query.weight"
CASES: dict[str, tuple[Damage, str]] = {
    # weights
    "no weights": (gone("model.safetensors"), "has no weights"),
    "only weights of another library": (
        lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
        r"has no weights.* but tf_model\.h5",
    ),
    "empty weights": (overwritten("model.safetensors", b""), r"model\.safetensors is empty"),
    "pointer": (overwritten("model.safetensors", POINTER), r"model\.safetensors is a git-lfs pointer .*git lfs pull"),
    "half a download": (cut("model.safetensors", 0.5), r"model\.safetensors is cut off, \d+ of \d+ bytes"),
    "half a header": (cut("model.safetensors", 0.01), r"no safetensors file, or cut off in its header"),
    "a web page": (overwritten("model.safetensors", b"<html>404</html>"), "no safetensors file"),
    "pickle pointer": (
        lambda folder: (folder / "model.safetensors").unlink() or (folder / "pytorch_model.bin").write_bytes(POINTER),
        r"pytorch_model\.bin is a git-lfs pointer",
    ),
    "half a pickle": (as_pickle(lambda _, weights: weights, 0.5), r"pytorch_model\.bin is cut off"),
    "code among weights": (
        as_pickle(lambda folder, weights: {**weights, "bomb": Bomb(str(folder / "trace"))}),
        "more than tensors.* never run",
    ),
    "code instead of weights": (
        lambda folder: (
            (folder / "model.safetensors").unlink()
            or (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(folder / "trace"))))
        ),
        "more than tensors.* never run",
    ),
    "shard absent": (in_shards(absent=True), r"names 2 files, and two\.safetensors is not there"),
    "shard a pointer": (in_shards(absent=False, data=POINTER), r"two\.safetensors is a git-lfs pointer"),
    "index without a map": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "one.safetensors")
            and (folder / "model.safetensors.index.json").write_text("{}")
        ),
        "has no weight_map",
    ),
    "a layer gone": (
        reweighted(lambda weights: {name: weights[name] for name in weights if ".layer.1." not in name}),
        r"16 of its weights are not in the checkpoint, the first is roberta\.encoder\.layer\.1\.",
    ),
    "NaN": (reweighted(lambda weights: weights | {QUERY: weights[QUERY] * torch.nan}), "weights contain NaN"),
    "other shape": (
        reweighted(lambda weights: weights | {QUERY: weights[QUERY][:3].clone()}),
        "cannot read its weights|size",
    ),
    "relative positions among weights": (
        reweighted(lambda weights: weights | {QUERY.replace("query", "distance_embedding"): torch.ones(9, 8)}),
        "trained with relative positions",
    ),
    # the tokenizer
    "no tokenizer": (gone("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "no vocabulary": (gone("tokenizer.json"), "has no tokenizer"),
    "vocabulary of another family": (
        lambda folder: [
            (folder / "tokenizer.json").unlink(),
            (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}'),
            (folder / "vocab.txt").write_text("a\nb\n"),
        ],
        r"its tokenizer lacks merges\.txt, vocab\.json",
    ),
    "vocabulary of special tokens": (
        other_tokenizer(lambda content: content["model"].update(vocab={token: i for i, token in enumerate(SPECIAL)})),
        "no words but 5 special tokens",
    ),
    "tokenizer garbage": (overwritten("tokenizer.json", b"garbage"), r"tokenizer\.json is no JSON"),
    "tokenizer pointer": (overwritten("tokenizer.json", POINTER), r"tokenizer\.json is a git-lfs pointer"),
    "tokenizer settings cut": (cut("tokenizer_config.json", 0.5), r"tokenizer_config\.json is no JSON"),
    "tokenizer of another version": (
        other_tokenizer(lambda content: content["model"].update(type="BPE-of-the-future")),
        "another version of tokenizers",
    ),
    "more tokens than embeddings": (
        other_tokenizer(lambda content: content["model"]["vocab"].update({f"more{i}": 19 + i for i in range(9)})),
        "needs 28 word embeddings and the model has 19",
    ),
    # config.json
    "no config": (gone("config.json"), r"has no config\.json"),
    "config pointer": (overwritten("config.json", POINTER), "git-lfs pointer"),
    "config no JSON": (overwritten("config.json", b"{model_type: roberta}"), r"config\.json is no JSON"),
    "config a list": (overwritten("config.json", b"[]"), "no JSON object but a list"),
    "no family": (config(model_type=None), "model_type is null"),
    "unknown family": (config(model_type="roberta-of-mine"), "roberta-of-mine"),
    "architectures a name": (config(architectures="RobertaForMaskedLM"), "a list of class names is needed"),
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes"}), r"quantized \(bitsandbytes\)"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantized \(gptq\)"),
    "awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), r"quantized \(awq\)"),
    "flash": (config(attn_implementation="flash_attention_2"), "known are eager, sdpa, sparsefinder"),
    "kernel": (config(_attn_implementation_internal="kernels-community/flash-attn"), "known are eager, sdpa"),
    "relative": (config(position_embedding_type="relative_key_query"), "only absolute positions are supported"),
    "activation": (config(hidden_act="gelu_of_mine"), "no activation of transformers"),
    "no padding id": (config(pad_token_id=None), "pad_token_id in its config.json is null"),
    "padding beyond": (config(pad_token_id=19), "pad_token_id in its config.json is 19"),
    "type of numbers": (config(dtype="float7"), "needed is one of float32"),
    "type in whole numbers": (config(dtype="int8"), "needed is one of float32"),
    "fewer layers": (config(num_hidden_layers=1), "more layers than its config.json says"),
    "more layers": (config(num_hidden_layers=3), "of its weights are not in the checkpoint"),
    "heads that do not divide": (config(num_attention_heads=3), "num_attention_heads"),
    "a switch in words": (config(is_decoder="false"), "is_decoder is 'false'; true or false is needed"),
    "outputs without names": (config(return_dict=False), "return_dict is False"),
    "dropout": (config(hidden_dropout_prob=1.5), "dropout"),
    "no number": (config(layer_norm_eps=float("nan")), "layer_norm_eps is nan; a finite number"),
    **{
        f"{key} null": (config(**{key: None}), key)
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act")
    },
    **{
        f"{key} null": (config(**{key: None}), key)
        for key in ("num_attention_heads", "intermediate_size", "layer_norm_eps")
    },
    **{
        f"{key} a string": (config(**{key: "12"}), key)
        for key in ("hidden_size", "max_position_embeddings", "pad_token_id")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_from_every_target(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = CASES[case]
    damage(folder)
    before = {*tmp_path.iterdir()}
    for target in TARGETS:
        out = str(tmp_path / "out")
        given = ("--initial_model", str(folder), "--model_name", out, "--max_sequence_length", "64", "--target", target)
        assert convert_checkpoint.main([*given]) == 2, target
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, (target, lines)
        assert re.search(words, lines[0]), (target, lines[0])
    with pytest.raises(UserError, match=words) as error:
        models.load_masked_lm(folder)
    assert "\n" not in str(error.value)
    assert {*tmp_path.iterdir()} == before
    assert not (folder / "trace").exists()
