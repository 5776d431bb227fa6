"""Tiny sources without a download: random RoBERTa-like models and a word-level tokenizer."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

FAMILIES = ("Roberta", "XLMRoberta", "Camembert")
LENGTH = 24
"""Longest input of the sources, in tokens."""


def make_tokenizer(words: int = 50, *, special: str = "<s> <pad> </s> <unk> <mask>") -> PreTrainedTokenizerFast:
    """`<s> … </s>` around words w5, w6, …; as many entries as `words`."""
    names = [*special.split(), *(f"w{i}" for i in range(len(special.split()), words))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", model_max_length=LENGTH,
    )  # fmt: skip


def make_source(head: str = "Model", family: str = "Roberta", **settings: Any) -> Any:
    """A random source in evaluation mode, with weights large enough that a wrong row or mask shows."""
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
            "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "initializer_range": 0.3, "layer_norm_eps": 1e-5,
            **settings,
        }
    )  # fmt: skip
    model = getattr(transformers, f"{family}{head}")(config).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "layer_norm" in name or name.endswith("bias"):
            # Fresh norms and biases are ones and zeros, and would hide that they were not copied.
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(length: int, vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of `length`, `length // 2 + 1` and 1 real tokens: ids and mask, both `(3, length)`."""
    ids = torch.randint(5, vocabulary, (3, length))
    valid = torch.ones_like(ids)
    for row, real in enumerate((length, length // 2 + 1, 1)):
        ids[row, real:], valid[row, real:] = 1, 0
    return ids, valid


def hidden(model: Any, ids: torch.Tensor, valid: torch.Tensor, **extra: Any) -> torch.Tensor:
    """Last hidden states of the model without its head."""
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        states: torch.Tensor = base(input_ids=ids, attention_mask=valid, **extra).last_hidden_state
    return states


def gap(expected: torch.Tensor, found: torch.Tensor, valid: torch.Tensor) -> float:
    """Largest difference on real tokens."""
    return float((expected - found)[valid.bool()].abs().max())
