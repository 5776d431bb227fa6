"""The ``datasets`` corpus: any data set that the library ``datasets`` reads, on the hub or in files, streamed or downloaded."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsefinder.corpora.files import SPLITS, check_limits, limited
from sparsefinder.corpora.loading import load_split
from sparsefinder.corpora.overlap import Overlap, check_contents
from sparsefinder.corpora.packing import check_pack
from sparsefinder.corpora.reading import digest_of, files_named, is_gzip
from sparsefinder.corpora.splits import rows_of
from sparsefinder.errors import UserError
from sparsefinder.storage import hub
from sparsefinder.storage.files import files_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnyDataset:
    """One document a row: the strings of one column.

    Streamed rows are read as they come and never kept, so a data set may be larger than the disk; how many of them are wanted
    must be said. A data set of the hub is known by its name: give a ``revision`` where a run must stay repeatable.
    """

    path: str | None = None  # a name on the hub such as allenai/c4, or a reader of files: json, csv, parquet, text
    name: str | None = None  # configuration of the data set, such as en
    revision: str | None = None  # commit or tag on the hub; None for the newest
    data_files: Mapping[str, str | Sequence[str]] | None = (
        None  # split → file, folder, pattern or list, for readers of files
    )
    column: str = "text"
    train: str = "train"  # names of the splits there; slices such as train[:1%] work where nothing is streamed
    validation: str = "validation"
    test: str | None = None  # None: the validation split serves here too
    streaming: bool = True
    max_documents: int | None = None  # of each split that are not empty; None for all
    max_characters: int | None = None  # of the training split, an eighth of it for each other split; None for all
    pack: bool | str = False  # several documents in a block: false, true or apart, see `token_blocks`

    def __post_init__(self) -> None:
        if self.path is None:
            raise UserError(
                "corpus=datasets needs a data set: give corpus.path=NAME_ON_THE_HUB, or corpus.path=json (csv, parquet, text) "
                "with corpus.data_files={train: FILE, validation: FILE}"
            )
        check_limits(self.max_documents, self.max_characters)
        check_pack(self.pack)
        if self.streaming and self.max_documents is None and self.max_characters is None:
            raise UserError(
                "corpus=datasets streams: say how much of each split to read with corpus.max_documents=N or "
                "corpus.max_characters=N, or download all with corpus.streaming=false"
            )
        for name, held_out in (("validation", self.validation), ("test", self.test)):
            if held_out and (shared := self.shared_rows(held_out)):
                raise UserError(
                    f"corpus=datasets takes train={self.train} and {name}={held_out} from the same rows of {shared}: name two "
                    "splits that share none; text held out must not be training text"
                )

    def shared_rows(self, held_out: str) -> str:
        """What ``held_out`` and the training split both read, a file or a name; empty where their rows are others."""
        for training in rows_of(str(self.train)):
            for other in rows_of(str(held_out)):
                source = self._source(other.name)
                same = source == self._source(training.name) or "all" in (training.name, other.name)
                if same and max(training.first, other.first) < min(training.end, other.end):
                    return source
        return ""

    def _source(self, name: str) -> str:
        """What the split ``name`` is read from: one file, or what ``datasets`` knows by that name."""
        file = (self.data_files or {}).get(name)
        return str(Path(file).resolve()) if isinstance(file, (str, Path)) else name

    def documents(self, split: str, cache: Path | str | None = None) -> Iterator[str]:
        """The documents of ``split`` that are not empty. ``cache`` is not used: ``datasets`` keeps its own."""
        if split == "train" or self.data_files is None:  # a second look is for files that are here
            yield from self._some(split)
            return
        overlap = Overlap(f"corpus.{split}")
        yield from overlap.reading(self._some(split))
        if overlap.check(self._some("train")):
            log.warning("corpus: %s: these are the documents of corpus.train: nothing is held out", split)

    def _some(self, split: str) -> Iterator[str]:
        return limited(self._documents(split), split, self.max_documents, self.max_characters)

    def _documents(self, split: str) -> Iterator[str]:
        name = self._name(split)
        options: dict[str, Any] = {"streaming": self.streaming, "revision": self.revision}
        if self.data_files is not None:
            options["data_files"] = {key: [str(file) for file in self._files(key)] for key in self.data_files}
        rows = load_split(
            f"corpus=datasets corpus.path={self.path}",
            str(self.path),
            self.name,
            name,
            bool(self.data_files),
            **options,
        )
        read = nulls = 0
        try:
            for row in rows:
                text = self._text(row)
                read, nulls = read + 1, nulls + (text is None)
                if document := (text or "").strip():
                    yield document
        except UserError:
            raise
        except Exception as error:  # a stream that breaks, a file that its reader does not understand: no common type
            raise hub.refusal(f"corpus.{split}={name} of {self.path}", error, " cannot be read on") from error
        finally:  # a limit may have been met before the last row
            if nulls:
                log.info("corpus: %s: %d of %d rows have no text (null) and are left out", split, nulls, read)
        if not read:
            raise UserError(f"{self.path} has no rows in its split {name}")
        if nulls == read:
            raise UserError(f"corpus.column={self.column} of {self.path} holds no text: all {read} rows are null")

    def _name(self, split: str) -> str:
        """What ``split`` is called there; a `UserError` where that can be seen to be wrong."""
        names = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}
        if split not in names:
            raise UserError(f"there is no split {split}; choose one of {', '.join(names)}")
        name = str(names[split])
        if self.streaming and "[" in name:
            raise UserError(
                f"corpus.{split}={name}: a stream has no slices; set corpus.streaming=false, or name a whole split"
            )
        for rows in rows_of(name):
            if self.data_files is not None and rows.name not in (*self.data_files, "all"):
                raise UserError(
                    f"corpus.{split}={name} is not in corpus.data_files: choose one of {', '.join(self.data_files)}"
                )
        return name

    def _files(self, key: str) -> list[Path]:
        return files_named((self.data_files or {})[key], f"data_files.{key}")

    def _text(self, row: Mapping[str, Any]) -> str | None:
        """What a row holds; None for null, which CSV readers make of an empty cell, ``null`` and ``NA`` too."""
        others = ", ".join(map(str, row))
        if self.column not in row:
            raise UserError(f"{self.path} has no column {self.column}: choose one of {others} with corpus.column=")
        value = row[self.column]
        if value is None or (isinstance(value, float) and math.isnan(value)):  # columns of numbers have NaN for null
            return None
        if not isinstance(value, str):
            raise UserError(
                f"corpus.column={self.column} of {self.path} holds {type(value).__name__}, not text: choose another of its "
                f"columns ({others}) with corpus.column="
            )
        return value

    def fingerprint(self) -> str:
        """Changes with the settings and the bytes of local files, of ``data_files`` or of a folder given as ``path``.

        What the hub holds is known by its name and revision.
        """
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode())
        contents: dict[str, dict[str, bytes]] = {}
        for key in sorted(self.data_files or {}):
            contents[key] = {f"corpus.data_files.{key}={file}": self._digest(file, key) for file in self._files(key)}
            for content in contents[key].values():
                digest.update(key.encode() + content)
        if self.data_files:
            train, *others = ({rows.name for rows in rows_of(self._name(split))} for split in SPLITS)
            held_out = set().union(*others) - train  # slices of one file are compared as such, above
            check_contents(
                *({k: v for key in keys for k, v in contents.get(key, {}).items()} for keys in (train, held_out))
            )
        folder = Path(str(self.path))
        if folder.is_dir() and not self.data_files:
            for path in files_of(folder):
                inside = path.relative_to(folder)
                hidden = any(part.startswith(".") for part in inside.parts)
                if not hidden:  # `datasets` does not read those either, and .git changes at a look
                    digest.update(os.fsencode(inside) + b"\0" + digest_of(path, "path"))
        return digest.hexdigest()

    def _digest(self, file: Path, key: str) -> bytes:
        if is_gzip(file, f"data_files.{key}") and self.streaming and file.suffix != ".gz":
            raise UserError(f"corpus.data_files.{key}={file} is compressed by gzip: give it a name that ends in .gz")
        if not file.stat().st_size:
            raise UserError(f"corpus.data_files.{key}={file} is empty; give a file with rows")
        return digest_of(file, f"data_files.{key}")
