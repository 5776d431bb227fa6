"""One process at a time in a run directory; whoever comes second learns who is there."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sparsefinder.errors import UserError
from sparsefinder.storage.files import make_folder, remove, write_text

LOCK, HOLDER = ".lock", ".lock-holder"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep every other process out of ``run_dir`` until the block ends, or the process, however it ends.

    The lock is the operating system's, on the file ``.lock``. Who holds it stands in a file beside it, because on Windows nobody
    else can read a file that is locked.

    Args:
        run_dir: A folder, made where it is missing.

    Raises:
        UserError: Another process, which is named, holds the lock; or the folder cannot be written.
    """
    make_folder(run_dir)
    holder = run_dir / HOLDER
    lock = FileLock(run_dir / LOCK)  # follows no link, from 3.20.1 on
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run_dir} is in use by {_read(holder)}: wait for it, or choose another run_dir=PATH"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write in {run_dir}: {error.strerror or error}; choose another run_dir=PATH") from error
    try:
        with contextlib.suppress(OSError):  # a full disk must not keep anybody from reading what is done
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")  # replaces a link, follows none
        yield
    finally:
        with contextlib.suppress(OSError):
            remove(holder)
        lock.release()


def _read(holder: Path) -> str:
    """The holder's name in one line, whatever the file holds."""
    try:
        with holder.open("rb") as file:
            name = " ".join(file.read(200).decode(errors="replace").split())
    except OSError:
        name = ""
    return name or "another process"
