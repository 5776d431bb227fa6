"""Masked language models whose attention can be looked at, replaced for a while, and remembered.

Everything goes through transformers' attention registry; no model code is copied. One function is registered
(`sparsefinder.registered`), and what it does is decided by the model it is called from:

- dense attention with the normalizer that the model's configuration remembers (`set_normalizer`);
- any attention object ``(q, k, v, valid, layer) → output`` while one is plugged in (`plugged`).

``save_pretrained`` forgets which attention a model was used with. Here it does not: `set_normalizer` writes ``attention_alpha``
into the configuration, and `sparsefinder.remembering` makes every model with such a configuration attend with entmax.

Layers are counted by *calls*: a model is run once on two tokens, and the modules that call the attention, in order, are its
layers. So ALBERT, which shares one module over its depth, has as many layers as it is deep, and a model that accepts an
attention and never calls it is found out. Layers that look through a sliding window of their own (two of three in
ModernBERT) are no places to predict a sparse graph: they keep their window, with the model's normalizer, are never given
to a plugged attention, and are not counted; ``layer`` numbers the global ones, and `ModelShape.depths` says where they are.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from sparsefinder import hub
from sparsefinder.graphs import Attention
from sparsefinder.packing import Sentences, read_mask
from sparsefinder.registered import PLUG, Plugged, normalizer_of
from sparsefinder.remembering import REGISTERED, follow_transformers
from sparsefinder.store import UserError
from sparsefinder.transformers_internals import attention_name, forget_attention
from sparsefinder.transforms import Normalizer

log = logging.getLogger(__name__)

FAMILIES = ("roberta", "bert", "xlm-roberta", "camembert", "electra", "albert", "distilbert", "modernbert")
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
_NO_POSITION_TABLE = ("modernbert",)  # positions are rotations
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
        normalizer = normalizer_of(config)
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
def plugged(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Within the block every (global) self-attention layer calls ``attention(q, k, v, valid, layer) → output``.

    ``q``, ``k``, ``v``, ``output``: ``(B, H, N, D)`` in the model's dtype, ``q`` not rescaled; ``valid``: ``(B, N)`` bool, True
    on real tokens; ``layer``: 0 to `ModelShape.layers` − 1. Dropout on attention probabilities is the dense path's alone.
    Sentences packed into one row by a mask ``(B, 1, N, N)`` are given as rows of their own; any other such mask, but padding,
    and a text longer than the model are a `UserError`.
    The old attention is put back at the end, after an exception too. Blocks may be nested: the innermost counts.
    """
    layers: dict[nn.Module, list[int]] = {}
    for layer, module in enumerate(m for m in _attention_calls(model) if not _is_sliding(m)):
        layers.setdefault(module, []).append(layer)
    plug = _Plug(attention, layers)

    def begin(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        plug.begin()
        _check_length(model, inputs[0] if inputs else named.get("input_ids"), named)

    start = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
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


@dataclass
class _Plug:
    attention: Attention
    layers: dict[nn.Module, list[int]]  # the layers of each attention module: several where it is shared over depth
    met: dict[nn.Module, int] = field(default_factory=dict)  # calls of a shared module in this forward pass
    # the mask that was read last, as all layers get the same, and what it says
    read: tuple[Tensor | None, Tensor, Sentences | None] | None = None

    def begin(self) -> None:
        """Forget the last forward pass."""
        self.met.clear()
        self.read = None

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        layers = self.layers[module]
        call = 0
        if len(layers) > 1:
            call = self.met.get(module, 0)
            self.met[module] = call + 1
        if self.read is None or self.read[0] is not mask:
            self.read = (mask, *read_mask(mask, q, k, getattr(self.attention, "causal", False)))
        _, valid, sentences = self.read
        if sentences is None:
            return self.attention(q, k, v, valid, layers[call])
        q_apart, k_apart, v_apart = map(sentences.apart, (q, k, v))
        out = self.attention(q_apart, k_apart, v_apart, sentences.valid, layers[call])
        return sentences.together(out, q.shape)


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
def _installed(model: PreTrainedModel, modules: Iterable[nn.Module], plug: Plugged) -> Iterator[None]:
    before = {module: module.__dict__.get(PLUG) for module in modules}
    implementation = attention_name(model.config)
    try:
        for module in before:
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


def _check_length(model: PreTrainedModel, ids: Tensor | None, named: dict[str, Any]) -> None:
    """A text beyond the table of positions would end in an index error of torch; families without a table read any length."""
    config = model.config
    if config.model_type in _NO_POSITION_TABLE:
        return
    reserved = reserved_positions(config.model_type, config.pad_token_id)
    tokens = ids if ids is not None else named.get("inputs_embeds")
    places = named.get("position_ids")
    length = 0 if tokens is None else tokens.shape[1]
    if places is not None:
        length = int(places.max()) + 1 - reserved if places.numel() else 0
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
