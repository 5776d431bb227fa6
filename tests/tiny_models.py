"""Random two-layer models of each family and a tokenizer of a few words, made without a download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from sparsefinder.corpora.vocabulary import with_special_tokens

WORDS = [
    "a",
    "model",
    "attends",
    "to",
    "the",
    "keys",
    "that",
    "its",
    "query",
    "needs",
    "and",
    "ignores",
    "most",
    "others",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = len(SPECIAL) + len(WORDS)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.5,  # far from uniform attention, so that entmax and softmax differ
}
_OWN = {
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8, "num_hidden_layers": 3},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "modernbert": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "local_attention": 4,
        "cls_token_id": 0,
        "sep_token_id": 2,
    },
}


def tiny_config(family: str, **overrides: object):
    """A configuration of ``family`` with two layers (ALBERT and ModernBERT three), two heads of size 8 and 40 positions."""
    return AutoConfig.for_model(family, **{**_COMMON, **_OWN.get(family, {}), **overrides})


def tiny_model(family: str = "roberta", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random masked language model of ``family``, in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForMaskedLM.from_config(tiny_config(family, **overrides)).eval()


def tiny_tokenizer(max_length: int = 38) -> PreTrainedTokenizerFast:
    """Whole words of `WORDS`, with RoBERTa's special tokens."""
    words = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return with_special_tokens(tokenizer, max_length)


def save_tiny(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """A folder as ``save_pretrained`` writes it, tokenizer included."""
    (model or tiny_model()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_batch(lengths: tuple[int, ...] = (9, 5)) -> dict[str, torch.Tensor]:
    """Random words, padded on the right: ``input_ids`` and ``attention_mask``, ``(B, N)``."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(len(SPECIAL), VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}
