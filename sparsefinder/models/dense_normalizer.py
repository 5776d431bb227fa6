"""The normalizer of a model's own dense attention: set it, read it, and do without it for a while.

``save_pretrained`` forgets which attention a model was used with. Here it does not: `set_normalizer` writes ``attention_alpha``
into the configuration, and `sparsefinder.models.entmax_configuration` makes every model with such a configuration attend with
entmax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from sparsefinder.models.entmax_configuration import ALPHA, PUBLISHED, REGISTERED, TEMPERATURE
from sparsefinder.models.replacement.attention_calls import attention_calls, calls_of, check_model, is_sliding
from sparsefinder.models.replacement.registered_function import normalizer_at, normalizer_of
from sparsefinder.models.transformers_internals import attention_name
from sparsefinder.numerics.normalizers import Normalizer, PerHead

SOFTMAX = "sdpa"  # what transformers calls its own dense softmax attention

_ALPHAS = (ALPHA, PUBLISHED)


def set_normalizer(model: PreTrainedModel, normalizer: Normalizer) -> None:
    """Dense attention with another normalizer from now on, in every layer; kept by ``save_pretrained``.

    A temperature of the heads stays, under softmax too; an α for each head goes.

    Args:
        model: a model of one of `sparsefinder.models.families.TRAITS`, changed in place.
        normalizer: α-entmax; α = 1 gives transformers' own softmax attention back, and nothing is written.

    Raises:
        UserError: for a model that would never call it (Longformer, BigBird, Nyströmformer, Reformer).
    """
    check_model(model.config, model.name_or_path or type(model).__name__)
    if normalizer.alpha == 1.0:
        for config in configurations(model):
            for name in _ALPHAS:
                config.__dict__.pop(name, None)
        model.set_attn_implementation(REGISTERED if hasattr(model.config, TEMPERATURE) else SOFTMAX)
        return
    attention_calls(model)
    model.set_attn_implementation(REGISTERED)
    for config in configurations(model):
        if PUBLISHED not in config.__dict__ or normalizer_of(config) != normalizer:  # there sliding layers have softmax
            config.attention_alpha = normalizer.alpha


def configurations(model: PreTrainedModel) -> list[Any]:
    """That of the model, and the copies of it that some families give their encoder and decoder."""
    found = {id(model.config): model.config}
    for module in model.modules():
        own = getattr(module, "config", None)
        if type(own) is type(model.config):
            found.setdefault(id(own), own)
    return list(found.values())


def get_normalizer(model: PreTrainedModel) -> Normalizer:
    """The normalizer of the model's own dense attention, whatever is plugged in; α = 1 where none is remembered.

    Raises:
        UserError: the layers, or their heads, have more than one α: `normalizers` has them all.
    """
    return normalizer_of(model.config)


def normalizers(model: PreTrainedModel, which: str | None = None) -> list[Normalizer | PerHead]:
    """That of each (global) layer of one of the model's attentions, in the order in which `plugged` numbers them."""
    calls = [call for call in calls_of(model, which) if not is_sliding(call.module, model.config)]
    return [normalizer_at(model.config, call.module) for call in calls]


@contextlib.contextmanager
def softmax(model: PreTrainedModel) -> Iterator[None]:
    """Within the block every layer, sliding ones too, attends with transformers' own softmax attention, which is torch's SDPA.

    Of a model whose heads have a temperature, with that SDPA on queries that are multiplied with it.
    """
    implementation, own = attention_name(model.config), configurations(model)
    remembered = [{n: v for n, v in each.__dict__.items() if n in _ALPHAS} for each in own]
    set_normalizer(model, Normalizer(1.0))
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        for config, alpha in zip(own, remembered, strict=True):
            config.__dict__.update(alpha)
