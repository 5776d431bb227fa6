"""Artefacts on disk: where each lies, whether it is finished, and what it was made from.

An artefact is a file or a folder of a run directory. It is written beside its place under a temporary name and renamed, and
its manifest (``<artefact>.json``) is written last: **no manifest, not finished**. A manifest holds the facts about the
artefact (stage, resolved settings, parents with content hashes, seed, versions), never its name, so a stage whose settings
and parents are unchanged can be skipped, and a changed parent makes its children stale. An artefact whose bytes are not
those of its manifest is never read: it was damaged, or replaced by hand.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from sparsefinder.errors import UserError
from sparsefinder.storage.files import files_of, make_folder, remove, sync, why_not_written, write_text
from sparsefinder.storage.locking import locked
from sparsefinder.storage.manifests import (
    Manifest,
    content_hash,
    file_stats,
    manifest_path,
    plain,
    read_manifest,
    versions,
    write_manifest,
)

__all__ = [
    "ARTEFACTS",
    "Artefact",
    "Manifest",
    "Store",
    "UserError",
    "content_hash",
    "file_stats",
    "make_folder",
    "manifest_path",
    "plain",
    "progress",
    "read_manifest",
    "remove",
    "versions",
    "write_text",
]

T = TypeVar("T")


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
        Artefact("online_centroids", "online_centroids.pickle", "cluster_online"),
        Artefact("lowrank", "lowrank.pickle", "route"),
        Artefact("key_centroids", "key_centroids.pickle", "route"),
        Artefact("bilinear_projections", "bilinear.pickle", "bilinear"),
        Artefact("bilinear_centroids", "bilinear_centroids.pickle", "bilinear"),
        Artefact("indexer", "indexer.pickle", "bilinear"),
        Artefact("calibration", "calibration", "calibrate"),
        Artefact("score", "score", "score"),
        Artefact("evaluate", "evaluate", "evaluate"),
        Artefact("compare", "compare", "compare"),
        Artefact("sparse_model", "sparse_model", "export"),
        Artefact("report", "report", "report"),
    )
}


ATTENTIONS = ("enc", "dec", "cross")  # of encoders, of decoders, and from what is written to what was read
SAMPLES = ("qk", "qk_validation")


def missing(pattern: str, name: str) -> UserError:
    """What to say where a pattern lacks the artefact ``name``: the stage that makes it, and how to give a file."""
    return UserError(
        f"{pattern} needs {name}: run stage={ARTEFACTS[name].stage} first, or give a file with {name}=PATH"
    )


class Store:
    """The artefacts of one run.

    Args:
        run_dir: Where new artefacts go.
        given: Artefacts that the user named by path; they are read, never written.
        base: The run directory of which this one is a variation (a point of a sweep): what is not here is looked for there,
            and nothing is ever written there.
        query_scale: A number, or ``sqrt_d``, by which the queries of files that are given are to be multiplied; None for 1.
        which: The attention whose queries and keys are recorded: enc, dec or cross; it is in the names of their files.

    Raises:
        UserError: ``query_scale`` is no positive number, or there is nothing that it is for.
    """

    def __init__(
        self,
        run_dir: Path | str,
        given: Mapping[str, Path | str] | None = None,
        base: Path | str | None = None,
        query_scale: float | str | None = None,
        which: str = "enc",
    ):
        if which not in ATTENTIONS:
            raise UserError(f"which={which} is no attention; choose one of {', '.join(ATTENTIONS)}")
        self.which = which
        self.run_dir = Path(run_dir)
        self.base = None if base is None else Path(base)
        self.given = dict(given or {})
        # queries and keys given alone serve both purposes: the last tenth is held out (see held_out.py)
        self.splits_qk = "qk" in self.given and "qk_validation" not in self.given
        if self.splits_qk:
            self.given["qk_validation"] = self.given["qk"]
        self.query_scale = query_scale
        _check_scale(query_scale, self.given)
        self._said: set[str] = set()
        self._facts: dict[str, dict[str, Any]] = {}
        self._hashed: dict[Path, tuple[dict[str, list[int]], str]] = {}  # files without a manifest that fits

    # ---- reading ----

    def path(self, name: str) -> Path:
        """Where the finished artefact ``name`` lies; a missing one is a `UserError` that names the stage that makes it."""
        path = self.find(name)
        if path is None:
            artefact = ARTEFACTS[name]
            raise UserError(
                f"no finished {name} in {self.run_dir}: run stage={artefact.stage} first, or give a path with {name}=PATH"
            )
        return path

    def find(self, name: str) -> Path | None:
        """As `path`, None where there is no such artefact."""
        if name in self.given:
            path = Path(self.given[name])
            known = path.is_file() or path.is_dir()  # a pipe or a device may never end
            if not known and (name != "model" or path.exists()):  # a model may also be the name of a repository
                shown = "qk" if name == "qk_validation" and self.splits_qk else name
                wrong = "is no ordinary file" if path.exists() else "does not exist"
                raise UserError(
                    f"{shown}={path} {wrong}: give the path of a file made by stage={ARTEFACTS[name].stage}"
                )
            return path
        for root in (self.run_dir, self.base):
            if root is not None and read_manifest(root / self._place(name)) is not None:
                return root / self._place(name)
        return None

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of the artefact that `find` finds; None for artefacts given by path that have none."""
        path = self.find(name)
        return None if path is None else read_manifest(path)

    def borrows(self, name: str) -> bool:
        """Whether the artefact that `find` finds belongs to ``base``: another run's, to read but not to replace."""
        path = self.find(name)
        return path is not None and self.base is not None and path == self.base / self._place(name)

    def content(self, name: str) -> str:
        """Hash of the artefact's bytes. A `UserError` where one of this run is not what its stage wrote."""
        path = self.path(name)
        if not path.exists():
            return f"name:{path}"
        manifest = read_manifest(path)
        content = self._hash(path, manifest)
        if name not in self.given and manifest is not None and content != manifest.content:
            raise UserError(
                f"{path} is not what stage={manifest.stage} wrote: it was damaged or replaced; run that stage again, "
                f"or give the file with {name}=PATH to use it as it is"
            )
        if self.query_scale is not None and name in SAMPLES and name in self.given:
            return f"{content} query_scale={self.query_scale}"
        return content

    def damaged(self, name: str) -> bool:
        """Whether the artefact that `find` finds is not what its stage wrote."""
        try:
            self.content(name)
        except UserError:
            return True
        return False

    def _hash(self, path: Path, manifest: Manifest | None) -> str:
        """The content of ``path``; not hashed again while nothing about its files changes (see `file_stats`)."""
        stats = file_stats(path)
        if manifest is not None and manifest.stat == stats:
            return manifest.content
        known = self._hashed.get(path)
        if known is None or known[0] != stats:
            known = self._hashed[path] = (stats, content_hash(path))
        return known[1]

    def _place(self, name: str) -> str:
        """The path of an artefact below a run directory."""
        return ARTEFACTS[name].path.replace("enc-attn", f"{self.which}-attn")

    def first_time(self, what: str) -> bool:
        """Whether nobody asked about ``what`` before: a warning is given once in a run."""
        first = what not in self._said
        self._said.add(what)
        return first

    # ---- writing ----

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path for ``name``: renamed into place when the block ends well, removed when it does not.

        The old artefact's manifest goes first, so that a kill at any moment leaves either the old one, or none. The bytes are
        on the disk before the name is.
        """
        target = self.run_dir / self._place(name)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        make_folder(self.run_dir)
        try:
            remove(temporary)
            yield temporary
            for file in files_of(temporary):
                sync(file)
            manifest_path(target).unlink(missing_ok=True)
            remove(target)
            temporary.rename(target)
            sync(self.run_dir)
        except Exception as error:
            if why := why_not_written(error):
                raise UserError(f"cannot write {target}: {why}; free space or choose another run_dir") from error
            raise
        finally:
            with contextlib.suppress(OSError):  # a folder that turned read-only keeps it
                remove(temporary)

    def note(self, name: str, **facts: Any) -> None:
        """Plain facts (numbers, strings, lists) about ``name`` for its manifest, such as a validation loss."""
        self._facts.setdefault(name, {}).update(facts)

    def finish(
        self, name: str, stage: str, settings: dict[str, Any], parents: dict[str, str], seed: int | None
    ) -> None:
        """Write the manifest of an artefact: from now on it is finished.

        Args:
            name: Of the artefact, whose file or folder is in place.
            stage: The stage that made it.
            settings: All settings of that stage, resolved.
            parents: Name → hash of what it read.
            seed: Of the stage; None where it draws nothing.
        """
        target = self.run_dir / self._place(name)
        stat = file_stats(target)  # before the hash: a change in between is seen the next time
        manifest = Manifest(
            artefact=name,
            stage=stage,
            settings=settings,
            parents=parents,
            content=content_hash(target),
            stat=stat,
            seed=seed,
            versions=versions(),
            facts=self._facts.pop(name, {}),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        write_manifest(target, manifest)

    def scratch(self, name: str) -> Path:
        """A folder for what must survive a kill and is nobody's artefact: checkpoints, caches."""
        folder = self.run_dir / "scratch" / name
        make_folder(folder)
        return folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out of the run directory until the block ends.

        What a killed process left half written is removed. A full disk or a folder that turns read-only within the block is a
        `UserError`, whatever was being written.
        """
        with locked(self.run_dir):
            try:
                for rubbish in self.run_dir.glob(".*.tmp"):
                    remove(rubbish)
                yield
            except Exception as error:
                if why := why_not_written(error):
                    raise UserError(
                        f"cannot write in {self.run_dir}: {why}; free space or choose another run_dir=PATH"
                    ) from error
                raise


def _check_scale(scale: Any, given: Mapping[str, Path | str]) -> None:
    if scale is None:
        return
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale != "sqrt_d" and not (number and 0 < scale < math.inf):
        raise UserError(
            f"query_scale={scale}: give a positive number that queries are multiplied by, sqrt_d where they were divided by √D, "
            "or null"
        )
    if not {*SAMPLES} & given.keys():
        raise UserError(
            f"query_scale={scale} is for queries of files given by path: give qk=PATH or qk_validation=PATH too, or leave it out"
        )


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A progress bar for long work, silent when the output is not a terminal."""
    bar: Callable[..., Iterable[T]] = tqdm
    return bar(iterable, desc=description, total=total, disable=None, leave=False)
