"""Settings of a checkpoint's `config.json` that would be dropped, or fail far from where they were written.

transformers checks the types of what a configuration class declares. What it does not: names that it looks up when the model
is built, sizes that no machine has, and settings that it ignores because it no longer knows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sparsefinder.errors import UserError
from sparsefinder.models.transformers_internals import activations

ATTENTIONS = ("eager", "sdpa", "sparsefinder")
"""Attentions that a checkpoint may ask for; all give the numbers of the model on every machine."""

_LARGEST = {  # sizes in a configuration that can be meant
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers"), 1000),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 1000),
    **dict.fromkeys(("hidden_size", "embedding_size"), 100_000),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 1_000_000),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 10_000_000),
    **dict.fromkeys(("type_vocab_size", "num_hidden_groups", "inner_group_num"), 1000),
}
_ACTIVATIONS = ("hidden_act", "activation", "activation_function", "hidden_activation", "classifier_activation")
_ACTIVATION_KINDS = ("gelu", "gelu_new", "relu", "silu", "tanh")  # the usual ones of some twenty
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SWITCHES = ("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_word_embeddings", "scale_embedding")
_QUANTIZED = ("quantization_config", "compression_config")


def wrong_content(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a `config.json`, in words that name the setting; None where nothing is."""
    return next(_wrong_contents(content), None)


def check_sizes(config: Any, label: str) -> None:
    """A damaged number must not build a million layers before the weights are found not to fit; raises `UserError`."""
    for key, most in _LARGEST.items():
        value = getattr(config, key, 1)
        if not isinstance(value, int) or not 0 < value <= most:
            raise UserError(
                f"{label}: {key} in its config.json is {value!r:.40}; a whole number up to {most} is needed"
            )
    heads, width = getattr(config, "num_attention_heads", 1), getattr(config, "hidden_size", 1)
    if width % heads:
        raise UserError(
            f"{label}: hidden_size {width} in its config.json is no multiple of num_attention_heads {heads}"
        )
    padding = getattr(config, "pad_token_id", 0)
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < config.vocab_size:
        raise UserError(
            f"{label}: pad_token_id in its config.json is {'null' if padding is None else repr(padding)}; the id of the "
            f"padding token is needed, below vocab_size {config.vocab_size}"
        )


def _wrong_contents(content: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(content.get("model_type"), str):
        yield f"model_type is {_shown(content.get('model_type'))}; the name of a model family is needed, such as roberta"
    named = content.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        yield f"architectures is {_shown(named)}; a list of class names is needed, or null"
    for key in _QUANTIZED:
        if content.get(key) is not None:
            kind = content[key].get("quant_method") if isinstance(content[key], dict) else None
            yield (
                f"{key} says that its weights are quantized ({kind or 'by an unnamed method'}), which cannot be calculated "
                "with here; give the checkpoint that it was made from, or dequantize it and save it again"
            )
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        named_first = str(content.get(key)).split(" ", 1)[0]  # ours is followed by where to get it
        if content.get(key) is not None and named_first not in ATTENTIONS:
            yield f"{key} is {_shown(content[key])}; known are {', '.join(ATTENTIONS)}: choose one, or remove the line"
    positions = content.get("position_embedding_type")
    if positions not in (None, "absolute"):
        yield (
            f"position_embedding_type is {_shown(positions)}; only absolute positions are supported (transformers 5 drops "
            "others without a word): give a model that was trained with absolute ones"
        )
    for key in _ACTIVATIONS:
        if key in content and not (isinstance(content[key], str) and content[key] in activations()):
            yield (
                f"{key} is {_shown(content[key])}, which is no activation of transformers; it has "
                f"{', '.join(_ACTIVATION_KINDS)} and {len(activations()) - len(_ACTIVATION_KINDS)} more"
            )
    for key in ("dtype", "torch_dtype"):
        value = content.get(key)
        if value is not None and str(value).removeprefix("torch.") not in _DTYPES:
            yield f"{key} is {_shown(value)}; needed is one of {', '.join(_DTYPES)}"
    for key in _SWITCHES:
        if not isinstance(content.get(key, False), bool):
            yield f"{key} is {_shown(content[key])}; true or false is needed"
    if content.get("return_dict", True) is not True:
        yield f"return_dict is {_shown(content['return_dict'])}; outputs are read by name here: remove the line"
    for key, value in content.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}; a finite number is needed"


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.60}"
