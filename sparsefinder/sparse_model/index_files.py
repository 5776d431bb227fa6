"""An index on disk: ``sparsefinder.json`` for people and programs, ``sparsefinder.safetensors`` for numbers; no pickle.

The first holds the hash of the second, and one of its own content: what was cut or altered is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import LOADERS, Configuration, Learned
from sparsefinder.predictors.centroids import centroids_of, load_centroids
from sparsefinder.predictors.projections import projections_of
from sparsefinder.sparse_model.curves import Curves
from sparsefinder.sparse_model.index import Attached, BaseModel, Index
from sparsefinder.sparse_model.named_patterns import plain_settings, restored
from sparsefinder.storage.files import make_folder, write_bytes, write_text

DESCRIPTION, NUMBERS = "sparsefinder.json", "sparsefinder.safetensors"
_FORMAT = 1
_CURVES = ("levels", "density", "recall", "error", "weight")


def write(index: Index, folder: Path) -> None:
    """Write both files, the description last."""
    make_folder(folder)
    tensors = _tensors(index)
    numbers = save_tensors(tensors)
    write_bytes(folder / NUMBERS, numbers)
    configuration = index.configuration
    content = {
        "format": _FORMAT,
        "base_model": dataclasses.asdict(index.base),
        "pattern": {
            "name": configuration.name,
            "settings": plain_settings(configuration.pattern),
            "window": configuration.window,
            "global_tokens": configuration.global_tokens,
            "last_token": configuration.last_token,
        },
        "learned": sorted(index.learned.artefacts),
        "whole_numbers": index.curves is not None and index.curves.whole,
        "attached": None if index.attached is None else dataclasses.asdict(index.attached),
        "saved_with": index.saved_with,
        "quality": [dict(row) for row in index.quality],
        "facts": dict(index.facts),
        "numbers": hashlib.sha256(numbers).hexdigest(),
    }
    content = json.loads(json.dumps(content))
    text = json.dumps({**content, "seal": _seal(content)}, indent=1, ensure_ascii=False)
    write_text(folder / DESCRIPTION, text + "\n")


def read(folder: Path) -> Index:
    """Read both files of a folder.

    Raises:
        UserError: One is missing, cut, altered or of another version, or they do not belong together.
    """
    return read_files(folder / DESCRIPTION, folder / NUMBERS)


def read_files(description: Path, numbers: Path) -> Index:
    """As `read`, from files that may lie apart, as in the cache of the hub."""
    content = _description(description)
    if not numbers.is_file():
        raise UserError(f"{numbers} is missing, which belongs to {description.name}: copy both, or fit the index again")
    data = numbers.read_bytes()
    if hashlib.sha256(data).hexdigest() != content.get("numbers"):
        raise UserError(
            f"{numbers} is not what was saved with {description.name}: it was cut or altered; copy both again"
        )
    try:
        tensors = load_tensors(data)
        return _index(content, tensors, str(description.parent))
    except UserError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{description} does not describe an index ({error!r:.100}): fit it again") from error


def _description(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: this folder holds no index; give one written by Index.save, or by save_pretrained of a model "
            "that an index was attached to"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read, it was cut or altered ({type(error).__name__}): copy it again"
        ) from error
    if not isinstance(content, dict) or content.pop("seal", "") != _seal(content):
        raise UserError(f"{path} is not what was saved, it was cut or altered: copy it again, or fit the index again")
    if content.get("format") != _FORMAT:
        raise UserError(f"{path} has format {content.get('format')}, this version reads {_FORMAT}: update sparsefinder")
    return content


def _tensors(index: Index) -> dict[str, Tensor]:
    """Everything that is a number, by its way through the published forms, such as ``lowrank.0.q.w``."""
    tensors: dict[str, Tensor] = {}
    for name, artefact in index.learned.artefacts.items():
        _flatten(artefact.content(), name, tensors)
    if index.curves is not None:
        tensors |= {f"curves.{name}": getattr(index.curves, name).contiguous() for name in _CURVES}
    return {name: compact(tensor) for name, tensor in tensors.items()}


def compact(tensor: Tensor) -> Tensor:
    """In half precision where that loses nothing: what `sparsefinder.fit` learns is rounded to it."""
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and bool((half.float() == tensor).all()) else tensor.contiguous()


def _flatten(content: Any, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(content, Tensor):
        tensors[name] = content.detach().cpu().clone(memory_format=torch.contiguous_format)
        return
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        _flatten(value, f"{name}.{key}", tensors)


def _nested(tensors: Mapping[str, Tensor], name: str) -> Any:
    """The published form of an artefact again: lists where all keys are numbers."""
    content: dict[str, Any] = {}
    for path, tensor in tensors.items():
        first, *keys = path.split(".")
        if first != name:
            continue
        at = content
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = tensor.float()
    return _lists(content)


def _lists(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    inner = {key: _lists(value) for key, value in content.items()}
    if inner and all(key.isdigit() for key in inner):
        return [inner[str(number)] for number in range(len(inner))]
    return inner


def _index(content: dict[str, Any], tensors: dict[str, Tensor], source: str) -> Index:
    base = BaseModel(**content["base_model"])
    pattern = content["pattern"]
    configuration = Configuration(
        pattern["name"],
        restored(pattern["name"], pattern["settings"]),
        window=pattern["window"],
        global_tokens=pattern["global_tokens"],
        last_token=pattern["last_token"],
    )
    artefacts = {}
    for name in content["learned"]:
        make = centroids_of if LOADERS[name] is load_centroids else projections_of
        artefacts[name] = make(_nested(tensors, name), source)
    curves = None
    if "curves.levels" in tensors:
        curves = Curves(
            **{name: tensors[f"curves.{name}"].double() for name in _CURVES}, whole=content["whole_numbers"]
        )
    attached = content["attached"]
    if attached is not None:
        values = attached["values"]
        attached = Attached(**{**attached, "values": None if values is None else tuple(tuple(row) for row in values)})
    quality = tuple(content["quality"])
    return Index(
        base, configuration, Learned(artefacts), curves, quality, content["facts"], attached, content["saved_with"]
    )


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
