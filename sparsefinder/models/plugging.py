"""Masked language models whose attention can be looked at, replaced for a while, and remembered.

Everything goes through transformers' attention registry; no model code is copied. One function is registered
(`sparsefinder.models.registered`), and what it does is decided by the model it is called from:

- dense attention with the normalizer that the model's configuration remembers (`set_normalizer`);
- any attention object ``(q, k, v, valid, layer) → output`` while one is plugged in (`plugged`).

``save_pretrained`` forgets which attention a model was used with. Here it does not: `set_normalizer` writes ``attention_alpha``
into the configuration, and `sparsefinder.models.entmax_configuration` makes every model with such a configuration attend with
entmax.

Layers are counted by *calls*: a model is run once on two tokens, and the modules that call the attention, in order, are its
layers. So ALBERT, which shares one module over its depth, has as many layers as it is deep, and a model that accepts an
attention and never calls it is found out. Layers that look through a sliding window of their own (two of three in
ModernBERT) are not where a sparse graph is predicted: they keep their window, with the model's normalizer, are never given
to a plugged attention, and are not counted; ``layer`` numbers the global ones, and `ModelShape.depths` says where they are.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers import logging as transformers_logging

from sparsefinder.errors import UserError
from sparsefinder.graphs import Attention
from sparsefinder.models.entmax_configuration import REGISTERED, follow_transformers
from sparsefinder.models.plug import Plug, Socket
from sparsefinder.models.position_tables import CONVENTIONS, reserved_rows_of
from sparsefinder.models.registered import PLUG, Plugged, normalizer_of
from sparsefinder.models.transformers_internals import attention_name
from sparsefinder.numerics.normalizers import Normalizer

log = logging.getLogger(__name__)

FAMILIES = ("roberta", "bert", "xlm-roberta", "camembert", "electra", "albert", "distilbert", "modernbert")
SOFTMAX = "sdpa"  # what transformers calls its own dense softmax attention


@dataclass(frozen=True)
class ModelShape:
    """What a recorder of attention needs to know before it runs a model."""

    family: str
    layers: int  # attention layers that can be replaced: L
    heads: int  # H
    head_size: int  # D
    max_length: int  # tokens, special ones included
    depths: tuple[int, ...]  # depth of each of these layers among all attention layers of the model


# ---- loading ----


def check_family(family: str, decodes: bool, label: str) -> None:
    """Refuse a model whose attention cannot be replaced.

    Args:
        family: Its ``model_type``.
        decodes: Whether it is configured as a decoder.
        label: What messages call it.

    Raises:
        UserError: For another family than those of `FAMILIES`, and for a decoder.
    """
    if family not in FAMILIES:
        raise UserError(
            f"{label} is a {family}, whose attention cannot be replaced; choose a masked language model "
            f"of one of these families: {', '.join(FAMILIES)}"
        )
    if decodes:
        raise UserError(f"{label} is configured as a decoder; a masked language model needs is_decoder=false")


# ---- the normalizer ----


def set_normalizer(model: PreTrainedModel, normalizer: Normalizer) -> None:
    """Dense attention with another normalizer from now on, in every layer; kept by ``save_pretrained``.

    Args:
        model: a masked language model of one of `FAMILIES`, changed in place.
        normalizer: α-entmax; α = 1 gives transformers' own softmax attention back, and nothing is written.

    Raises:
        UserError: for a model that would never call it (Longformer, BigBird, Nyströmformer, Reformer).
    """
    decodes = bool(getattr(model.config, "is_decoder", False))
    check_family(model.config.model_type, decodes, model.name_or_path or type(model).__name__)
    if normalizer.alpha == 1.0:
        model.config.__dict__.pop("attention_alpha", None)
        model.set_attn_implementation(SOFTMAX)
        return
    _attention_calls(model)
    model.set_attn_implementation(REGISTERED)
    model.config.attention_alpha = normalizer.alpha


def get_normalizer(model: PreTrainedModel) -> Normalizer:
    """The normalizer of the model's own dense attention, whatever is plugged in; α = 1 where none is remembered."""
    return normalizer_of(model.config)


# ---- other attentions, for a while ----


@contextlib.contextmanager
def softmax(model: PreTrainedModel) -> Iterator[None]:
    """Within the block every layer, sliding ones too, attends with transformers' own softmax attention, which is torch's SDPA."""
    implementation, config = attention_name(model.config), model.config
    remembered = {name: value for name, value in config.__dict__.items() if name == "attention_alpha"}
    set_normalizer(model, Normalizer(1.0))
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        config.__dict__.update(remembered)


@contextlib.contextmanager
def plugged(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Within the block every (global) self-attention layer calls ``attention(q, k, v, valid, layer) → output``.

    The old attention is put back at the end, after an exception too. Blocks may be nested: the innermost counts. Dropout on
    attention probabilities belongs to the dense path and is not applied.

    Args:
        model: a masked language model of one of `FAMILIES`.
        attention: gets ``q``, ``k``, ``v``, each ``(B, H, N, D)`` in the model's dtype, ``q`` not rescaled; ``valid (B, N)``
            bool, True on real tokens; and ``layer``, 0 to `ModelShape.layers` − 1. It returns ``(B, H, N, D)``. Sentences packed
            into one row by a mask ``(B, 1, N, N)`` are given as rows of their own.

    Raises:
        UserError: for a model whose attention cannot be replaced; within the block, for any other mask but padding, and for a
            text longer than the model.
    """
    plugs = plugs_of(model, socket := Socket(attention))

    def begin(base: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        socket.begin()
        check_length(base, inputs, named)

    start = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with _installed(model, plugs):
            yield
    finally:
        start.remove()


def plugs_of(model: PreTrainedModel, socket: Socket) -> dict[nn.Module, Plug]:
    """A plug into the socket for each (global) attention module of the model.

    Raises:
        UserError: for a model whose attention cannot be replaced.
    """
    layers: dict[nn.Module, list[int]] = {}
    for layer, module in enumerate(m for m in _attention_calls(model) if not _is_sliding(m)):
        layers.setdefault(module, []).append(layer)
    return {module: Plug(socket, tuple(numbers)) for module, numbers in layers.items()}


def describe(model: PreTrainedModel) -> ModelShape:
    """Layers, heads and sizes, as `plugged` will number and shape them."""
    calls = _attention_calls(model)
    depths = tuple(depth for depth, module in enumerate(calls) if not _is_sliding(module))
    config = model.config
    heads = config.num_attention_heads
    return ModelShape(
        family=config.model_type,
        layers=len(depths),
        heads=heads,
        head_size=config.hidden_size // heads,
        max_length=config.max_position_embeddings - reserved_rows_of(config),
        depths=depths,
    )


def _attention_calls(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules that one forward pass calls, in order; found by running two tokens."""
    calls: list[nn.Module] = []

    def listen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(module)
        return v

    token = 1 if model.config.pad_token_id == 0 else 0
    tokens = torch.full((1, 2), token, device=model.device)
    training = {module: module.training for module in model.modules()}
    try:
        with _installed(model, dict.fromkeys(training, listen)), torch.no_grad():
            model.eval().base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not calls:
        raise UserError(
            f"{type(model).__name__} accepts another attention but never calls it; choose a masked language model of one "
            f"of these families: {', '.join(FAMILIES)}"
        )
    return calls


@contextlib.contextmanager
def _installed(model: PreTrainedModel, plugs: Mapping[nn.Module, Plugged]) -> Iterator[None]:
    before = {module: module.__dict__.get(PLUG) for module in plugs}
    implementation = attention_name(model.config)
    try:
        for module, plug in plugs.items():
            module.__dict__[PLUG] = plug  # not by setattr: an attention that is a module must not become a submodule
        model.set_attn_implementation(REGISTERED)
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module, old in before.items():
            if old is None:
                del module.__dict__[PLUG]
            else:
                module.__dict__[PLUG] = old


def check_length(base: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """A text beyond the table of positions would end in an index error of torch; families without a table read any length.

    Args:
        base: the model without its head, whose forward pass begins.
        inputs: what it is given by position: token ids first.
        named: what it is given by name.

    Raises:
        UserError: for a text longer than the model.
    """
    config: Any = base.config
    if CONVENTIONS[config.model_type] == "rotary":
        return
    reserved = reserved_rows_of(config)
    ids: Tensor | None = inputs[0] if inputs else named.get("input_ids")
    tokens = ids if ids is not None else named.get("inputs_embeds")
    positions = named.get("position_ids")
    length = 0 if tokens is None else tokens.shape[1]
    if positions is not None:
        length = int(positions.max()) + 1 - reserved if positions.numel() else 0
    if length > config.max_position_embeddings - reserved:
        raise UserError(
            f"this text has {length} tokens, and the model reads {config.max_position_embeddings - reserved} at most: cut it "
            "into blocks, or convert the model to a longer one"
        )


def _is_sliding(module: nn.Module) -> bool:
    return getattr(module, "sliding_window", None) is not None


if not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()  # transformers draws its bars for loading and saving into log files too

follow_transformers()  # for whoever imported transformers by an importer that cannot be followed
