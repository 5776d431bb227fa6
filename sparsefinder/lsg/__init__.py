"""LSG attention (local + sparse + global): the attention, models of every family in `families`, and the conversion into them.

    from sparsefinder.lsg import convert, from_pretrained

    model, tokenizer = convert("roberta-base", max_sequence_length=4096, sparsity_type="norm")
    model = from_pretrained("lsg-roberta-base", num_global_tokens=16)

Importing it makes the Auto classes of transformers load LSG checkpoints of ours without remote code.
"""

from __future__ import annotations

import transformers

from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.lsg.configuration import config_class
from sparsefinder.lsg.conversion import convert
from sparsefinder.lsg.families import FAMILIES
from sparsefinder.lsg.freeze import train_only_globals_and_head
from sparsefinder.lsg.loading import from_pretrained
from sparsefinder.lsg.modeling import model_class

__all__ = [
    "FAMILIES",
    "LSGAttention",
    "config_class",
    "convert",
    "from_pretrained",
    "model_class",
    "register",
    "train_only_globals_and_head",
]


def register() -> None:
    """Make transformers' Auto classes know every LSG configuration and model; may be called again."""
    for family in FAMILIES.values():
        made = config_class(family)
        transformers.AutoConfig.register(family.model_type, made, exist_ok=True)
        for auto, name in family.auto_classes().items():
            getattr(transformers, auto).register(made, model_class(f"LSG{name}"), exist_ok=True)


register()
