"""Manifests: what an artefact was made from, and whether it still is what was made.

A manifest is sealed: it holds the hash of its own content. One that a damaged disk or a stray edit changed counts as absent,
and an artefact without a manifest is not finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsefinder.storage.files import files_of, write_text
from sparsefinder.storage.moved_names import with_names_of_today

PRETRAINED = "pretrained model"  # the weights that finetuning began with, among the parents of the artefact `model`
_LARGEST = 64 << 20  # bytes of a manifest that is read at all; an ordinary one has some thousand


@dataclass(frozen=True)
class Manifest:
    """What an artefact was made from.

    Args:
        artefact: Its name.
        stage: The stage that made it.
        settings: All settings of that stage, resolved.
        parents: Name → hash of what it read.
        content: SHA-256 of the artefact's bytes.
        stat: Sizes and times of its files when it was finished, see `file_stats`.
        seed: Of the stage; None where it draws nothing.
        versions: Of Python and the packages.
        facts: What the stage noted, such as a validation loss.
        created: Time in UTC, ISO 8601.
    """

    artefact: str
    stage: str
    settings: dict[str, Any]
    parents: dict[str, str]
    content: str
    stat: dict[str, list[int]]
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    created: str = ""


def manifest_path(artefact: Path | str) -> Path:
    """``qk_enc-attn.pt`` → ``qk_enc-attn.pt.json``."""
    artefact = Path(artefact)
    return artefact.with_name(artefact.name + ".json")


def write_manifest(artefact: Path | str, manifest: Manifest) -> None:
    """Write the manifest beside ``artefact``: from now on that is finished."""
    artefact = Path(artefact)
    content = json.loads(json.dumps(dataclasses.asdict(manifest)))
    text = json.dumps({**content, "seal": _seal(content)}, indent=2, ensure_ascii=False)
    write_text(manifest_path(artefact), text + "\n")


def read_manifest(artefact: Path | str) -> Manifest | None:
    """The manifest beside ``artefact``; None if there is none, or the artefact is gone, or it is not what was written."""
    artefact = Path(artefact)
    path = manifest_path(artefact)
    try:
        if not path.is_file() or not artefact.exists() or path.stat().st_size > _LARGEST:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return _renamed(Manifest(**content)) if content.pop("seal") == _seal(content) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return None


def _renamed(manifest: Manifest) -> Manifest:
    """With the names of today: finetuned models once kept what they were made from under their own, and classes have moved."""
    parents = {PRETRAINED if name == manifest.artefact else name: content for name, content in manifest.parents.items()}
    return dataclasses.replace(manifest, parents=parents, settings=with_names_of_today(manifest.settings))


def content_hash(path: Path | str) -> str:
    """SHA-256 over the names and bytes of a file, or of all files of a folder in sorted order."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in files_of(path):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_stats(path: Path | str) -> dict[str, list[int]]:
    """Size, both times of change and inode of each file: equal stats mean that hashing again is not needed.

    A program can set back the time at which the content changed, but not that at which the inode did: no writing through the
    file system goes unnoticed. A disk that returns other bytes than it was given does.
    """
    path = Path(path)
    stats = {}
    for file in files_of(path):
        status = file.stat()
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        stats[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return stats


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    installed = {"python": sys.version.split()[0]}
    for package in ("sparsefinder", "torch", "transformers", "entmax", "scikit-learn", "datasets", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def plain(value: Any) -> Any:
    """A setting as JSON can hold it: a dataclass becomes its type's name and fields, a path its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, Path) else value


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
