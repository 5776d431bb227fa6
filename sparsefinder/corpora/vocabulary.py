"""A vocabulary for models that start from nothing: byte-level BPE, as RoBERTa's, learned from the training part."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsefinder.store import UserError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the ids 0 to 4; RoBERTa's configuration expects 0, 1 and 2 so


def train_tokenizer(documents: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``size`` tokens, special ones included, for at most ``max_length`` tokens of input.

    Byte-level, so every text can be encoded; deterministic for the same documents in the same order.
    """
    if size < len(SPECIAL) + 256:
        raise UserError(f"vocabulary_size must be at least {len(SPECIAL) + 256} (bytes and special tokens), got {size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
