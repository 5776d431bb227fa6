"""Damaged and hostile model folders: one clear line, or a model whose numbers are finite; no code is ever run."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsefinder import models
from tests.faults.test_fuzz_files import COPIES, Bomb, damaged_bytes, one_line_or_right, paths_of
from tests.faults.test_fuzz_files import _small_and_quick as _small_and_quick  # these tests have the same limits
from tests.tiny_models import tiny_batch

VALUES = (None, -1, 0, 3, 10**9, 1e300, "x", "../../../etc/passwd", [], {}, True)


def use(folder: Path) -> bool:
    """Load the model and read a batch; whether it says anything but finite numbers."""
    model, tokenizer = models.load_masked_lm(folder)
    models.describe(model)
    tokenizer(["a model attends"], truncation=True, max_length=8)
    with torch.inference_mode():
        return bool(model(**tiny_batch()).logits.isfinite().all())


def test_damaged_files(folder: Path) -> None:
    chance = random.Random(0)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        data = file.read_bytes()
        cases = list(damaged_bytes(data, chance))
        for what, other in chance.sample(cases, 12 * COPIES):
            file.write_bytes(other)
            one_line_or_right(lambda: use(folder), f"{name}: {what}")
        file.write_bytes(data)
        if name != "tokenizer_config.json":
            file.unlink()
            assert one_line_or_right(lambda: use(folder), f"{name}: missing")
            file.write_bytes(data)


def test_other_configurations(folder: Path) -> None:
    file, chance = folder / "config.json", random.Random(0)
    content = json.loads(file.read_text())
    content |= {"is_decoder": False, "chunk_size_feed_forward": 0, "attention_alpha": 1.5}
    for key in sorted(content):
        for value in chance.sample(VALUES, 2 * min(COPIES, 5)):
            file.write_text(json.dumps({**content, key: value}))
            one_line_or_right(lambda: use(folder), f"config.json: {key}={value!r}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        text = file.read_text()
        content = json.loads(text)
        places = list(paths_of(content))
        for at in chance.sample(places, min(len(places), 10 * COPIES)):
            if at:
                file.write_text(json.dumps(replaced(content, at, chance.choice(VALUES))))
                one_line_or_right(lambda: use(folder), f"{name}: {at}")
        file.write_text(text)


def test_other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights, chance = load_file(file), random.Random(0)
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    changes: dict[str, Any] = {
        "nan": weights[name] * torch.nan,
        "inf": weights[name] + torch.inf,
        "huge": weights[name] * 1e38,
        "other type": weights[name].double(),
        "whole numbers": weights[name].long(),
        "other shape": weights[name][:3],
        "more axes": weights[name][None],
        "empty": weights[name][:0],
    }
    for what, tensor in changes.items():
        save_file({**weights, name: tensor.contiguous()}, file, {"format": "pt"})
        refused = one_line_or_right(lambda: use(folder), what)
        assert refused == (what not in ("other type", "whole numbers")), what
    for name in chance.sample(sorted(weights), 5):
        save_file({n: t for n, t in weights.items() if n != name}, file, {"format": "pt"})
        one_line_or_right(lambda: use(folder), f"without {name}")
    save_file({n: weights[chance.choice(sorted(weights))].clone() for n in weights}, file, {"format": "pt"})
    assert one_line_or_right(lambda: use(folder), "swapped")


def test_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "bomb": Bomb(str(trace))}, folder / "pytorch_model.bin")
    assert one_line_or_right(lambda: use(folder), "code among weights")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(trace))))
    assert one_line_or_right(lambda: use(folder), "code instead of weights")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "pytorch_model.bin").unlink()
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(trace)!r})\nclass C: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        map_ = dict.fromkeys(("AutoConfig", "AutoModelForMaskedLM", "AutoTokenizer"), "evil.C")
        (folder / name).write_text(json.dumps({**content, "auto_map": map_, "tokenizer_class": "C"}))
        one_line_or_right(lambda: use(folder), f"code named by {name}")
    assert not trace.exists()


def test_links_out_of_the_folder(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        data = (folder / name).read_bytes()
        for target in ("/etc/passwd", "/dev/zero", folder / name, "/", folder):
            (folder / name).unlink()
            (folder / name).symlink_to(target)
            assert one_line_or_right(lambda: use(folder), f"{name} → {target}")
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    assert not one_line_or_right(lambda: use(folder), "whole again")


def replaced(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    """``content`` with ``value`` at one place."""
    copy = content.copy()
    copy[at[0]] = value if len(at) == 1 else replaced(content[at[0]], at[1:], value)
    return copy
