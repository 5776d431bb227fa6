"""Which tokens a masked language model must guess: a function of the seed and of the example, never of the moment.

So every variant of a model is asked about the same positions (whatever the batch size and the order), and a training run
that was killed and resumed masks what it would have masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefinder.corpora.blocks import TokenBlocks, pad
from sparsefinder.errors import UserError
from sparsefinder.numerics.counter_rng import uniform

IGNORED = -100  # the label of a token that is not asked for, as everywhere in transformers


# input_ids (B, N) int64 with tokens masked; attention_mask (B, N) bool; labels (B, N) int64. With a decoder beside the encoder
# labels are (B, M), as decoder_input_ids int64 and decoder_attention_mask bool are
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Masking:
    """BERT's recipe: of the chosen tokens 80 % become the mask, 10 % random, 10 % stay.

    One departure: exactly ``fraction`` of a block's ordinary tokens are chosen (rounded, at least one), where BERT's code
    chooses each with that probability; equal in the mean, with less noise, and no block goes unasked.

    Args:
        mask_token_id: Id of the mask.
        vocabulary: Number of ids, from which random tokens are drawn.
        special: Ids that are never chosen.
        fraction: Share of the ordinary tokens that are chosen, between 0 and 1.
        masked: Share of the chosen tokens that are replaced by the mask.
        random: Share of them that are replaced by a random token; the others stay.

    Source:
        Devlin et al. 2019, "BERT".
    """

    mask_token_id: int
    vocabulary: int
    special: tuple[int, ...]
    fraction: float = 0.15
    masked: float = 0.8  # share of the chosen tokens that are replaced by the mask
    random: float = 0.1  # share that are replaced by a random token; the others stay

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise UserError(f"the fraction of masked tokens must lie between 0 and 1, got {self.fraction}")
        if min(self.masked, self.random) < 0.0 or self.masked + self.random > 1.0:
            raise UserError(
                f"shares of masked and random tokens must sum to at most 1: {self.masked} and {self.random}"
            )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, fraction: float = 0.15) -> Masking:
        """BERT's recipe for a tokenizer."""
        for name in ("mask", "pad"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise UserError(
                    f"the tokenizer has no {name} token, which a masked language model needs: choose another model"
                )
        return cls(tokenizer.mask_token_id, len(tokenizer), tuple(sorted(tokenizer.all_special_ids)), fraction)

    def __call__(self, ids: Tensor, seed: int, example: int) -> tuple[Tensor, Tensor]:
        """Mask one block; the same for the same seed and example.

        Args:
            ids: ``(n,)`` int64.
            seed: Of all draws.
            example: Number of the block, or of the example in training.

        Returns:
            Inputs and labels, ``(n,)`` int64 each; labels are `IGNORED` where nothing is asked.
        """
        ordinary = ordinary_tokens(ids, self.special)
        chance, kind, token = (
            uniform(seed, stream, torch.tensor(example), torch.arange(len(ids))) for stream in range(3)
        )
        wanted = min(max(1, round(self.fraction * int(ordinary.sum()))), int(ordinary.sum()))
        chosen = torch.zeros_like(ordinary)
        chosen[chance.masked_fill(~ordinary, 2.0).argsort()[:wanted]] = True
        inputs = torch.where(chosen & (kind < self.masked), self.mask_token_id, ids)
        swapped = chosen & (kind >= self.masked) & (kind < self.masked + self.random)
        inputs = torch.where(swapped, (token * self.vocabulary).long(), inputs)
        return inputs, torch.where(chosen, ids, IGNORED)


def ordinary_tokens(ids: Tensor, special: Sequence[int]) -> Tensor:
    """``(n,)`` bool: the tokens that carry text, which may be asked for."""
    return ~torch.isin(ids, torch.tensor(special))


def masked_batches(
    blocks: Sequence[Tensor] | TokenBlocks,
    tokenizer: PreTrainedTokenizerBase,
    fraction: float = 0.15,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Batch]:
    """All blocks in order, masked and padded on the right. What is masked depends on the seed and a block's index alone.

    Args:
        blocks: Ids, ``(n_i,)`` int64 each.
        tokenizer: Has a mask token and a padding token.
        fraction: Share of the ordinary tokens that are asked for, between 0 and 1.
        seed: Of the masks.
        batch_size: Blocks of a batch; the last one may have fewer.

    Raises:
        UserError: No token can be asked for.
    """
    masking = Masking.of(tokenizer, fraction)
    examples = [masking(blocks[index], seed, index) for index in range(len(blocks))]
    if not any(bool((labels != IGNORED).any()) for _, labels in examples):
        raise UserError(f"there is nothing to mask: {len(examples)} blocks of text without a token that is not special")
    return [
        collate(examples[start : start + batch_size], tokenizer.pad_token_id)
        for start in range(0, len(examples), batch_size)
    ]


def collate(examples: Sequence[tuple[Tensor, Tensor]], pad_token_id: int, start_token_id: int | None = None) -> Batch:
    """Inputs and labels of several blocks, padded on the right to the longest.

    Args:
        examples: Inputs and labels, int64.
        pad_token_id: What padded positions hold.
        start_token_id: Where labels are those of a decoder, which is given the word before each: what stands before the first.
    """
    input_ids, valid = pad([inputs for inputs, _ in examples], pad_token_id)
    labels, _ = pad([labels for _, labels in examples], IGNORED)
    batch = {"input_ids": input_ids, "attention_mask": valid, "labels": labels}
    if start_token_id is not None:
        before = [torch.cat([labels.new_full((1,), start_token_id), labels[:-1]]) for _, labels in examples]
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = pad(before, pad_token_id)
    return batch
