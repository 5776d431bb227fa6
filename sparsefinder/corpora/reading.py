"""Files of plain text by whatever name they were given: one, a list, a folder, a pattern of names; compressed or not."""

from __future__ import annotations

import glob
import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from sparsefinder.corpora.documents import LINE
from sparsefinder.errors import UserError
from sparsefinder.storage.files import compression_of, files_of

_NOT_TEXT = {  # how a file begins → what it is, and how to make text of it
    b"\xff\xfe": "not UTF-8 text but UTF-16: convert it, such as by iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "not UTF-8 text but UTF-16: convert it, such as by iconv -f UTF-16 -t UTF-8",
    b"PK\x03\x04": "a zip archive, not text: unpack it",
    b"%PDF-": "a PDF file, not text: take the text out of it",
    b"PAR1": "a parquet file: read it with corpus=datasets corpus.path=parquet",
}
_MARK = "\ufeff"  # a byte order mark is no text


def files_named(given: str | Sequence[str], split: str) -> list[Path]:
    """The files that a setting names.

    Args:
        given: A file, a folder (all its files that are not hidden), a pattern such as ``texts/*.txt`` (sorted by their
            paths), or a list of any of these, in its order.
        split: The setting, ``corpus.<split>``, for messages.

    Raises:
        UserError: There is none, or one is named twice.
    """
    if isinstance(given, str):
        return list(_files_named(given, split))
    paths = [path for name in given for path in _files_named(str(name), split)]
    if not paths:
        raise UserError(
            f"corpus.{split}=[] names no file; give a file of plain text, a folder or a pattern such as texts/*.txt"
        )
    twice = sorted(path for path, count in Counter(path.resolve() for path in paths).items() if count > 1)
    if twice:
        raise UserError(f"corpus.{split} names {twice[0]} twice")
    return paths


def _files_named(name: str, split: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [file for file in files_of(path) if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if not inside:
            raise UserError(
                f"corpus.{split}={name} is a folder without files; give a folder that has files of plain text"
            )
        yield from inside
    elif not path.exists() and glob.has_magic(name):
        matching = sorted(file for match in glob.glob(str(path), recursive=True) if (file := Path(match)).is_file())
        if not matching:
            raise UserError(
                f"corpus.{split}={name} matches no file; give a file of plain text, a folder or another pattern"
            )
        yield from matching
    else:
        yield path


def lines_of(path: Path, split: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, decompressed where it is gzip, whatever its name."""
    position = 0
    with _opened(path, split) as file:
        while data := _next(file, path, split):
            if not position:
                _check_begin(data, path, split)
            if (zero := data.find(b"\0")) >= 0:
                raise UserError(
                    f"corpus.{split}={path} is not UTF-8 text (byte {position + zero} is zero, as in UTF-16 and in binary files)"
                )
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {position + error.start}"
                raise UserError(
                    f"corpus.{split}={path} is not UTF-8 text ({where}): convert it, such as by iconv -f LATIN1 -t UTF-8"
                ) from error
            yield from LINE.findall(line if position else line.removeprefix(_MARK))
            position += len(data)


def _check_begin(data: bytes, path: Path, split: str) -> None:
    """Raise a `UserError` for what is known by its first bytes not to be text."""
    if program := compression_of(data):
        raise UserError(f"corpus.{split}={path} is compressed by {program}: unpack it, or compress it by gzip instead")
    for begin, what in _NOT_TEXT.items():
        if data.startswith(begin):
            raise UserError(f"corpus.{split}={path} is {what}")


def digest_of(path: Path, split: str) -> bytes:
    """A hash of what is in the file that ``corpus.<split>`` names, decompressed; a `UserError` where there is none."""
    digest = hashlib.sha256()
    with _opened(path, split) as file:
        while block := _next(file, path, split, 1 << 20):
            digest.update(block)
    return digest.digest()


def _next(file: BinaryIO, path: Path, split: str, size: int | None = None) -> bytes:
    """The next line, or so many bytes; empty at the end."""
    try:
        return file.readline() if size is None else file.read(size)
    except EOFError as error:
        raise UserError(
            f"corpus.{split}={path} is compressed by gzip and ends too early: it was cut; fetch or compress it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"corpus.{split}={path} is compressed by gzip and damaged ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise UserError(f"corpus.{split}={path} cannot be read: {error.strerror}") from error


def is_gzip(path: Path, split: str) -> bool:
    """Whether a file is compressed by gzip, by its first bytes and not by its name."""
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"corpus.{split}={path}: {what}; give a file of plain text")
    try:
        with path.open("rb") as file:
            return compression_of(file.read(6)) == "gzip"
    except OSError as error:
        raise UserError(f"corpus.{split}={path} cannot be read: {error.strerror}") from error


def _opened(path: Path, split: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if is_gzip(path, split) else path.open("rb")
