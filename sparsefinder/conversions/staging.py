"""The folder of a converted model: there whole or not at all, and never over another."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsefinder.errors import UserError


@contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """A folder to save into that becomes `out` when the block ends well, and vanishes when it raises.

    Args:
        out: a path where nothing is yet.

    Yields:
        A folder beside `out` (renaming within one file system is atomic).

    Raises:
        UserError: before anything is written, if `out` exists, or if its parent cannot hold it.
    """
    out = Path(out)
    refuse_existing(out)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write into {out.parent}: {error.strerror}; choose another output folder") from error
    try:
        yield folder
        refuse_existing(out)
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(out: str | Path) -> None:
    """Raise `UserError` if `out` exists: a conversion never overwrites. For a check before the long work starts."""
    if os.path.lexists(out):
        raise UserError(
            f"output folder {out} exists; a conversion overwrites nothing: choose another name or remove it"
        )
