"""Words: behind masks, the same for every variant, the next one after every token, or those of a text that was damaged."""

from __future__ import annotations

from typing import Any

from sparsefinder.corpora import token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.evaluation.tasks.judges import Batch, Judge, MaskedWords
from sparsefinder.evaluation.tasks.labelled import Asked, Request
from sparsefinder.evaluation.tasks.next_words import NextWords
from sparsefinder.models.documents_apart import read_apart
from sparsefinder.models.families import Kind, kind_of
from sparsefinder.models.objectives import asked_batches
from sparsefinder.storage import distributed
from sparsefinder.storage.store import Store

JUDGES: dict[Kind, Judge] = {
    "encoder": MaskedWords(),
    "decoder": NextWords(),
    "encoder_decoder": MaskedWords(unit="tokens", asked="target_tokens"),
}


def ask_words(request: Request, store: Store, model: Any, tokenizer: Any, length: int, probability: float) -> Asked:
    """Blocks of the corpus, with masks for an encoder, and damaged for an encoder-decoder.

    Args:
        request: which blocks, and how many.
        store: of the run, where tokens are kept.
        model: a language model of any kind.
        tokenizer: its tokenizer.
        length: most tokens of a block.
        probability: of a token to be masked or hidden.

    Returns:
        The model, held-out batches, and batches of the training split where variants are adapted.
    """

    read_apart(model, tokenizer, request.corpus)

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
    judge = JUDGES[kind_of(model.config)]
    return Asked(model, judge, held_out, training, {judge.asked: count})
