"""Text → documents → blocks of tokens.

A corpus is a frozen dataclass with ``documents(split, cache) → Iterator[str]`` for the splits ``train``, ``validation`` and
``test``, and a ``fingerprint()`` that changes whenever its text does. There is one for each file of ``conf/corpus/``:
`Docstrings` (the prose inside installed packages: real English, no download), `TextFiles` (anybody's files), `AnyDataset`
(whatever ``datasets`` reads, streamed) and `WikiText103`. `token_blocks` cuts any of them into blocks; `train_tokenizer`
makes a vocabulary for models that have none.
"""

from sparsefinder.corpora.any_dataset import AnyDataset
from sparsefinder.corpora.blocks import Corpus, TokenBlocks, block_length, token_blocks
from sparsefinder.corpora.denoising import Denoising, denoising_batches
from sparsefinder.corpora.docstrings import Docstrings
from sparsefinder.corpora.files import TextFiles
from sparsefinder.corpora.masking import Batch, Masking, masked_batches
from sparsefinder.corpora.next_words import NextWords, next_word_batches
from sparsefinder.corpora.vocabulary import train_tokenizer
from sparsefinder.corpora.wikitext import WikiText103

__all__ = [
    "AnyDataset",
    "Batch",
    "Corpus",
    "Denoising",
    "Docstrings",
    "Masking",
    "NextWords",
    "TextFiles",
    "TokenBlocks",
    "WikiText103",
    "block_length",
    "denoising_batches",
    "masked_batches",
    "next_word_batches",
    "token_blocks",
    "train_tokenizer",
]
