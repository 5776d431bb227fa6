"""Files of a checkpoint's folder that cannot be what they are called, found before a loader stumbles over them.

Loaders say `HeaderTooLarge` to a git-lfs pointer and to a download that was cut. Here the file is looked at, and only the file
that will be read: a pointer beside good weights does no harm.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weights, in the order in which transformers looks for them."""

VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "vocab.model"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model"),
)
"""Names of files that hold a vocabulary; where a folder has none of them, transformers 5 invents a tokenizer."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_LENGTH = 8  # bytes in front of a safetensors header that say how long it is
_LARGEST_HEADER = 100_000_000  # bytes, as in safetensors itself
_DOWNLOAD = "download it again"


def wrong_weights(folder: Path) -> str | None:
    """What is wrong with the weights in ``folder``, and what to do; None where nothing is seen from outside."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        others = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".h5", ".dat")
        )
        seen = f", but {', '.join(others[:3])}" if others else ""
        return f"it has no weights, {WEIGHTS[0]} or {WEIGHTS[2]}{seen}: save the model with save_pretrained"
    if weights.name.endswith(".index.json"):
        return wrong_file(weights) or _wrong_shards(weights)
    return wrong_file(weights)


def wrong_vocabulary(folder: Path) -> str | None:
    """As `wrong_weights`, of the tokenizer's files."""
    vocabularies = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    if not vocabularies:
        return "it has no tokenizer (tokenizer.json, or the files of its vocabulary): save one into it with save_pretrained"
    settings = [path for path in (folder / "tokenizer_config.json",) if path.is_file()]
    # beside a tokenizer.json the older files are not read
    return next((wrong for path in (*vocabularies[:1], *settings) if (wrong := wrong_file(path))), None)


def wrong_file(path: Path) -> str | None:
    """What is wrong with one file, in words that name it: empty, a git-lfs pointer, cut, no JSON."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if not size:
        return f"{path.name} is empty: {_DOWNLOAD}"
    if start == _POINTER:
        return f"{path.name} is a git-lfs pointer and not the file itself: run git lfs pull, or {_DOWNLOAD}"
    if path.suffix == ".safetensors":
        return _wrong_safetensors(path, size)
    if path.suffix == ".json":
        return _wrong_json(path)
    if path.suffix == ".bin" and start[:2] == b"PK" and not zipfile.is_zipfile(path):
        return f"{path.name} is cut off: {_DOWNLOAD}"
    return None


def _wrong_safetensors(path: Path, size: int) -> str | None:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH), "little")
        text = stream.read(length) if length <= _LARGEST_HEADER else b""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = _LENGTH + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"{path.name} is no safetensors file, or cut off in its header: {_DOWNLOAD}"
    if size < needed:
        return f"{path.name} is cut off, {size} of {needed} bytes are there: {_DOWNLOAD}"
    return None


def _wrong_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{path.name} is no JSON ({' '.join(str(error).split())[:80]}): {_DOWNLOAD}"
    return None if isinstance(content, dict) else f"{path.name} is no JSON object but a {type(content).__name__}"


def _wrong_shards(index: Path) -> str | None:
    """Shards that an index names and that are not there, or are damaged."""
    shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        return f"{index.name} has no weight_map from weights to files: {_DOWNLOAD}"
    names = sorted(set(shards.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        return f"{index.name} names {len(names)} files, and {', '.join(absent[:3])} is not there: download all of them"
    return next((wrong for name in names if (wrong := wrong_file(index.parent / name))), None)
