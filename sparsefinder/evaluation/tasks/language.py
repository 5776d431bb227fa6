"""Words: behind masks, the same masked positions for every variant, or the next one after every token."""

from __future__ import annotations

from typing import Any

from sparsefinder.corpora import token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.evaluation.tasks.judges import Batch, Judge, MaskedWords
from sparsefinder.evaluation.tasks.labelled import Asked, Request
from sparsefinder.evaluation.tasks.next_words import NextWords
from sparsefinder.models.objectives import asked_batches, is_causal
from sparsefinder.storage import distributed
from sparsefinder.storage.store import Store


def ask_words(request: Request, store: Store, model: Any, tokenizer: Any, length: int, probability: float) -> Asked:
    """Blocks of the corpus, with masks where the model is no decoder.

    Args:
        request: which blocks, and how many.
        store: of the run, where tokens are kept.
        model: a masked or a causal language model.
        tokenizer: its tokenizer.
        length: most tokens of a block.
        probability: of a token to be masked.

    Returns:
        The model, held-out batches, and batches of the training split where variants are adapted.
    """

    def batches(split: str, wanted: int, batch_size: int) -> list[Batch]:
        cache = store.scratch("corpus")
        blocks = distributed.first_then_all(lambda: token_blocks(request.corpus, tokenizer, split, length, cache=cache))
        chosen = draw(len(blocks), min(wanted, len(blocks)), request.seed, f"the {split} split of the corpus")
        drawn = [blocks[index] for index in chosen]
        return asked_batches(model, drawn, tokenizer, probability, request.seed, batch_size)

    adapting = request.adapt_examples
    held_out = batches(request.split, request.samples, request.batch_size)
    training = batches("train", adapting, request.adapt_batch_size) if adapting else []
    count = sum(int((batch["labels"] != IGNORED).sum()) for batch in held_out)
    judge: Judge = NextWords() if is_causal(model) else MaskedWords()
    return Asked(model, judge, held_out, training, {judge.asked: count})
