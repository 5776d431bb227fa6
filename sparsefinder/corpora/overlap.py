"""Held-out text must not be training text: the same content under two names, and documents that are in both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping

from sparsefinder.errors import UserError

log = logging.getLogger(__name__)


def check_contents(training: Mapping[str, bytes], held_out: Mapping[str, bytes]) -> None:
    """Refuse a held-out file that has the content of one to train on.

    Args:
        training: What was typed, such as ``corpus.train=FILE``, → hash of the file's content.
        held_out: The same of the files that are held out.

    Raises:
        UserError: Two have the same content.
    """
    known = {content: name for name, content in training.items() if content != _NOTHING}
    for name, content in held_out.items():
        if content in known:
            raise UserError(
                f"{known[content]} and {name} have the same content: text held out must not be training text"
            )


_NOTHING = hashlib.sha256().digest()  # an empty file, which is refused for that when it is read


class Overlap:
    """Remembers the documents of a held-out split, and compares them with those of the training split."""

    def __init__(self, name: str):
        self.name = name  # of the split in messages, such as corpus.validation
        self.held_out: set[bytes] = set()

    def reading(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents, as they are."""
        for document in documents:
            self.held_out.add(_hash(document))
            yield document

    def check(self, training: Iterable[str]) -> bool:
        """Whether the training documents are the very same ones; a warning with their number where only some are shared."""
        shared: set[bytes] = set()
        others = False
        for document in map(_hash, training):
            if document in self.held_out:
                shared.add(document)
            else:
                others = True
        if shared and shared == self.held_out and not others:
            return True
        if shared:
            log.warning(
                "corpus: %s of the %s documents of %s are in corpus.train too: text held out must not be training text",
                *(f"{len(shared):,}", f"{len(self.held_out):,}", self.name),
            )
        return False


def _hash(document: str) -> bytes:
    return hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).digest()
