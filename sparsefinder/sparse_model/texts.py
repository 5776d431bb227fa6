"""Whatever somebody has as texts → token ids to read, some to learn from and some to measure on."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError

log = logging.getLogger(__name__)

MOST_TEXTS = 10_000  # that are looked at, of those that there are
_FEWEST = 2  # texts: one to learn from, one to measure on
_CHARACTERS = 16  # of a token at most, in the mean: of a text without end the rest is not even split into tokens
_SHORTEST = 4  # tokens of a text that is read at all, special ones included


@dataclass(frozen=True)
class Reading:
    """Token ids ``(1, n)`` int64 of each text: of those to learn from, and of those to measure on."""

    training: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Of the texts to learn from."""
        return sum(ids.shape[1] for ids in self.training)


def read_texts(texts: Any, tokenizer: Any, length: int, tokens: int, seed: int) -> Reading:
    """Texts in an order drawn by the seed, until there are enough tokens; a tenth is held out.

    Of each text its begin is read, and what follows only where the begins of all of them are not enough: a single long file
    is many texts.

    Args:
        texts: One string, an iterable of strings, or one of mappings with a field ``text`` (or a single field of text), such as
            a `datasets.Dataset`.
        tokenizer: Of the model.
        length: Tokens that are read at a time, special ones included.
        tokens: Enough to learn from.
        seed: Draws the order.

    Raises:
        UserError: For texts of another kind, none at all, or too few.
    """
    strings = strings_of(texts)
    order = torch.randperm(len(strings), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = tokens * 10 / 9
    longer: list[int] = []
    kept: list[Tensor] = []
    total = 0
    for index in order:
        if total >= wanted:
            break
        ids = token_ids(tokenizer, strings[index], length)
        if ids.shape[1] >= _SHORTEST:
            total += ids.shape[1]
            kept.append(ids)
        if ids.shape[1] == length:
            longer.append(index)
    for index in longer:
        if total >= wanted:
            break
        rest = _rest(tokenizer, strings[index], length, int(wanted - total))
        total += sum(ids.shape[1] for ids in rest)
        kept += rest
    if len(kept) < _FEWEST:
        raise UserError(
            f"{len(kept)} of {len(strings)} texts have {_SHORTEST} tokens or more, which is too few: give at least {_FEWEST}, "
            "better a hundred, like those that the model will read"
        )
    held_out = max(1, len(kept) // 10)
    log.info("fit: %d stretches of %d texts, %d tokens", len(kept), len(strings), total)
    return Reading(tuple(kept[held_out:]), tuple(kept[:held_out]))


def _rest(tokenizer: Any, text: str, length: int, tokens: int) -> list[Tensor]:
    """What follows the begin of a text, ``length`` tokens at a time, at least so many tokens where there are."""
    before, after = special_tokens(tokenizer)
    inside = length - len(before) - len(after)
    read = text[: _CHARACTERS * (tokens + 2 * length)]
    ids = tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"][inside:][
        : math.ceil(tokens / inside) * inside
    ]
    stretches = (ids[start : start + inside] for start in range(0, len(ids), inside))
    return [torch.tensor([[*before, *each, *after]], dtype=torch.int64) for each in stretches if len(each) >= _SHORTEST]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    word = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    first = next(i for i in range(len(framed) + 1) if framed[i : i + len(word)] == word)
    return framed[:first], framed[first + len(word) :]


def strings_of(texts: Any) -> list[str]:
    """The strings among the first `MOST_TEXTS` texts. Raises `UserError` where they are something else."""
    if isinstance(texts, str):
        return [texts]
    if texts is None or isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise UserError(
            f"texts is a {type(texts).__name__}: give strings, a list of them, or a datasets.Dataset (one split)"
        )
    return [_string(text) for text in itertools.islice(texts, MOST_TEXTS)]


def _string(text: Any) -> str:
    if isinstance(text, Mapping):
        fields = [name for name, value in text.items() if isinstance(value, str)]
        name = "text" if "text" in fields else fields[0] if len(fields) == 1 else None
        if name is None:
            raise UserError(
                f"texts have the fields {', '.join(map(str, text))}: give the column of text, dataset['NAME']"
            )
        text = text[name]
    if not isinstance(text, str):
        raise UserError(f"texts holds a {type(text).__name__}: give strings")
    return text


def token_ids(tokenizer: Any, text: str, length: int) -> Tensor:
    """``(1, n)`` int64, n ≤ length, with the tokenizer's special tokens."""
    ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)
