"""Files and folders that survive a kill, a full disk and a power cut; and the one error that is meant for people."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from sparsefinder.errors import UserError

_CANNOT_WRITE = {
    code: os.strerror(code)
    for code in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
        *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE),  # not ours, or gone
    )
}
# libraries that write for us lose the number of the error; torch.save only notices that less arrived than it wrote
_LOST_NUMBER = {
    "(os error 28)": os.strerror(errno.ENOSPC),
    "(os error 27)": os.strerror(errno.EFBIG),
    "(os error 30)": os.strerror(errno.EROFS),
    "(os error 1)": os.strerror(errno.EPERM),
    "(os error 13)": os.strerror(errno.EACCES),
    "inline_container.cc": "not all bytes arrived, the disk is probably full",
    "iostream error": "not all bytes arrived, the disk is probably full",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes


def why_not_written(error: BaseException) -> str | None:
    """A few words where ``error``, or one that led to it, says that a file cannot be written; None where it does not."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):  # said already
            return None
        if isinstance(seen, OSError) and seen.errno in _CANNOT_WRITE:
            return f"{_CANNOT_WRITE[seen.errno]}{f' ({seen.filename})' if seen.filename else ''}"
        text = str(seen)
        for sign, words in _LOST_NUMBER.items():
            if sign in text and not isinstance(seen, OSError):
                return words
        seen = seen.__cause__ or seen.__context__
    return None


def cache_folder() -> Path:
    """Where this machine keeps what can be made again: ``$XDG_CACHE_HOME/sparsefinder``, by default ``~/.cache/sparsefinder``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsefinder"


def make_folder(folder: Path | str) -> None:
    """``mkdir -p``, with one clear line where that is not allowed."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}; choose another run_dir=PATH") from error


def remove(path: Path | str) -> None:
    """Remove a file or a folder if it is there; of a link the link, never what it points to."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    temporary.write_bytes(content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk: a rename may otherwise overtake the bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_of(path: Path | str) -> list[Path]:
    """A file itself, or all files of a folder at any depth, sorted; links to folders are not followed."""
    path = Path(path)
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def compression_of(begin: bytes) -> str:
    """The program that compressed a file which begins with these bytes (six or more), whatever its name; empty for none."""
    return next((program for sign, program in _COMPRESSED.items() if begin.startswith(sign)), "")
