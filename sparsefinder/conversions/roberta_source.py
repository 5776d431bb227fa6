"""What a conversion starts from: a RoBERTa-like model with its tokenizer, checked; and what every target shares."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparsefinder.conversions.positions import check_target_length
from sparsefinder.errors import UserError
from sparsefinder.models import get_normalizer
from sparsefinder.models.learned_heads import refuse_heads
from sparsefinder.models.position_tables import reserved_rows

logger = logging.getLogger(__name__)

SOURCE_FAMILIES = {"Roberta": "roberta", "XLMRoberta": "xlm-roberta", "Camembert": "camembert"}
"""Prefix of the class names -> model type, for every family that has RoBERTa's layers, positions and heads."""

_OWN_TO_THE_SOURCE = {
    "_name_or_path",
    "architectures",
    "attention_alpha",
    "attn_implementation",
    "auto_map",
    "dtype",
    "max_position_embeddings",
    "model_type",
    "transformers_version",
}


@dataclass(frozen=True)
class Source:
    """A source model, taken apart."""

    model: PreTrainedModel
    head: str
    """What follows the family in the class name: `Model`, `ForMaskedLM`, …"""
    length: int
    """Longest input in tokens: rows of the position table without the reserved ones."""
    reserved: int
    """Leading rows of the position table that belong to no token."""

    @property
    def config(self) -> PretrainedConfig:
        """The source's configuration."""
        return self.model.config

    @property
    def base(self) -> Any:
        """The model without its head (`embeddings`, `encoder`, and a `pooler` or None)."""
        return base_of(self.model)

    @property
    def positions(self) -> Tensor:
        """The position table, `(reserved + length, E)`."""
        table: Tensor = self.base.embeddings.position_embeddings.weight.data
        return table

    def state(self) -> dict[str, Tensor]:
        """Weights by name, every name with the prefix `base.` where it belongs to the model without its head."""
        prefix = "" if self.head == "Model" else f"{self.model.base_model_prefix}."
        own = self.model.state_dict()
        return {
            "base." + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
            for name, tensor in own.items()
        }


def base_of(model: PreTrainedModel) -> Any:
    """The model without its head; the model itself if it has none."""
    return getattr(model, model.base_model_prefix, model)


def read_roberta(model: Any, tokenizer: Any, heads: Mapping[str, Any], target: str) -> Source:
    """Check a RoBERTa-like model and its tokenizer against the heads that a target has, and take it apart.

    Args:
        model: the source.
        tokenizer: its tokenizer.
        heads: the target's heads by name.
        target: what messages call the target.

    Returns:
        The source and what every target needs to know of it.

    Raises:
        UserError: for another family or no model at all, a head that the target lacks, a decoder where the target has none
            (`ForCausalLM` is not among its heads), attention to an encoder, and for a tokenizer of another vocabulary.
    """
    family, head = _family_and_head(model)
    if family is None:
        names = ", ".join(SOURCE_FAMILIES.values())
        raise UserError(
            f"{_describe(model)} is no RoBERTa; {target} is made from {names}: load one of these with its own class or "
            "AutoModelForMaskedLM"
        )
    if head not in heads:
        valid = ", ".join(family + name for name in heads)
        raise UserError(f"{family}{head} has no counterpart in {target}; convert one of {valid}")
    if model.config.add_cross_attention:
        # BigBird, the only target with a decoder, hands the encoder's states to self-attention as well (transformers
        # 5.23).
        raise UserError(
            f"the source attends to an encoder (add_cross_attention=True), which {target} cannot; convert it without"
        )
    if model.config.is_decoder and "ForCausalLM" not in heads:
        raise UserError(f"the source is a decoder (is_decoder=True) and {target} has none; convert an encoder")
    refuse_heads(model.config.__dict__, target)
    alpha = get_normalizer(model).alpha
    if alpha != 1.0:
        logger.warning(
            "the source attends with entmax (alpha %s); %s knows only softmax, and forgets it", alpha, target
        )
    padding_idx = model.config.pad_token_id
    if padding_idx is None:
        raise UserError("the source's configuration has no pad_token_id, on which its positions count; set it first")
    check_tokenizer(model, tokenizer)
    reserved = reserved_rows("after_padding", padding_idx)
    rows = len(base_of(model).embeddings.position_embeddings.weight)
    return Source(model, head, length=rows - reserved, reserved=reserved)


def word_rows(model: PreTrainedModel) -> int:
    """How many word embeddings a model has."""
    embeddings: Any = model.get_input_embeddings()
    return len(embeddings.weight)


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer of another vocabulary.

    Args:
        model: a model of transformers.
        tokenizer: what should be its tokenizer.

    Raises:
        UserError: when it is no tokenizer, when an id lies beyond the word embeddings, when more than a tenth of these has no
            token (fewer are rows that only round the table up), or when the ids for padding, beginning and end differ from the
            configuration's.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"{_describe(tokenizer)} is no tokenizer; give the tokenizer of the model, e.g. from AutoTokenizer"
        )
    rows = word_rows(model)
    needed = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    if needed > rows:
        raise UserError(
            f"the tokenizer has another vocabulary: it needs {needed} word embeddings and the model has {rows}; "
            "give the tokenizer that the model was trained with"
        )
    if needed < 0.9 * rows:
        raise UserError(
            f"the tokenizer has another vocabulary: {needed} tokens for a model of {rows} word embeddings; "
            "give the tokenizer that the model was trained with"
        )
    for role in ("pad", "bos", "eos"):
        expected, given = getattr(model.config, f"{role}_token_id", None), getattr(tokenizer, f"{role}_token_id")
        known = [expected] if isinstance(expected, int) else expected
        # Without padding there is nothing to contradict, unless positions count on it.
        if known and (given is not None or role == "pad") and given not in known:
            raise UserError(
                f"the tokenizer has another vocabulary: its {role}_token_id is {given} and the model's is {expected}; "
                "give the tokenizer that the model was trained with"
            )


def check_length(source_length: int, length: Any, name: str) -> int:
    """`length`, the target's maximum in tokens; raises `UserError` unless whole and not below the source's."""
    if isinstance(length, bool) or not isinstance(length, int):
        raise UserError(f"{name} is {length!r}; needed: a whole number of tokens, at least {source_length}")
    check_target_length(source_length, length)
    return length


def carried_settings(source: PretrainedConfig, tokenizer: Any) -> dict[str, Any]:
    """The source's configuration as arguments for the target's: all of it but what names or measures the source itself.

    `sep_token_id`, which RoBERTa's configuration lacks and question-answering heads look for, comes from the tokenizer.
    """
    settings = {name: value for name, value in source.to_dict().items() if name not in _OWN_TO_THE_SOURCE}
    sep_token_id = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return settings if sep_token_id is None else {**settings, "sep_token_id": sep_token_id}


def lengthened_tokenizer(tokenizer: Any, length: int, *, padding_side: str | None = None) -> Any:
    """A copy of the tokenizer that cuts at `length` tokens; the one that was given stays as it is."""
    lengthened = copy.deepcopy(tokenizer)
    lengthened.model_max_length = length
    lengthened.init_kwargs["model_max_length"] = length
    if padding_side is not None:
        lengthened.padding_side = padding_side
        lengthened.init_kwargs["padding_side"] = padding_side
    return lengthened


def build(model_class: Any, config: PretrainedConfig, like: PreTrainedModel, **arguments: Any) -> PreTrainedModel:
    """A new `model_class` from `config`, with dtype, device and training mode of `like`.

    New weights are drawn from a fixed seed on the side, so that a conversion is the same every time and leaves the
    global random state alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config, **arguments)
    model.config.dtype = like.dtype
    moved: Any = model.to(like.device)  # type: ignore[arg-type]  # transformers wraps `to`, and its type is lost
    return moved.to(like.dtype).train(like.training)


def _family_and_head(model: Any) -> tuple[str | None, str]:
    for cls in type(model).__mro__:
        if not cls.__module__.startswith("transformers."):
            continue
        for family in SOURCE_FAMILIES:
            rest = cls.__name__.removeprefix(family)
            if cls.__name__.startswith(family) and (rest == "Model" or rest.startswith("For")):
                return family, rest
    return None, ""


def _describe(thing: Any) -> str:
    return f"{thing!r}" if isinstance(thing, str) else f"a {type(thing).__name__}"
