"""What an encoder-decoder model is asked: a text whose sentences were shuffled and spans hidden, as it was.

A function of the seed and of the example, never of the moment, as `sparsefinder.corpora.masking`: every variant of a model reads
the same damage and is asked for the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefinder.corpora.blocks import TokenBlocks
from sparsefinder.corpora.masking import Batch, collate, ordinary_tokens
from sparsefinder.errors import UserError
from sparsefinder.numerics.counter_rng import uniform

_MEAN_SPAN = 3.0  # tokens, λ of BART's Poisson distribution
_BLANK = "ĠĊ▁ \n"  # how tokenizers write spaces and line ends
_LENGTHS, _SLOTS, _ORDER = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Denoising:
    """BART's recipe: sentences in another order, then spans of tokens that become one mask each; asked for is the whole text.

    The lengths of spans are drawn from a Poisson distribution with mean 3, until ``fraction`` of the tokens are hidden; a span
    of no token is a mask where nothing is missing. Spans never touch. A sentence ends with a token that ends with a full stop,
    a question mark or an exclamation mark. Special tokens at both ends stay where they are.

    Departures: exactly ``fraction`` of the tokens are hidden, in at most as many spans, so that no text gets longer than it was;
    the token after a full stop inside a name begins a sentence too.

    Args:
        start_token_id: What the decoder is given before the first word.
        mask_token_id: Id of the mask; None, of tokenizers without one: spans are deleted.
        ends: Ids with which a sentence ends.
        special: Ids that stay in place at the ends of a block.
        fraction: Share of the tokens that are hidden, between 0 and 1.

    Source:
        Lewis et al. 2020, "BART" (https://arxiv.org/abs/1910.13461), section 2.2: text infilling with sentence permutation.
    """

    start_token_id: int
    mask_token_id: int | None
    ends: tuple[int, ...]
    special: tuple[int, ...]
    fraction: float = 0.15

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise UserError(f"the fraction of hidden tokens must lie between 0 and 1, got {self.fraction}")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, start_token_id: int, fraction: float = 0.15) -> Denoising:
        """The recipe for a tokenizer, and the token with which the decoder of its model starts."""
        words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        ends = tuple(i for i, word in enumerate(words) if word and word.rstrip(_BLANK).endswith((".", "?", "!")))
        special = tuple(sorted(tokenizer.all_special_ids))
        return cls(start_token_id, tokenizer.mask_token_id, ends, special, fraction)

    def __call__(self, ids: Tensor, seed: int, example: int) -> tuple[Tensor, Tensor]:
        """Damage one block; the arguments are those of `Masking`.

        Returns:
            What the encoder reads, ``(m,)`` int64, and the labels of the decoder, which are ``ids``.
        """
        inside = ordinary_tokens(ids, self.special).nonzero().flatten()
        if not len(inside):
            return ids, ids
        first, last = int(inside[0]), int(inside[-1]) + 1
        body = self._hidden(self._permuted(ids[first:last], seed, example), seed, example)
        return torch.cat([ids[:first], body, ids[last:]]), ids

    def _permuted(self, ids: Tensor, seed: int, example: int) -> Tensor:
        ends = torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype))
        sentence = ends.long().cumsum(0) - ends.long()  # its number, for each token
        chance = uniform(seed, _ORDER, torch.tensor(example), torch.arange(int(sentence[-1]) + 1))
        return ids[chance[sentence].argsort(stable=True)]

    def _hidden(self, ids: Tensor, seed: int, example: int) -> Tensor:
        tokens = len(ids)
        wanted = min(max(1, round(self.fraction * tokens)), tokens)
        drawn = _poisson(uniform(seed, _LENGTHS, torch.tensor(example), torch.arange(tokens)))
        before = drawn.cumsum(0) - drawn
        lengths = drawn[before < wanted]
        # all tokens that stay in a row have a slot before each of them and one at the end: a span in some slots, one at most
        slots = tokens - wanted + 1
        lengths = lengths[: min(slots, wanted)].clone()
        lengths[-1] += wanted - lengths.sum()  # cut, or where too few were drawn longer
        where = uniform(seed, _SLOTS, torch.tensor(example), torch.arange(slots)).argsort()[: len(lengths)]
        hidden = torch.zeros(slots, dtype=torch.int64)
        hidden[where] = lengths
        # in front of a token that stays lie the spans of its slot and of those before it
        stays = torch.arange(tokens - wanted) + hidden.cumsum(0)[:-1]
        kept = ids[stays]
        if self.mask_token_id is None:
            return kept
        masks = torch.zeros(slots, dtype=torch.int64)
        masks[where] = 1
        out = torch.full((tokens - wanted + len(lengths),), self.mask_token_id, dtype=ids.dtype)
        out[torch.arange(tokens - wanted) + masks.cumsum(0)[:-1]] = kept
        return out


def _poisson(chances: Tensor) -> Tensor:
    """Numbers in [0, 1) → numbers of a Poisson distribution with the mean `_MEAN_SPAN`, int64."""
    mass = torch.tensor([math.exp(-_MEAN_SPAN) * _MEAN_SPAN**k / math.factorial(k) for k in range(20)])
    return torch.searchsorted(mass.cumsum(0), chances.to(mass.dtype), right=True)


def denoising_batches(
    blocks: Sequence[Tensor] | TokenBlocks, denoising: Denoising, pad_token_id: int, seed: int = 0, batch_size: int = 16
) -> list[Batch]:
    """All blocks in order, damaged and padded on the right. What is damaged depends on the seed and a block's index alone.

    Args:
        blocks: Ids, ``(n_i,)`` int64 each.
        denoising: How they are damaged.
        pad_token_id: What padded positions hold.
        seed: Of the damage.
        batch_size: Blocks of a batch; the last one may have fewer.
    """
    examples = [denoising(blocks[index], seed, index) for index in range(len(blocks))]
    return [
        collate(examples[start : start + batch_size], pad_token_id, denoising.start_token_id)
        for start in range(0, len(examples), batch_size)
    ]
