"""Conversions of short-input checkpoints into models for long inputs, each with a certificate.

Every name below is imported when it is first used, so that `positions` and `certificate`, which LSG shares, need no
model code.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "convert_roberta_to_longformer": "longformer",
    "resize_longformer": "longformer",
    "convert_roberta_to_nystromformer": "nystromformer",
    "landmarks": "nystromformer",
    "convert_roberta_to_bigbird": "bigbird",
    "full_attention": "bigbird",
    "runs_sparse": "bigbird",
    "stay_sparse": "bigbird",
    "convert_longformer_to_led": "led",
    "guard_length": "length_guard",
    "certify": "equivalence",
    "save": "equivalence",
    "TARGETS": "command",
    "convert_checkpoint": "command",
}
"""Name -> module of this package that it lives in."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
