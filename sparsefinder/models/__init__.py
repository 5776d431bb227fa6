"""A model whose attention can be looked at, replaced, and kept replaced.

Names are looked up when they are asked for: `sparsefinder.models.entmax_configuration` is imported with the package, and must
stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsefinder.models.dense_normalizer import SOFTMAX, get_normalizer, normalizers, set_normalizer, softmax
    from sparsefinder.models.entmax_configuration import REGISTERED
    from sparsefinder.models.families import DECODERS, ENCODER_DECODERS, FAMILIES, kind_of
    from sparsefinder.models.loading import (
        has_head,
        load_causal_lm,
        load_encoder,
        load_language_model,
        load_masked_lm,
        load_with_head,
    )
    from sparsefinder.models.replacement.attention_calls import ModelShape, describe
    from sparsefinder.models.replacement.context_manager import plugged

__all__ = [
    "DECODERS",
    "ENCODER_DECODERS",
    "FAMILIES",
    "REGISTERED",
    "SOFTMAX",
    "ModelShape",
    "describe",
    "get_normalizer",
    "has_head",
    "kind_of",
    "load_causal_lm",
    "load_encoder",
    "load_language_model",
    "load_masked_lm",
    "load_with_head",
    "normalizers",
    "plugged",
    "set_normalizer",
    "softmax",
]

_LOADING = ("load_causal_lm", "load_encoder", "load_language_model", "load_masked_lm", "load_with_head")
_HOMES = {
    "REGISTERED": "entmax_configuration",
    "plugged": "replacement.context_manager",
    **dict.fromkeys(("SOFTMAX", "get_normalizer", "normalizers", "set_normalizer", "softmax"), "dense_normalizer"),
    **dict.fromkeys(("ModelShape", "describe"), "replacement.attention_calls"),
    **dict.fromkeys(("has_head", *_LOADING), "loading"),
    **dict.fromkeys(("DECODERS", "ENCODER_DECODERS", "FAMILIES", "kind_of"), "families"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
