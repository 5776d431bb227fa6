"""How documents are laid into blocks of tokens: each cut by itself, joined to one row, or side by side.

The setting is ``corpus.pack``. false: a block holds text of one document. true: documents follow each other, a separator between
two, and see each other (FULL-SENTENCES of RoBERTa). apart: every document keeps its own special tokens at both ends, and a
model sees each as if it were alone (`sparsefinder.models.documents_apart`). Where one ends and the next begins need not be
stored: a document ends with the tokenizer's last special token and begins with its first, and a text has the two one behind the
other only where somebody wrote them out. There it counts as two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefinder.errors import UserError, one_of

SHORTEST = 8  # tokens of a block, special ones included; the end of a document that is shorter is left out
APART = "apart"
_CHOICES = ("false", "true", APART)


def check_pack(pack: bool | str) -> None:
    """Raise a `UserError` for another value of ``corpus.pack`` than false, true or apart."""
    if not isinstance(pack, bool) and pack != APART:
        raise UserError(f"corpus.pack={pack} is unknown; {one_of(_CHOICES, pack)}")


def pack_of(corpus: Any) -> bool | str:
    """How a corpus lays documents into blocks: false, as where it does not say, true or apart."""
    pack: bool | str = getattr(corpus, "pack", False)
    check_pack(pack)
    return pack


def identity_of(corpus: Any) -> str:
    """What the blocks of a corpus depend on: its text by content, and how documents are laid into blocks."""
    pack = pack_of(corpus)
    return f"{corpus.fingerprint()} pack={str(pack).lower()}" if pack else str(corpus.fingerprint())


@dataclass
class OtherWay:
    """How many blocks there would be, and how many of them full, if documents were cut in the other way; without separators."""

    length: int  # most tokens of a block
    special: int  # those of them that are special
    full: int = 0
    blocks: int = 0

    def add(self, tokens: int) -> None:
        """A row of so many tokens that is cut by itself."""
        whole, rest = divmod(tokens, self.length - self.special)
        self.full += whole
        self.blocks += whole + (rest > 0 and rest + self.special >= SHORTEST)

    @property
    def share(self) -> float:
        """Of the blocks that are full."""
        return self.full / max(self.blocks, 1)


def ends_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts behind it."""
    of_word = tokenizer("a", return_special_tokens_mask=True)
    ids, special = of_word["input_ids"], of_word["special_tokens_mask"]
    before, after = (len(list(itertools.takewhile(bool, marks))) for marks in (special, reversed(special)))
    return ids[:before], ids[len(ids) - after :]


def boundary_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The last token of a document and the first of the next one, where they lie side by side.

    Raises:
        UserError: The tokenizer does not put a special token at both ends of a text.
    """
    before, after = ends_of(tokenizer)
    if not (before and after):
        raise UserError(
            "corpus.pack=apart tells documents by the special tokens at both ends of each, and this tokenizer puts none "
            f"{'behind' if before else 'before'} a text: give corpus.pack=true"
        )
    return after[-1], before[0]


def document_of(ids: Tensor, boundary: tuple[int, int]) -> Tensor:
    """Which document of its block each token belongs to, counted from 0: ids ``(…, N)`` → int64 ``(…, N)``; see `boundary_of`."""
    last, first = boundary
    begins = (ids[..., :-1] == last) & (ids[..., 1:] == first)
    return F.pad(begins, (1, 0)).long().cumsum(-1)


def cut(documents: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Each document in pieces."""
    for texts in documents:
        yield from tokenizer(texts, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]


def joined(
    documents: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, length: int, alone: OtherWay
) -> Iterator[list[int]]:
    """All documents as one row of tokens, a separator between two, in pieces; ``alone`` counts what each would fill by itself."""
    before, after = ends_of(tokenizer)
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    room = length - len(before) - len(after)
    waiting: list[int] = []
    for ids in _ids(documents, tokenizer, alone):
        if waiting and separator is not None:
            waiting.append(separator)
        waiting += ids
        end = len(waiting) // room * room
        for start in range(0, end, room):
            yield [*before, *waiting[start : start + room], *after]
        del waiting[:end]
    if waiting:
        yield [*before, *waiting, *after]


def side_by_side(
    documents: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, length: int, alone: OtherWay
) -> Iterator[list[int]]:
    """Documents as they are read alone, one behind the other; ``alone`` counts what each would fill by itself.

    Where a block has no room for the whole of a document, its beginning fills the block and the rest comes into the next one. No
    part is shorter than `SHORTEST`: so little room stays empty, and so short an end of a document is left out.
    """
    boundary_of(tokenizer)
    before, after = ends_of(tokenizer)
    special = len(before) + len(after)
    block: list[int] = []
    for ids in _ids(documents, tokenizer, alone):
        start = 0
        while len(ids) - start + special >= SHORTEST:
            if length - len(block) < SHORTEST:
                yield block
                block = []
            end = start + length - len(block) - special
            block += [*before, *ids[start:end], *after]
            start = end
    if block:
        yield block


def _ids(documents: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, alone: OtherWay) -> Iterator[list[int]]:
    for texts in documents:
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            alone.add(len(ids))
            yield ids
