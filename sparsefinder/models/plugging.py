"""Language models whose attention can be looked at, replaced for a while, and remembered.

Everything goes through transformers' attention registry; no model code is copied. One function is registered
(`sparsefinder.models.registered`), and what it does is decided by the model it is called from:

- dense attention with the normalizer that the model's configuration remembers (`set_normalizer`);
- any attention object ``(q, k, v, valid, layer) → output`` while one is plugged in (`plugged`).

``save_pretrained`` forgets which attention a model was used with. Here it does not: `set_normalizer` writes ``attention_alpha``
into the configuration, and `sparsefinder.models.entmax_configuration` makes every model with such a configuration attend with
entmax.

Layers are counted by *calls*: a model is run once on two tokens, and the modules that call the attention, in order, are its
layers; an encoder-decoder has three attentions, each with layers of its own. So ALBERT, which shares one module over its depth,
has as many layers as it is deep, a hybrid model has its attention layers and no others, and a model that accepts an attention and
never calls it is found out. Layers that look through a sliding window of their own (two of three in ModernBERT) are not where a
sparse graph is predicted: they keep their window, with the model's normalizer, are never given to a plugged attention, and are
not counted; ``layer`` numbers the global ones, and `ModelShape.depths` says where they are.
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
from sparsefinder.models.entmax_configuration import PUBLISHED, REGISTERED, follow_transformers
from sparsefinder.models.families import TRAITS, Which, check_family, kind_of
from sparsefinder.models.plug import Plug, Socket
from sparsefinder.models.position_tables import CONVENTIONS, reserved_rows_of
from sparsefinder.models.registered import PLUG, Plugged, normalizer_of
from sparsefinder.models.transformers_internals import attention_name
from sparsefinder.numerics.normalizers import Normalizer

log = logging.getLogger(__name__)

SOFTMAX = "sdpa"  # what transformers calls its own dense softmax attention


@dataclass(frozen=True)
class ModelShape:
    """What a recorder of attention needs to know before it runs a model: of one of the attentions of an encoder-decoder."""

    family: str
    layers: int  # attention layers that can be replaced: L
    heads: int  # H
    head_size: int  # D
    max_length: int  # tokens, special ones included
    depths: tuple[int, ...]  # depth of each of these layers among all layers of this attention that call it
    which: Which = "enc"  # the attention that is described
    key_heads: int = 0  # H_k, fewer where heads of queries share keys
    others: int = 0  # layers without such an attention, as in hybrid models: convolutions, states, linear attention

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.key_heads


# ---- the normalizer ----

_ALPHAS = ("attention_alpha", PUBLISHED)


def set_normalizer(model: PreTrainedModel, normalizer: Normalizer) -> None:
    """Dense attention with another normalizer from now on, in every layer; kept by ``save_pretrained``.

    Args:
        model: a model of one of `sparsefinder.models.families.TRAITS`, changed in place.
        normalizer: α-entmax; α = 1 gives transformers' own softmax attention back, and nothing is written.

    Raises:
        UserError: for a model that would never call it (Longformer, BigBird, Nyströmformer, Reformer).
    """
    check_model(model.config, model.name_or_path or type(model).__name__)
    if normalizer.alpha == 1.0:
        for config in _configurations(model):
            for name in _ALPHAS:
                config.__dict__.pop(name, None)
        model.set_attn_implementation(SOFTMAX)
        return
    _attention_calls(model)
    model.set_attn_implementation(REGISTERED)
    for config in _configurations(model):
        if PUBLISHED not in config.__dict__ or normalizer_of(config) != normalizer:  # there sliding layers have softmax
            config.attention_alpha = normalizer.alpha


def _configurations(model: PreTrainedModel) -> list[Any]:
    """That of the model, and the copies of it that some families give their encoder and decoder."""
    found = {id(model.config): model.config}
    for module in model.modules():
        own = getattr(module, "config", None)
        if type(own) is type(model.config):
            found.setdefault(id(own), own)
    return list(found.values())


def get_normalizer(model: PreTrainedModel) -> Normalizer:
    """The normalizer of the model's own dense attention, whatever is plugged in; α = 1 where none is remembered."""
    return normalizer_of(model.config)


# ---- other attentions, for a while ----


@contextlib.contextmanager
def softmax(model: PreTrainedModel) -> Iterator[None]:
    """Within the block every layer, sliding ones too, attends with transformers' own softmax attention, which is torch's SDPA."""
    implementation, configurations = attention_name(model.config), _configurations(model)
    remembered = [{n: v for n, v in each.__dict__.items() if n in _ALPHAS} for each in configurations]
    set_normalizer(model, Normalizer(1.0))
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        for config, alpha in zip(configurations, remembered, strict=True):
            config.__dict__.update(alpha)


@contextlib.contextmanager
def plugged(model: PreTrainedModel, attention: Attention, which: Which | None = None) -> Iterator[None]:
    """Within the block every (global) layer of one attention calls ``attention(q, k, v, valid, layer) → output``.

    The old attention is put back at the end, after an exception too. Blocks may be nested: the innermost counts, and the three
    attentions of an encoder-decoder do not touch each other. Dropout on attention probabilities belongs to the dense path and is
    not applied.

    Args:
        model: a model of one of `sparsefinder.models.families.TRAITS`.
        attention: gets ``q (B, H, N_q, D)``, ``k`` and ``v (B, H_k, N_k, D)`` in the model's dtype, ``q`` not rescaled; ``valid
            (B, N_k)`` bool, True on real tokens; and ``layer``, 0 to `ModelShape.layers` − 1. It returns ``(B, H, N_q, D)``. In a
            causal language model it must be causal by itself. Of cross-attention it gets ``query_valid`` besides, all True, since
            a model does not say there which of its queries are padding. Sentences packed into one row by a mask ``(B, 1, N, N)``
            are given as rows of their own.
        which: ``enc``, ``dec`` or ``cross`` of an encoder-decoder; None for the one attention of another model.

    Raises:
        UserError: for a model whose attention cannot be replaced; within the block, for any other mask but padding, and for a
            text longer than the model.
    """
    plugs = plugs_of(model, socket := Socket(attention), which)

    def begin(base: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        socket.begin()
        check_length(base, inputs, named)

    start = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with _installed(model, plugs):
            yield
    finally:
        start.remove()


def plugs_of(model: PreTrainedModel, socket: Socket, which: Which | None = None) -> dict[nn.Module, Plug]:
    """A plug into the socket for each (global) module of an attention of the model.

    Raises:
        UserError: for a model whose attention cannot be replaced.
    """
    calls = _calls_of(model, which)
    layers: dict[nn.Module, list[int]] = {}
    for layer, call in enumerate(each for each in calls if not _is_sliding(each.module, model.config)):
        layers.setdefault(call.module, []).append(layer)
    return {module: Plug(socket, tuple(numbers), calls[0].which == "cross") for module, numbers in layers.items()}


def describe(model: PreTrainedModel, which: Which | None = None) -> ModelShape:
    """Layers, heads and sizes of an attention, as `plugged` will number and shape them."""
    calls, config = _calls_of(model, which), model.config
    depths = tuple(depth for depth, call in enumerate(calls) if not _is_sliding(call.module, config))
    longest = getattr(config, "max_position_embeddings", None)  # a relative position has no end
    return ModelShape(
        family=config.model_type,
        which=calls[0].which,
        layers=len(depths),
        heads=calls[0].heads,
        key_heads=calls[0].key_heads,
        head_size=calls[0].size,
        max_length=sys.maxsize if longest is None else longest - reserved_rows_of(config),
        depths=depths,
        others=max(config.num_hidden_layers - len(calls), 0) if kind_of(config) == "decoder" else 0,
    )


@dataclass(frozen=True)
class _Call:
    """A call of an attention module in one forward pass."""

    module: nn.Module
    which: Which
    heads: int
    key_heads: int
    size: int


def _calls_of(model: PreTrainedModel, which: Which | None) -> list[_Call]:
    """The calls of one of the model's attentions; a `UserError` where it cannot be replaced."""
    check_model(model.config, label := model.name_or_path or type(model).__name__)
    traits = TRAITS[model.config.model_type]
    if which is None and len(traits.attentions) > 1:
        raise UserError(f"{label} has three attentions: say which of {', '.join(traits.attentions)}")
    which = which or traits.attentions[0]
    if which not in traits.attentions:
        raise UserError(f"{label} has no attention {which!r}, only {', '.join(traits.attentions)}")
    if which in traits.biased:
        free = [each for each in traits.attentions if each not in traits.biased]
        raise UserError(
            f"{label} is a {model.config.model_type}, which adds a learned bias to the scores of its attention {which!r}, and no "
            f"other attention is given that; without a bias is {', '.join(free)}"
        )
    calls = [call for call in _attention_calls(model) if call.which == which]
    if all(_is_sliding(call.module, model.config) for call in calls):
        raise UserError(
            f"{label}: every layer looks through a sliding window of its own, so there is no attention to replace; choose a "
            "model with layers that see everything (sliding_window=null in its config.json)"
        )
    return calls


def _attention_calls(model: PreTrainedModel) -> list[_Call]:
    """What one forward pass calls, in order; found by running two tokens, and of an encoder-decoder three more that it reads."""
    calls: list[_Call] = []
    kind = kind_of(model.config)

    def listen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        of_lengths: dict[tuple[int, int], Which] = {(3, 3): "enc", (2, 3): "cross", (2, 2): "dec"}
        which: Which = "enc" if kind == "encoder" else of_lengths[q.shape[2], k.shape[2]]
        calls.append(_Call(module, which, q.shape[1], k.shape[1], q.shape[3]))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)[:, :, : q.shape[2]]

    token = 1 if model.config.pad_token_id == 0 else 0
    tokens = torch.full((1, 2), token, device=model.device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind != "encoder":
        inputs["use_cache"] = False
    if kind == "encoder_decoder":
        inputs |= {f"decoder_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
        inputs |= {name: inputs[name].repeat(1, 2)[:, :3] for name in ("input_ids", "attention_mask")}
    training = {module: module.training for module in model.modules()}
    try:
        with _installed(model, dict.fromkeys(training, listen)), torch.no_grad():
            model.eval().base_model(**inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    if not calls:
        raise UserError(
            f"{type(model).__name__} accepts another attention but never calls it; choose a model of one "
            f"of these families: {', '.join(TRAITS)}"
        )
    return calls


def check_model(config: Any, label: str) -> None:
    """Refuse a model whose attention cannot be replaced, by its configuration."""
    check_family(config.model_type, label)
    if kind_of(config) == "encoder" and getattr(config, "is_decoder", False):
        raise UserError(f"{label} is configured as a decoder; a masked language model needs is_decoder=false")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise UserError(
            f"{label} has reorder_and_upcast_attn=true, with which it never calls another attention: set it to false"
        )


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
    if CONVENTIONS[config.model_type] in ("rotary", "relative"):
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


def _is_sliding(module: nn.Module, config: Any) -> bool:
    if config.model_type == "mistral":  # whose modules do not say it
        return getattr(config, "sliding_window", None) is not None
    return getattr(module, "sliding_window", None) is not None


if not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()  # transformers draws its bars for loading and saving into log files too

follow_transformers()  # for whoever imported transformers by an importer that cannot be followed
