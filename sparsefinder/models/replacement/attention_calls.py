"""Which modules of a model call its attention, in what order and with which heads: what `layer` counts.

Layers are counted by *calls*: a model is run once on two tokens, and the modules that call the attention, in order, are its
layers; an encoder-decoder has three attentions, each with layers of its own. So ALBERT, which shares one module over its depth,
has as many layers as it is deep, a hybrid model has its attention layers and no others, and a model that accepts an attention and
never calls it is found out. Layers that look through a sliding window of their own (two of three in ModernBERT) are not where a
sparse graph is predicted: they keep their window, with the model's normalizer, are never given to a plugged attention, and are
not counted; ``layer`` numbers the global ones, and `ModelShape.depths` says where they are.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import logging as transformers_logging

from sparsefinder.errors import UserError
from sparsefinder.models.entmax_configuration import REGISTERED, follow_transformers
from sparsefinder.models.families import TRAITS, Which, check_family, kind_of
from sparsefinder.models.position_tables import longest_input
from sparsefinder.models.replacement.registered_function import PLUG, Plugged
from sparsefinder.models.transformers_internals import attention_name


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


def describe(model: PreTrainedModel, which: str | None = None) -> ModelShape:
    """Layers, heads and sizes of an attention, as `plugged` will number and shape them."""
    calls, config = calls_of(model, which), model.config
    depths = tuple(depth for depth, call in enumerate(calls) if not is_sliding(call.module, config))
    return ModelShape(
        family=config.model_type,
        which=calls[0].which,
        layers=len(depths),
        heads=calls[0].heads,
        key_heads=calls[0].key_heads,
        head_size=calls[0].size,
        max_length=longest_input(config),
        depths=depths,
        others=max(config.num_hidden_layers - len(calls), 0) if kind_of(config) == "decoder" else 0,
    )


@dataclass(frozen=True)
class AttentionCall:
    """A call of an attention module in one forward pass."""

    module: nn.Module
    which: Which
    heads: int
    key_heads: int
    size: int


def calls_of(model: PreTrainedModel, which: str | None) -> list[AttentionCall]:
    """The calls of one of the model's attentions; a `UserError` where it cannot be replaced."""
    check_model(model.config, label := model.name_or_path or type(model).__name__)
    traits = TRAITS[model.config.model_type]
    if which is None and len(traits.attentions) > 1:
        raise UserError(f"{label} has three attentions: say which of {', '.join(traits.attentions)}")
    which = which or traits.attentions[0]
    if which not in traits.attentions:
        raise UserError(f"{label} has no attention {which!r}, only {', '.join(traits.attentions)}")
    if which in traits.biased:
        raise UserError(
            f"{label} is a {model.config.model_type}, which adds a learned bias to the scores of its attention {which!r}, and no "
            f"other attention is given that; without a bias is {', '.join(traits.replaceable)}"
        )
    calls = [call for call in attention_calls(model) if call.which == which]
    if all(is_sliding(call.module, model.config) for call in calls):
        raise UserError(
            f"{label}: every layer looks through a sliding window of its own, so there is no attention to replace; choose a "
            "model with layers that see everything (sliding_window=null in its config.json)"
        )
    return calls


def attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    """What one forward pass calls, in order; found by running two tokens, and of an encoder-decoder three more that it reads."""
    calls: list[AttentionCall] = []
    kind = kind_of(model.config)

    def listen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        of_lengths: dict[tuple[int, int], Which] = {(3, 3): "enc", (2, 3): "cross", (2, 2): "dec"}
        which: Which = "enc" if kind == "encoder" else of_lengths[q.shape[2], k.shape[2]]
        calls.append(AttentionCall(module, which, q.shape[1], k.shape[1], q.shape[3]))
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
        with installed(model, dict.fromkeys(training, listen)), torch.no_grad():
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
def installed(model: PreTrainedModel, plugs: Mapping[nn.Module, Plugged]) -> Iterator[None]:
    """Within the block these modules carry what is given for each, and transformers calls it."""
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


def is_sliding(module: nn.Module, config: Any) -> bool:
    """Whether an attention module looks through a sliding window of its own."""
    if config.model_type == "mistral":  # whose modules do not say it
        return getattr(config, "sliding_window", None) is not None
    return getattr(module, "sliding_window", None) is not None


if not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()  # transformers draws its bars for loading and saving into log files too

follow_transformers()  # for whoever imported transformers by an importer that cannot be followed
