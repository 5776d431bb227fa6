"""Words behind masks: the same masked positions for every variant."""

from __future__ import annotations

from typing import Any

from sparsefinder.corpora import masked_batches, token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.evaluation.tasks.judges import Batch, MaskedWords
from sparsefinder.evaluation.tasks.labelled import Asked, Request
from sparsefinder.storage import distributed
from sparsefinder.storage.store import Store


def ask_masked_words(
    request: Request, store: Store, model: Any, tokenizer: Any, length: int, probability: float
) -> Asked:
    """Blocks of the corpus with masks.

    Args:
        request: which blocks, and how many.
        store: of the run, where tokens are kept.
        model: a masked language model.
        tokenizer: its tokenizer.
        length: most tokens of a block.
        probability: of a token to be asked for.

    Returns:
        The model, held-out batches, and batches of the training split where variants are adapted.
    """

    def batches(split: str, wanted: int, batch_size: int) -> list[Batch]:
        cache = store.scratch("corpus")
        blocks = distributed.first_then_all(lambda: token_blocks(request.corpus, tokenizer, split, length, cache=cache))
        chosen = draw(len(blocks), min(wanted, len(blocks)), request.seed, f"the {split} split of the corpus")
        return masked_batches([blocks[index] for index in chosen], tokenizer, probability, request.seed, batch_size)

    adapting = request.adapt_examples
    held_out = batches(request.split, request.samples, request.batch_size)
    training = batches("train", adapting, request.adapt_batch_size) if adapting else []
    masked = sum(int((batch["labels"] != IGNORED).sum()) for batch in held_out)
    return Asked(model, MaskedWords(), held_out, training, {"masked_tokens": masked})
