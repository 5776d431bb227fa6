"""The points of a sweep: where each writes, and what became of it.

A point may be run in another process or on another machine, and that process may be killed; so what became of a point is
said by a file in its folder, ``point.json``, and not by what a function returns. The process that starts a sweep forgets the
old files first, and reads the new ones when it is over: a point without one was never started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsefinder.storage.files import make_folder, write_text

RECORD = "point.json"
STARTED, DONE, FAILED = "started", "done", "failed"
# what is done with a point, where and by whom, is no part of what it is
_NOT_OF_A_POINT = ("stage=", "run_dir=", "hydra.", "hydra/")


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Args:
        run_dir: Of the sweep.
        settings: Those of the command line that it has, ``key=value``.
        swept: The keys that differ from point to point.
    """

    run_dir: Path
    settings: tuple[str, ...]
    swept: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it writes: the same settings always give the same folder."""
        digest = hashlib.sha256("\n".join(self.settings).encode()).hexdigest()[:10]
        return self.run_dir / "sweep" / digest

    @property
    def name(self) -> str:
        """The settings by which it differs from the others; all of them where it is the only one."""
        return " ".join(s for s in self.settings if s.partition("=")[0] in self.swept) or " ".join(self.settings)

    @property
    def status(self) -> Status:
        """What became of it so far."""
        return read(self.folder)

    def note(self, state: str, error: str = "", traceback: str = "") -> None:
        """Say what became of it."""
        make_folder(self.folder)
        record = {"point": self.name, "settings": self.settings, "state": state, "error": error, "traceback": traceback}
        write_text(self.folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def forget(self) -> None:
        """Take back what was said about it, before it is run again."""
        with contextlib.suppress(OSError):  # nowhere to write: its first note will say so
            (self.folder / RECORD).unlink()


@dataclass(frozen=True)
class Status:
    """What became of a point.

    Args:
        state: `STARTED`, `DONE` or `FAILED`; empty where it was never started.
        error: What failed, in one line.
        traceback: Of an error that nobody expected.
        point: Name of the point.
    """

    state: str = ""
    error: str = ""
    traceback: str = ""
    point: str = ""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to run."""
        return self.state in (DONE, FAILED)


def point_of(run_dir: Path, overrides: Iterable[str], swept: Iterable[str]) -> Point:
    """The point with these settings of the command line; the stages, the run directory and Hydra's own do not count."""
    return Point(run_dir, tuple(sorted(o for o in overrides if not o.startswith(_NOT_OF_A_POINT))), tuple(swept))


def read(folder: Path | str) -> Status:
    """The record in ``folder``; an empty one where it is no point of a sweep, or the file cannot be read."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Status(*(str(record[key]) for key in ("state", "error", "traceback", "point")))
    except (OSError, ValueError, KeyError, TypeError):
        return Status()


def not_done(root: Path | str) -> list[str]:
    """The points at and below ``root`` that did not end well, each with its folder."""
    root = Path(root)
    statuses = {path.parent: read(path.parent) for path in sorted(root.rglob(RECORD))}
    return [f"{status.point} ({folder})" for folder, status in statuses.items() if status.state != DONE]


def count_finished(points: Iterable[Point]) -> int:
    """How many of them there is nothing left to run of."""
    return sum(point.status.finished for point in points)


def mark_failed(points: Iterable[Point]) -> None:
    """A process died: points that it, or one that fell with it, was running have failed."""
    for point in points:
        if point.status.state == STARTED:
            point.note(FAILED, "its process was killed, or one beside it (is there enough memory for so many at once?)")


def report(points: Sequence[Point]) -> list[str]:
    """One line for each point that did not end well, and a last one that counts them; empty where all is done."""
    lines = []
    for point in points:
        status = point.status
        if status.state == DONE:
            continue
        reason = {FAILED: status.error, STARTED: "is not finished: still running, or killed"}
        where = f" (traceback in {point.folder / RECORD})" if status.traceback else ""
        lines.append(f"{point.name}: {reason.get(status.state, 'was not started')}{where}")
    if lines:
        lines.append(
            f"{len(lines)} of {len(points)} points failed; the same command tries them again and skips what is done"
        )
    return lines
