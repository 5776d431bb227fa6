"""Artefacts on disk: where each lies, whether it is finished, and what it was made from.

An artefact is a file or a folder of a run directory. It is written beside its place under a temporary name and renamed, and
its manifest (``<artefact>.json``) is written last: **no manifest, not finished**. A manifest holds the facts about the
artefact (stage, resolved settings, parents with content hashes, seed, versions), never its name, so a stage whose settings
and parents are unchanged can be skipped, and a changed parent makes its children stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


class UserError(ValueError):
    """Wrong input: one clear line saying what came, what was needed and what to do next."""


@dataclass(frozen=True)
class Artefact:
    """A kind of output: its ``path`` below the run directory and the ``stage`` that makes it."""

    name: str
    path: str
    stage: str


ARTEFACTS = {
    artefact.name: artefact
    for artefact in (
        Artefact("model", "model", "finetune"),
        Artefact("qk", "qk_enc-attn.pt", "extract"),
        Artefact("qk_validation", "qk_validation_enc-attn.pt", "extract"),
        Artefact("projections", "projections.pickle", "project"),
        Artefact("centroids", "centroids.pickle", "cluster"),
        Artefact("lowrank", "lowrank.pickle", "route"),
        Artefact("key_centroids", "key_centroids.pickle", "route"),
        Artefact("bilinear_projections", "bilinear.pickle", "bilinear"),
        Artefact("bilinear_centroids", "bilinear_centroids.pickle", "bilinear"),
        Artefact("score", "score", "score"),
        Artefact("evaluate", "evaluate", "evaluate"),
        Artefact("report", "report", "report"),
    )
}


@dataclass(frozen=True)
class Manifest:
    """What an artefact was made from. ``content`` is the SHA-256 of its bytes, ``stat`` the sizes and times it had then."""

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


class Store:
    """The artefacts of one run.

    ``run_dir``: where new artefacts go. ``given``: artefacts that the user named by path; they are read, never written.
    ``base``: the run directory of which this one is a variation (a point of a sweep): what is not here is looked for there,
    and nothing is ever written there.
    """

    def __init__(self, run_dir: Path, given: Mapping[str, Path | str] | None = None, base: Path | None = None):
        self.run_dir = run_dir
        self.base = base
        self.given = dict(given or {})
        # queries and keys given alone serve both purposes: the last tenth is held out (see samples.py)
        self.splits_qk = "qk" in self.given and "qk_validation" not in self.given
        if self.splits_qk:
            self.given["qk_validation"] = self.given["qk"]
        self._facts: dict[str, dict[str, Any]] = {}

    # ---- reading ----

    def path(self, name: str) -> Path:
        """Where the finished artefact ``name`` lies; a missing one is a `UserError` that names the stage that makes it."""
        found = self.find(name)
        if found is None:
            artefact = ARTEFACTS[name]
            raise UserError(
                f"no finished {name} in {self.run_dir}: run stage={artefact.stage} first, or give a path with {name}=PATH"
            )
        return found

    def find(self, name: str) -> Path | None:
        """As `path`, None where there is no such artefact."""
        if name in self.given:
            path = Path(self.given[name])
            if not path.exists() and name != "model":  # a model may also be the name of a repository
                shown = "qk" if name == "qk_validation" and self.splits_qk else name
                raise UserError(
                    f"{shown}={path} does not exist: give the path of a file made by stage={ARTEFACTS[name].stage}"
                )
            return path
        for root in (self.run_dir, self.base):
            if root is not None and read_manifest(root / ARTEFACTS[name].path) is not None:
                return root / ARTEFACTS[name].path
        return None

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of the artefact that `find` finds; None for artefacts given by path that have none."""
        path = self.find(name)
        return None if path is None else read_manifest(path)

    def borrows(self, name: str) -> bool:
        """Whether the artefact that `find` finds belongs to ``base``: another run's, to read but not to replace."""
        path = self.find(name)
        return path is not None and self.base is not None and path == self.base / ARTEFACTS[name].path

    def content(self, name: str) -> str:
        """Hash of the artefact's bytes, taken from its manifest as long as no size or time of its files changed."""
        path = self.path(name)
        if not path.exists():
            return f"name:{path}"
        manifest = read_manifest(path)
        if manifest is not None and manifest.stat == file_stats(path):
            return manifest.content
        return content_hash(path)

    # ---- writing ----

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path for ``name``: renamed into place when the block ends well, removed when it does not.

        The old artefact's manifest goes first, so that a kill at any moment leaves either the old one, or none.
        """
        target = self.run_dir / ARTEFACTS[name].path
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        make_folder(self.run_dir)
        remove(temporary)
        try:
            yield temporary
            manifest_path(target).unlink(missing_ok=True)
            remove(target)
            temporary.rename(target)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise UserError(f"cannot write {target}: {error.strerror}; free space or choose another run_dir") from error
        finally:
            remove(temporary)

    def note(self, name: str, **facts: Any) -> None:
        """Plain facts (numbers, strings, lists) about ``name`` for its manifest, such as a validation loss."""
        self._facts.setdefault(name, {}).update(facts)

    def finish(
        self, name: str, stage: str, settings: dict[str, Any], parents: dict[str, str], seed: int | None
    ) -> None:
        """Write the manifest of ``name``: from now on it is finished."""
        target = self.run_dir / ARTEFACTS[name].path
        manifest = Manifest(
            artefact=name,
            stage=stage,
            settings=settings,
            parents=parents,
            content=content_hash(target),
            stat=file_stats(target),
            seed=seed,
            versions=versions(),
            facts=self._facts.pop(name, {}),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        write_text(manifest_path(target), json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n")

    def scratch(self, name: str) -> Path:
        """A folder for what must survive a kill and is nobody's artefact: checkpoints, caches."""
        folder = self.run_dir / "scratch" / name
        make_folder(folder)
        return folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out of the run directory until the block ends."""
        make_folder(self.run_dir)
        lock = self.run_dir / ".lock"
        try:
            handle = lock.open("a+")
        except OSError as error:
            raise UserError(f"cannot write in {self.run_dir}: {error.strerror}; choose another run_dir=PATH") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UserError(
                    f"{self.run_dir} is in use by {holder}: wait for it, or choose another run_dir=PATH"
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()}")
            handle.flush()
            yield


# ---- manifests and hashes ----


def manifest_path(artefact: Path) -> Path:
    """``qk_enc-attn.pt`` → ``qk_enc-attn.pt.json``."""
    return artefact.with_name(artefact.name + ".json")


def read_manifest(artefact: Path) -> Manifest | None:
    """The manifest beside ``artefact``; None if there is none, or the artefact is gone, or it cannot be read."""
    path = manifest_path(artefact)
    if not path.is_file() or not artefact.exists():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        return None


def content_hash(path: Path) -> str:
    """SHA-256 over the names and bytes of a file, or of all files of a folder in sorted order."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_stats(path: Path) -> dict[str, list[int]]:
    """Size and time of change of each file: equal stats mean that hashing again is not needed."""
    stats = {}
    for file in _files(path):
        status = file.stat()
        stats[str(file.relative_to(path)) if path.is_dir() else file.name] = [status.st_size, status.st_mtime_ns]
    return stats


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    found = {"python": sys.version.split()[0]}
    for package in ("sparsefinder", "torch", "transformers", "entmax", "scikit-learn", "datasets", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


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


# ---- small file helpers ----


def make_folder(folder: Path) -> None:
    """``mkdir -p``, with one clear line where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}; choose another run_dir=PATH") from error


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A progress bar for long work, silent when the output is not a terminal."""
    bar: Callable[..., Iterable[T]] = tqdm
    return bar(iterable, desc=description, total=total, disable=None, leave=False)
