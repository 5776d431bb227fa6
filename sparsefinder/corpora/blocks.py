"""Documents as blocks of tokens: ragged, deterministic, never longer than a model can read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefinder.corpora.packing import APART, SHORTEST, OtherWay, cut, joined, pack_of, side_by_side
from sparsefinder.errors import UserError
from sparsefinder.storage.files import make_folder
from sparsefinder.storage.store import progress

log = logging.getLogger(__name__)

_AT_ONCE = 256  # documents that are tokenized together
_MOSTLY_EMPTY = 0.5  # share of a block's tokens below which blocks are worth a line


class Corpus(Protocol):
    """Text in three parts. Where it has an attribute ``pack``, a block may hold several documents: true, or ``apart``."""

    def documents(self, split: str, cache: Path | str | None = None) -> Iterator[str]:
        """The documents of a split, in an order of their own.

        Args:
            split: train, validation or test.
            cache: a folder for what is slow to make; None: nothing is kept.

        Returns:
            The text of each document.
        """

    def fingerprint(self) -> str:
        """Changes whenever the documents may have changed."""


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids of many blocks, ragged: block ``i`` is ``ids[starts[i]:starts[i + 1]]``, special tokens included.

    Args:
        ids: ``(tokens,)`` int32.
        starts: ``(blocks + 1,)`` int64.
    """

    ids: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        """Block ``index`` as ``(n,)`` int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self.ids[self.starts[index] : self.starts[index + 1]].long()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each block, ``(blocks,)`` int64."""
        return self.starts.diff()

    def first(self, count: int) -> TokenBlocks:
        """The first ``count`` blocks."""
        starts = self.starts[: count + 1]
        return TokenBlocks(self.ids[: starts[-1]], starts)

    def batch(self, indices: Sequence[int], pad_token_id: int) -> tuple[Tensor, Tensor]:
        """Some blocks padded on the right to the longest.

        Args:
            indices: Of ``B`` blocks.
            pad_token_id: What they are filled up with.

        Returns:
            Ids ``(B, N)`` int64 and valid ``(B, N)`` bool.
        """
        return pad([self[index] for index in indices], pad_token_id)


def pad(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Ragged rows as one tensor, padded on the right.

    Args:
        rows: ``B`` tensors ``(n_i,)``.
        value: What they are filled up with.

    Returns:
        The rows ``(B, N)``, and valid ``(B, N)`` bool.
    """
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]


def block_length(asked: int | None, most: int, setting: str) -> int:
    """How many tokens a block has.

    Args:
        asked: The setting's value; None for the most.
        most: Tokens that the model can take.
        setting: Its name, for messages.

    Raises:
        UserError: More was asked for than the model can take, or too little.
    """
    if asked is not None and asked > most:
        raise UserError(f"{setting}={asked}, but the model takes at most {most} tokens: give {most} or fewer")
    if asked is not None and asked < SHORTEST:
        raise UserError(f"{setting}={asked}: blocks of {asked} tokens are too short; choose {SHORTEST} or more")
    return asked or most


def token_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    length: int,
    limit: int | None = None,
    cache: Path | str | None = None,
) -> TokenBlocks:
    """The documents of a split cut into blocks, special tokens included.

    A block never holds text of two documents, unless the corpus says ``pack``: then documents follow each other, a separator
    between two, and are cut where a block is full, so that every block but the last is. As in RoBERTa's FULL-SENTENCES the
    documents of a block see each other; unlike there a cut may fall inside a sentence. With ``pack`` ``apart`` each keeps its own
    special tokens, and a model is to see it alone (`sparsefinder.corpora.packing`). Blocks of nothing but special tokens, of
    words that the tokenizer does not know, are left out.

    Args:
        corpus: The text.
        tokenizer: One of the tokenizers library.
        split: ``train``, ``validation`` or ``test``.
        length: Most tokens of a block.
        limit: Most blocks; None for all. Documents come in an order that is shuffled once and for all, so the first blocks
            are a fair sample, and the same ones for any larger ``limit``.
        cache: A folder in which blocks are kept, by the content of corpus and tokenizer; None to make them anew.

    Raises:
        UserError: Nothing remains, or the tokenizer is a slow one.

    Source:
        FULL-SENTENCES: Liu et al. 2019, "RoBERTa".
    """
    if length < SHORTEST:
        raise UserError(f"blocks of {length} tokens are too short; choose {SHORTEST} or more")
    pack, file = pack_of(corpus), None
    if cache is not None:
        make_folder(cache := Path(cache))
        file = cache / f"blocks-{_key(corpus, tokenizer, split, length, limit)}.pt"
        if file.is_file():
            with contextlib.suppress(RuntimeError, pickle.UnpicklingError, EOFError, TypeError):  # damaged: made again
                return TokenBlocks(**torch.load(file, weights_only=True))
    ids, ends = array("i"), array("q", [0])  # numbers, not objects: a tenth of the memory
    special = set(tokenizer.all_special_ids)
    unknown = 0
    with tempfile.TemporaryFile(dir=cache) as spool:
        documents = _shuffled(_Spooled(corpus.documents(split, cache), spool), split)
        other = OtherWay(length, len(tokenizer("")["input_ids"]))
        if pack:
            pieces = (side_by_side if pack == APART else joined)(documents, tokenizer, length, other)
        else:
            pieces = cut(documents, tokenizer, length)
        for piece in pieces:
            if len(piece) < SHORTEST:
                continue
            if special.issuperset(piece):
                unknown += 1
                continue
            if len(ends) - 1 == limit:
                break
            ids.extend(piece)
            ends.append(len(ids))
    if not ids:
        raise UserError(
            f"the {split} part of the corpus has no text of {SHORTEST} tokens or more"
            + (f" that this tokenizer knows: {unknown} blocks hold only special tokens" if unknown else "")
        )
    starts = torch.frombuffer(ends, dtype=torch.int64)
    blocks = TokenBlocks(torch.frombuffer(ids, dtype=torch.int32), starts)
    full = int((blocks.lengths == length).sum())
    if not pack:
        other.add(len(ids) - len(blocks) * other.special)  # all documents as one
    log.info(
        "corpus: %s: %s blocks of at most %d tokens, %s tokens; %.0f %% of the blocks are full, and %.0f %% %s",
        *(split, f"{len(blocks):,}", length, f"{starts[-1]:,}", 100 * full / len(blocks), 100 * other.share),
        "without packing" if pack else "would be with corpus.pack=true",
    )
    _report_room(blocks, length, split, bool(pack))
    if file is not None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        torch.save({"ids": blocks.ids, "starts": blocks.starts}, temporary)
        temporary.replace(file)
    return blocks


class _Spooled:
    """Documents in a file: they come in one order and are needed in another, and may be more than memory holds."""

    def __init__(self, documents: Iterable[str], file: IO[bytes]):
        self.file = file
        self.starts = array("q", [0])
        for document in documents:
            self.starts.append(self.starts[-1] + file.write(document.encode("utf-8", "surrogatepass")))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        self.file.seek(self.starts[index])
        return self.file.read(self.starts[index + 1] - self.starts[index]).decode("utf-8", "surrogatepass")


def _shuffled(documents: _Spooled, split: str) -> Iterator[list[str]]:
    """The documents in their order, many at a time."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    for start in progress(range(0, len(order), _AT_ONCE), f"tokenizing ({split})"):
        yield [documents[index] for index in order[start : start + _AT_ONCE]]


def _report_room(blocks: TokenBlocks, length: int, split: str, packed: bool) -> None:
    """A line in the log where blocks are mostly empty, and what helps."""
    share = len(blocks.ids) / (len(blocks) * length)
    if share < _MOSTLY_EMPTY:
        log.warning(
            "corpus: %s: only %.0f %% of the room for %d tokens in a block is filled; %s",
            *(split, 100 * share, length),
            "there is no more text"
            if packed or len(blocks) == 1
            else "corpus.pack=true puts several documents into a block, and with corpus=text corpus.documents=file makes one of "
            "a whole file",
        )


def _key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, split: str, length: int, limit: int | None) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; this needs one of the tokenizers library")
    state = json.loads(backend.to_str())
    for setting in ("truncation", "padding"):  # what the last call happened to ask for
        state.pop(setting, None)
    digest = hashlib.sha256()
    text = f"{corpus.fingerprint()} {pack_of(corpus)}"
    for part in (text, json.dumps(state, sort_keys=True), split, str(length), str(limit)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def draw(available: int, wanted: int, seed: int, what: str) -> list[int]:
    """Draw indices by a seed; a larger draw contains a smaller one.

    Args:
        available: How many there are.
        wanted: How many are drawn.
        seed: Of the draw.
        what: What has them, for messages.

    Returns:
        The indices, rising.

    Raises:
        UserError: More are wanted than there are.
    """
    if wanted > available:
        raise UserError(f"nsamples={wanted}, but {what} has only {available} blocks: ask for fewer, or give more text")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())
