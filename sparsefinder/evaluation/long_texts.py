"""The same words asked for at every length: long texts ask for them once, and are read whole or in pieces.

What differs between two lengths is then how much of the text a token can see, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.corpora.masking import IGNORED, Masking
from sparsefinder.corpora.next_words import NextWords
from sparsefinder.errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LongText:
    """One text of ``L`` tokens that asks for words.

    Args:
        inputs: ``(L,)`` int64, of a masked language model with masks.
        labels: ``(L,)`` int64, `IGNORED` where nothing is asked, as at the ends of every shortest piece; of next words at its
            last token alone.
        first: Id of the token that a piece begins with.
        last: Id of the token that it ends with.
    """

    inputs: Tensor
    labels: Tensor
    first: int
    last: int

    def pieces(self, length: int) -> Batch:
        """The text in pieces of ``length`` tokens, the special ones at their ends included: ``(L / length, length)``."""
        inputs = self.inputs.view(-1, length).clone()
        inputs[:, 0], inputs[:, -1] = self.first, self.last
        valid = torch.ones_like(inputs, dtype=torch.bool)
        return {"input_ids": inputs, "attention_mask": valid, "labels": self.labels.view(-1, length)}

    def beginnings(self, length: int, read: int) -> tuple[Batch, Tensor]:
        """As `pieces`, each cut after ``read`` tokens, and the words that were asked for in what is cut off."""
        batch = self.pieces(length)
        kept = {name: tensor[:, :read].clone() for name, tensor in batch.items()}
        kept["input_ids"][:, -1] = self.last
        cut = batch["labels"][:, read:]
        return kept, cut[cut != IGNORED]


def long_texts(
    blocks: Sequence[Tensor], lengths: Sequence[int], asking: Masking | NextWords, seed: int
) -> list[LongText]:
    """Blocks with questions, for reading at several lengths.

    Args:
        blocks: Ids ``(L,)`` int64 each, with special tokens at both ends; ``L`` is the longest of ``lengths``.
        lengths: Tokens of a piece, special ones included, each dividing the longest.
        asking: Which words are asked for. Of masked ones never those that stand at the ends of a piece of the shortest length, of
            next ones never those behind its end.
        seed: Of the masks.

    Raises:
        UserError: A length does not divide a longer one.
    """
    check_lengths(lengths)
    longest, shortest = max(lengths), min(lengths)
    ends = torch.zeros(longest // shortest, shortest, dtype=torch.bool)
    ends[:, 0] = ends[:, -1] = True
    ends = ends.flatten()
    texts = []
    for index, ids in enumerate(blocks):
        first, last = int(ids[0]), int(ids[-1])
        if isinstance(asking, NextWords):
            _, labels = asking(ids, seed, index)
            labels.view(-1, shortest)[:, -1] = IGNORED  # a piece ends before the next word
            texts.append(LongText(ids, labels, first, last))
            continue
        masked, labels = asking(torch.where(ends, first, ids), seed, index)
        texts.append(LongText(torch.where(ends, ids, masked), labels, first, last))
    return texts


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise a `UserError` unless each of the lengths divides every longer one."""
    ordered = sorted(lengths)
    for shorter, longer in itertools.pairwise(ordered):
        if longer % shorter:
            raise UserError(
                f"compare.lengths={list(lengths)}: the same words are asked for at every length, so {shorter} must divide "
                f"{longer}; give lengths such as [512,1024,2048]"
            )
