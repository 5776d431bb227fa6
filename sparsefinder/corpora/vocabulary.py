"""A vocabulary for models that start from nothing: byte-level BPE, as RoBERTa's, learned from the training part."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsefinder.errors import UserError

log = logging.getLogger(__name__)

# Bytes of a word that are learned from as one. The trainer's time grows with the square of a word's length, and a text without
# spaces (DNA, base64, JSON on one line) is one word: a megabyte of it would take ten minutes. No word of a language is so long.
_LONGEST = 1000
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the ids 0 to 4; RoBERTa's configuration expects 0, 1 and 2 so


def train_tokenizer(documents: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer, byte-level, so that every text can be encoded; deterministic for the same documents in the same order.

    Words longer than `_LONGEST` bytes are learned from in parts of that length, so the time is linear in the text, whatever
    the text is.

    Args:
        documents: What it learns from.
        size: Tokens of the vocabulary, special ones included.
        max_length: Most tokens of an input, which the tokenizer remembers.

    Raises:
        UserError: ``size`` has no room for all bytes and the special tokens.
    """
    if size < len(SPECIAL) + 256:
        raise UserError(f"vocabulary_size must be at least {len(SPECIAL) + 256} (bytes and special tokens), got {size}")
    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )  # a byte is one character from here on, never a blank
    parts = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([bytes_of_words, parts])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_reporting_long_words(documents, bytes_of_words), trainer)
    tokenizer.pre_tokenizer = bytes_of_words
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return with_special_tokens(tokenizer, max_length)


def with_special_tokens(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers, with RoBERTa's names of the special tokens and that many tokens at most."""
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


def _reporting_long_words(documents: Iterable[str], words: pre_tokenizers.PreTokenizer) -> Iterator[str]:
    """The documents, and in the end a line in the log where some of their ``words`` were learned from in parts."""
    count = longest = 0
    for document in documents:
        runs = [run for run in document.split() if 4 * len(run) > _LONGEST]  # of at most four bytes a character
        sizes = [len(word) for run in runs for word, _ in words.pre_tokenize_str(run) if len(word) > _LONGEST]
        count, longest = count + len(sizes), max([longest, *sizes])
        yield document
    if count:
        log.warning(
            "corpus: %s of the words that the vocabulary is learned from have more than %s bytes (the longest has %s); they "
            "were cut into parts of that length: is this text without spaces meant to be read?",
            *(f"{count:,}", f"{_LONGEST:,}", f"{longest:,}"),
        )
