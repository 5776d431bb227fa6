"""Tiny models of every family, made from a configuration, with a tokenizer to match."""

from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsefinder.lsg.families import FAMILIES, family_of, plain_class

SPECIAL = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
VOCABULARY = 96
POSITIONS = 64
NAMES = tuple(FAMILIES)

_BERT_LIKE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "type_vocab_size": 2,
    "max_position_embeddings": POSITIONS, "initializer_range": 0.25,
}  # fmt: skip
_BART_LIKE = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": POSITIONS, "init_std": 0.25,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, "scale_embedding": True,
}  # fmt: skip
_SPECIFIC = {
    "albert": {**_BERT_LIKE, "embedding_size": 16, "num_hidden_groups": 2},
    "electra": {**_BERT_LIKE, "embedding_size": 16},
    "distilbert": {
        "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": POSITIONS,
        "initializer_range": 0.25,
    },
    **{name: {**_BERT_LIKE, "max_position_embeddings": POSITIONS + 2} for name in ("roberta", "camembert", "xlm-roberta")},
    **dict.fromkeys(("bart", "mbart", "pegasus"), _BART_LIKE),
}  # fmt: skip


def plain_config(name, **changes):
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    settings = {**ids, **_SPECIFIC.get(name, _BERT_LIKE), **changes}
    return plain_class(f"{FAMILIES[name].stem}Config")(**settings)


def plain_model(name, architecture=None, **changes):
    torch.manual_seed(0)
    model = plain_class(architecture or FAMILIES[name].base)(plain_config(name, **changes))
    for parameter in model.parameters():  # biases and norms that are not trivial
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@cache
def tokenizer():
    words = [*SPECIAL.values(), *(f"w{index}" for index in range(VOCABULARY - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    named = {f"{role}_token": token for role, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=POSITIONS, cls_token="<s>", sep_token="</s>", **named
    )


def save_plain(name, folder, architecture=None, **changes):
    model = plain_model(name, architecture or FAMILIES[name].default, **changes)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(length, rows=1, seed=0):
    """Random ids without special tokens, `(rows, length)`."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def heads(name):
    """`(family, plain class)` for every head of a family."""
    return [(name, architecture) for architecture in family_of(name).architectures()]
