"""The ``docstrings`` corpus: the documentation inside installed packages, read from their source files.

Real English by many authors, a few million words, on every machine that can run this project, and never downloaded. The
packages are those of the lock file, named in ``conf/corpus/docstrings.yaml``; whole packages are held out for validation and
test. A document is a module: its paragraphs, in order, a line each. Nothing is imported or executed. Few modules fill a
long block, so ``document`` can ask for more: a ``package`` (the modules of one top folder of a distribution, those below it
included) or a whole ``distribution``, their modules in the order of their paths, a package's own introduction first.

Documentation repeats itself (transformers says most things once per model), so a paragraph is kept only where it is new:
if most of its five-word sequences were met before, in any split, it is left out. The training part is read first; what
it holds is never in the others. So the same words do not decide both the training and the validation loss. With
``new_in=document`` a paragraph need only be new to its document's *other* texts, and a document says again what it was written
to say again, hundreds or thousands of words later: a third of its words can then be read off another place of it, most of them
beyond a window of 128, and that is a text that a model needs its length for.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsefinder.corpora import prose
from sparsefinder.corpora.files import check_limits
from sparsefinder.corpora.packing import check_pack
from sparsefinder.errors import UserError, one_of
from sparsefinder.storage.files import remove
from sparsefinder.storage.store import progress

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
UNITS = ("module", "package", "distribution")
NEW_IN = ("corpus", "document")
PYTHON = "python"  # in a list of packages: the language reference that comes with the interpreter (`pydoc_data.topics`)

_UNREAD = {"tests", "test", "testing", "_vendor", "vendored"}  # folders whose documentation is about something else
_TOO_LITTLE = 2_000  # characters of a split below which nothing can be learned or measured
_REPEATED = 0.5  # share of known five-word sequences from which a paragraph counts as a repetition
_HELD_OUT_SHARE = 8  # `max_characters` allows each held-out split the eighth part


@dataclass(frozen=True)
class Docstrings:
    """The prose of the documentation of ``train``, ``validation`` and ``test``: names of installed distributions."""

    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]
    document: str = "module"  # what a document is: module, package (a top folder) or distribution
    new_in: str = "corpus"  # where a paragraph may stand once only; document: there it may stand again, but in no other
    max_characters: int | None = None  # of the training part, an eighth of it for each other part; None for all
    pack: bool | str = False  # several documents in a block: false, true or apart, see `token_blocks`

    def __post_init__(self) -> None:
        for split in SPLITS:
            object.__setattr__(self, split, tuple(getattr(self, split)))
        check_limits(None, self.max_characters)
        check_pack(self.pack)
        if self.document not in UNITS:
            raise UserError(f"corpus.document={self.document} is unknown; {one_of(UNITS, self.document)}")
        if self.new_in not in NEW_IN:
            raise UserError(f"corpus.new_in={self.new_in} is unknown; {one_of(NEW_IN, self.new_in)}")
        named = [*self.train, *self.validation, *self.test]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise UserError(f"corpus=docstrings names {', '.join(twice)} twice: a package belongs to one split only")

    def documents(self, split: str, cache: Path | str | None = None) -> Iterator[str]:
        """The documents of a split.

        Args:
            split: ``train``, ``validation`` or ``test``.
            cache: A folder in which they are kept and from which they are read the next time; None reads the sources of all
                the packages (some 30 seconds).

        Raises:
            UserError: Too little text remains; packages that are not installed are left out with a warning.
        """
        yield from (document for _, document in self.by_package(split, cache))

    def by_package(self, split: str, cache: Path | str | None = None) -> Iterator[tuple[str, str]]:
        """As `documents`, each with the name of its package before it."""
        if split not in SPLITS:
            raise UserError(f"there is no split {split}; choose one of {', '.join(SPLITS)}")
        if cache is None:
            documents = _collect(self)[split]
        else:
            folder = Path(cache) / f"docstrings-{self.fingerprint()[:16]}"
            if not folder.is_dir():
                _write(folder, _collect(self))
            documents = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        characters = sum(len(document) for _, document in documents)
        if characters < _TOO_LITTLE:
            raise UserError(
                f"corpus=docstrings found {characters} characters for {split} in {', '.join(getattr(self, split))}; "
                "install the packages of requirements.lock or name others with corpus." + split
            )
        yield from ((package, document) for package, document in documents)

    def fingerprint(self) -> str:
        """Changes with the packages, their versions, the limit, and the way of cleaning."""
        versions = {split: {name: _version(name) for name in getattr(self, split)} for split in SPLITS}
        code = inspect.getsource(prose) + Path(__file__).read_text(encoding="utf-8")
        settings = [versions, self.max_characters, self.document, self.new_in, code]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _collect(corpus: Docstrings) -> dict[str, list[tuple[str, str]]]:
    """Package and document of every split."""
    repetitions = _Repetitions()
    documents: dict[str, list[tuple[str, str]]] = {}
    for split in SPLITS:
        limit = corpus.max_characters
        if limit is not None and split != "train":
            limit = max(limit // _HELD_OUT_SHARE, _TOO_LITTLE)
        documents[split] = list(_joined(_read(corpus, split, limit, repetitions)))
    return documents


def _joined(modules: Iterable[tuple[tuple[str, ...], str]]) -> Iterator[tuple[str, str]]:
    """Distribution and text of every document, from document and text of every module; each where its first module was."""
    documents: dict[tuple[str, ...], list[str]] = {}
    for document, text in modules:
        documents.setdefault(document, []).append(text)
    yield from ((name[0], "\n".join(texts)) for name, texts in documents.items())


def _document_of(package: str, path: str, unit: str) -> tuple[str, ...]:
    """What tells the document that a module belongs to from the others."""
    if unit == "distribution":
        return (package,)
    if unit == "module":
        return (package, path)
    return (package, *path.split("/")[:-1][:2])  # such as ("scipy", "scipy", "optimize"), whatever lies below it


def _read(
    corpus: Docstrings, split: str, limit: int | None, repetitions: _Repetitions
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Document and prose of every module that says something new."""
    packages: Sequence[str] = getattr(corpus, split)
    raw = kept = 0
    for package in progress(packages, f"reading documentation ({split})"):
        if _version(package) is None:
            log.warning("corpus: %s is not installed, its documentation is left out of %s", package, split)
            continue
        for path, source in _sources(package):
            texts = list(_parse(source))
            raw += sum(map(len, texts))
            name = _document_of(package, path, corpus.document)
            again = name if corpus.new_in == "document" else None
            module = "\n".join(p for text in texts for p in _new_paragraphs(text, repetitions, again))
            if module:
                kept += len(module)
                yield name, module
            if limit is not None and kept >= limit:
                break
        if limit is not None and kept >= limit:
            break
    log.info("corpus: %s: %s characters of documentation, %s of new prose kept", split, f"{raw:,}", f"{kept:,}")


def _new_paragraphs(text: str, repetitions: _Repetitions, again: tuple[str, ...] | None) -> Iterator[str]:
    if not repetitions.elsewhere(repetitions.texts, text, again):  # many are copies: no need to clean them again
        repetitions.texts.setdefault(text, again)
        yield from (paragraph for paragraph in prose.paragraphs(text) if repetitions.new(paragraph, again))


def _parse(source: str) -> Iterator[str]:
    with _no_garbage_collection():
        try:
            return iter(list(prose.docstrings(source)))
        except (SyntaxError, ValueError, RecursionError):  # templates, and files for other versions of Python
            return iter(())


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Building a syntax tree triggers the collector at every step, for nothing: twice as fast without."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sources(package: str) -> Iterator[tuple[str, str]]:
    """Path inside the distribution and content of its Python files that hold a long string, in sorted order."""
    for name, path in _files(package):
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if '"""' in source or "'''" in source or package == PYTHON:
            yield name, source


def _files(package: str) -> Iterable[tuple[str, Path]]:
    if package == PYTHON:
        return [("pydoc_data/topics.py", Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py")]
    distribution = importlib.metadata.distribution(package)
    files = sorted(str(file) for file in distribution.files or () if file.suffix == ".py")
    return [(file, Path(str(distribution.locate_file(file)))) for file in files if _UNREAD.isdisjoint(file.split("/"))]


def _version(package: str) -> str | None:
    if package == PYTHON:
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class _Repetitions:
    """Remembers every five-word sequence it has seen, and in which document, to tell paragraphs that say something new."""

    texts: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)
    met: dict[int, tuple[str, ...] | None] = field(default_factory=dict)

    def new(self, paragraph: str, again: tuple[str, ...] | None = None) -> bool:
        """Whether most of a paragraph was not said before, save in ``again``, the document that may repeat itself."""
        # tuples of small integers hash the same in every process, strings do not
        ids = [self.words.setdefault(word, len(self.words)) for word in paragraph.lower().split()]
        ids = [-1, -2, *ids, -3, -4]  # so that short paragraphs have sequences too
        sequences = {hash(five) for five in zip(ids, ids[1:], ids[2:], ids[3:], ids[4:], strict=False)}
        known = sum(self.elsewhere(self.met, sequence, again) for sequence in sequences)
        for sequence in sequences:
            self.met.setdefault(sequence, again)
        return known < _REPEATED * len(sequences)

    @staticmethod
    def elsewhere(seen: Mapping[Any, tuple[str, ...] | None], one: str | int, again: tuple[str, ...] | None) -> bool:
        """Whether ``one`` was seen first where it may not be said again."""
        return one in seen and (again is None or seen[one] != again)


def _write(folder: Path, splits: dict[str, list[tuple[str, str]]]) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    for split, documents in splits.items():
        (temporary / f"{split}.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    try:
        temporary.rename(folder)
    except OSError:
        remove(temporary)
        if not folder.is_dir():  # another process was first: the same content
            raise
