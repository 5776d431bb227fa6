"""Masked language models whose attention can be looked at, replaced for a while, and remembered.

Everything goes through transformers' attention registry; no model code is copied. One name, `REGISTERED`, is entered into
the registry of attention functions **and** into that of mask functions: without the second, transformers hands over no mask
and padding is attended, silently. What that one function does is decided by the model it is called from:

- dense attention with the normalizer that the model's configuration remembers (`set_normalizer`);
- any attention object ``(q, k, v, valid, layer) → output`` while one is plugged in (`plugged`).

``save_pretrained`` forgets which attention a model was used with. Here it does not: `set_normalizer` writes two keys into the
configuration, ``attention_alpha`` and ``attn_implementation``, and so into ``config.json``. `load_masked_lm` reads the first.
``AutoModelForMaskedLM.from_pretrained`` acts on the second: it gives entmax where this module has been imported, and
an error that names ``sparsefinder`` where it has not; it never quietly gives softmax. (transformers takes the second
key out while it loads. It is put back at the first forward pass, for the next ``save_pretrained``.)

Layers are counted by *calls*: a model is run once on two tokens, and the modules that call the attention, in order, are its
layers. So ALBERT, which shares one module over its depth, has as many layers as it is deep, and a model that accepts an
attention and never calls it is found out. Layers that look through a sliding window of their own (two of three in
ModernBERT) are no places to predict a sparse graph: they keep their window, with the model's normalizer, are never given
to a plugged attention, and are not counted; ``layer`` numbers the global ones, and `ModelShape.depths` says where they are.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from sparsefinder import hub
from sparsefinder.graphs import Attention
from sparsefinder.store import UserError
from sparsefinder.transformers_internals import attention_name, boolean_mask, forget_attention
from sparsefinder.transforms import Normalizer

log = logging.getLogger(__name__)

FAMILIES = ("roberta", "bert", "xlm-roberta", "camembert", "electra", "albert", "distilbert", "modernbert")
REGISTERED = "sparsefinder"  # the name in both registries, and of `attn_implementation` in config.json
SOFTMAX = "sdpa"  # what transformers calls its own dense softmax attention

_LARGEST_WEIGHT = 1e12  # far above any that was trained, far below one whose square is infinite
_LARGEST = {  # sizes in a configuration that can be meant
    "num_hidden_layers": 1000,
    "num_attention_heads": 1000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "embedding_size": 100_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 1000,
    "num_hidden_groups": 1000,
    "inner_group_num": 1000,
}
_PLUG = "_sparsefinder_plug"  # attribute of an attention module while something is plugged in
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # the first rows of their position tables are reserved


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


def load_masked_lm(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model, with the attention that it was finetuned with, and its tokenizer.

    ``name_or_path``: a folder written by ``save_pretrained``, or a name on the Hugging Face hub. No remote code is ever run.
    Returns the model in evaluation mode and in float32, whatever precision it was saved in. Raises a `UserError` in one line
    for a missing path, an unreachable hub, a family other than `FAMILIES`, damaged or missing weights, and a tokenizer without
    a mask token.
    """
    name = str(name_or_path)
    options: dict[str, Any] = {"local_files_only": _must_be_local(name)}
    config = _read("configuration", name, AutoConfig.from_pretrained, **options)
    _check_family(config, name)
    _check_sizes(config, name)
    try:
        normalizer = _normalizer(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"model={name}: attention_alpha in its config.json is wrong: {error}") from error
    forget_attention(config)  # whatever it was saved as; the normalizer is set below
    model, found = _read(
        *("weights", name, AutoModelForMaskedLM.from_pretrained),
        config=config,
        dtype=torch.float32,  # transformers would keep half precision, in which small updates are lost
        output_loading_info=True,
        **options,
    )
    _check_weights(model, found, name)
    tokenizer = _read("tokenizer", name, AutoTokenizer.from_pretrained, **options)
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"model={name}: its tokenizer has no mask or padding token; a masked language model needs both")
    _check_that_it_runs(model.eval(), len(tokenizer), name)
    set_normalizer(model, normalizer)
    return model, tokenizer


def _must_be_local(name: str) -> bool:
    """Whether only files of this machine can be used; a `UserError` for what is neither a folder nor a name."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"model={name}: this folder has no config.json; give one written by save_pretrained")
        return True
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(
            f"model={name}: there is no such folder, and it is no name of the Hugging Face hub; "
            "give a folder written by save_pretrained or a name such as roberta-base"
        )
    return not hub.reachable()


def _read(what: str, name: str, load: Any, **options: Any) -> Any:
    try:
        return load(name, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, SafetensorError, JSON errors: the loaders have no common type
        local = options.get("local_files_only") and not Path(name).is_dir()
        absent = f"{what} of that name are not in its cache; connect, or give the path of a folder written by save_pretrained"
        raise hub.refusal(f"model={name}", error, f": cannot read its {what}", absent if local else "") from error


def _check_family(config: Any, name: str) -> None:
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model={name} is a {config.model_type}, whose attention cannot be replaced; choose a masked language model "
            f"of one of these families: {', '.join(FAMILIES)}"
        )
    if getattr(config, "is_decoder", False):
        raise UserError(f"model={name} is configured as a decoder; a masked language model needs is_decoder=false")


def _check_sizes(config: Any, name: str) -> None:
    """A damaged number must not build a million layers before the weights are found not to fit."""
    for key, most in _LARGEST.items():
        value = getattr(config, key, 1)
        if not isinstance(value, int) or not 0 < value <= most:
            raise UserError(
                f"model={name}: {key} in its config.json is {value!r:.40}; a whole number up to {most} is needed"
            )


def gaps(model: PreTrainedModel, missing: Collection[str]) -> list[str]:
    """Of the weights that a checkpoint lacks those that it must have, sorted: all but a head, or a pooler, gone as a whole.

    Some of a head gone is damage.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."

    def part(key: str) -> str:
        if not key.startswith(prefix):
            return "head"
        return "pooler" if key.startswith(f"{prefix}pooler.") else "body"

    wrong = {key for key in missing if part(key) == "body"}
    for name in ("head", "pooler"):
        gone = {key for key in missing if part(key) == name}
        # tied weights have other names in a report: a head with one of these is gone as a whole
        if gone < {key for key, _ in model.named_parameters() if part(key) == name}:
            wrong |= gone
    return sorted(wrong)


def _check_weights(model: PreTrainedModel, found: dict[str, Any], name: str) -> None:
    missing = sorted(found["missing_keys"])
    if wrong := gaps(model, missing):
        raise UserError(
            f"model={name}: {len(wrong)} of its weights are not in the checkpoint, the first is {wrong[0]}; "
            "it is damaged or of another architecture"
        )
    if missing:
        log.warning("%s has no masked-LM head: %s start at random", name, ", ".join(missing))


def _check_that_it_runs(model: PreTrainedModel, vocabulary: int, name: str) -> None:
    """A damaged configuration may fit the weights and fail at the first input; a damaged weight may be no number."""
    if vocabulary > model.config.vocab_size:
        raise UserError(
            f"model={name}: its tokenizer has {vocabulary} tokens and its weights {model.config.vocab_size}: they belong to "
            "different models"
        )
    try:
        with torch.inference_mode():
            finite = model(input_ids=torch.full((1, 2), min(4, vocabulary - 1))).logits.isfinite().all()
            sane = all((weight.abs() < _LARGEST_WEIGHT).all() for weight in model.parameters())  # NaN is below nothing
    except Exception as error:  # whatever the model's code does with a value it was not made for
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model={name}: cannot be run, its config.json may be damaged ({reason})") from error
    if not finite or not sane:
        raise UserError(
            f"model={name}: its weights contain NaN or numbers above {_LARGEST_WEIGHT:.0e}, or lead to such; "
            "the checkpoint is damaged"
        )


# ---- the normalizer ----


def set_normalizer(model: PreTrainedModel, normalizer: Normalizer) -> None:
    """Dense attention with ``normalizer`` from now on, in every layer; kept by ``save_pretrained``.

    α = 1 gives transformers' own softmax attention back, and nothing is written. Raises a `UserError` for a model that
    would never call it (Longformer, BigBird, Nyströmformer, Reformer).
    """
    _check_family(model.config, model.name_or_path or type(model).__name__)
    if normalizer.alpha == 1.0:
        model.set_attn_implementation(SOFTMAX)
        for key in ("attention_alpha", "attn_implementation"):
            model.config.__dict__.pop(key, None)
        return
    _attention_calls(model)
    model.config.attention_alpha = normalizer.alpha
    model.config.attn_implementation = REGISTERED
    model.set_attn_implementation(REGISTERED)


def get_normalizer(model: PreTrainedModel) -> Normalizer:
    """The normalizer of the model's own dense attention, whatever is plugged in; α = 1 where none is remembered."""
    return _normalizer(model.config)


def _normalizer(config: Any) -> Normalizer:
    return Normalizer(getattr(config, "attention_alpha", 1.0))


# ---- other attentions, for a while ----


@contextlib.contextmanager
def plugged(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Within the block every (global) self-attention layer calls ``attention(q, k, v, valid, layer) → output``.

    ``q``, ``k``, ``v``, ``output``: ``(B, H, N, D)`` in the model's dtype, ``q`` not rescaled; ``valid``: ``(B, N)`` bool, True
    on real tokens; ``layer``: 0 to `ModelShape.layers` − 1. Dropout on attention probabilities is the dense path's alone.
    The old attention is put back at the end, after an exception too. Blocks may be nested: the innermost counts.
    """
    layers: dict[nn.Module, list[int]] = {}
    for layer, module in enumerate(m for m in _attention_calls(model) if not _is_sliding(m)):
        layers.setdefault(module, []).append(layer)
    plug = _Plug(attention, layers)
    start = model.base_model.register_forward_pre_hook(lambda *_: plug.met.clear())
    try:
        with _installed(model, layers, plug):
            yield
    finally:
        start.remove()


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
        max_length=config.max_position_embeddings - reserved_positions(config.model_type, config.pad_token_id),
        depths=depths,
    )


def reserved_positions(family: str, pad_token_id: int) -> int:
    """Rows at the start of a family's position table that no token uses: up to the padding's, in RoBERTa's kin."""
    return pad_token_id + 1 if family in _OFFSET_POSITIONS else 0


class _Plugged(Protocol):
    """What an attention module carries while something is plugged in."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor: ...


@dataclass
class _Plug:
    attention: Attention
    layers: dict[nn.Module, list[int]]  # the layers of each attention module: several where it is shared over depth
    met: dict[nn.Module, int] = field(default_factory=dict)  # calls of a shared module in this forward pass

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        layers = self.layers[module]
        call = 0
        if len(layers) > 1:
            call = self.met.get(module, 0)
            self.met[module] = call + 1
        return self.attention(q, k, v, valid, layers[call])


def _attention_calls(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules that one forward pass calls, in order; found by running two tokens."""
    calls: list[nn.Module] = []

    def listen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        calls.append(module)
        return v

    token = 1 if model.config.pad_token_id == 0 else 0
    tokens = torch.full((1, 2), token, device=model.device)
    training = {module: module.training for module in model.modules()}
    try:
        with _installed(model, training, listen), torch.no_grad():
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
def _installed(model: PreTrainedModel, modules: Iterable[nn.Module], plug: _Plugged) -> Iterator[None]:
    before = {module: module.__dict__.get(_PLUG) for module in modules}
    implementation = attention_name(model.config)
    try:
        for module in before:
            module.__dict__[_PLUG] = plug  # not by setattr: an attention that is a module must not become a submodule
        model.set_attn_implementation(REGISTERED)
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module, old in before.items():
            if old is None:
                del module.__dict__[_PLUG]
            else:
                module.__dict__[_PLUG] = old


def _is_sliding(module: nn.Module) -> bool:
    return getattr(module, "sliding_window", None) is not None


# ---- the registered function ----


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: ``(B, H, N, D)`` → ``(B, N, H, D)``, and the probabilities where there are any."""
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise TypeError(f"this attention needs a boolean mask (B, N), True on real tokens, got {attention_mask.dtype}")
    natural = 1.0 / math.sqrt(query.shape[-1])
    if scaling is not None and not math.isclose(scaling, natural):
        query = query * (scaling / natural)
    plug: _Plugged | None = module.__dict__.get(_PLUG)
    if plug is not None:
        output = plug(module, query, key, value, _valid(query, attention_mask))
        return output.transpose(1, 2).contiguous(), None
    if hasattr(module.config, "attention_alpha"):
        module.config.attn_implementation = REGISTERED  # transformers took it out while loading
    return _dense(query, key, value, attention_mask, _normalizer(module.config), dropout if module.training else 0.0)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, normalizer: Normalizer, dropout: float
) -> tuple[Tensor, Tensor]:
    # float32 also under autocast: the support and the sum of a row do not survive half precision
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        probabilities = nn.functional.dropout(normalizer(scores), dropout).to(value.dtype)
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _valid(query: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, N)`` real tokens from the mask of a layer without window, whose rows are all the same."""
    batch, _, tokens, _ = query.shape
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    return mask[:, 0].any(-2).expand(batch, tokens)


if not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()  # transformers draws its bars for loading and saving into log files too

AttentionInterface.register(REGISTERED, _attend)
AttentionMaskInterface.register(REGISTERED, boolean_mask())
