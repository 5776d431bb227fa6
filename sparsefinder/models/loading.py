"""Load a model that others saved or that this package finetuned, with the attention that it remembers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsefinder.errors import UserError
from sparsefinder.models.checkpoints import check_that_it_runs, load_config, load_model, load_tokenizer, open_checkpoint
from sparsefinder.models.dense_normalizer import set_normalizer
from sparsefinder.models.entmax_configuration import ALPHA
from sparsefinder.models.families import TRAITS, Kind, check_family
from sparsefinder.models.learned_heads import check_heads, get_heads, set_heads
from sparsefinder.models.replacement import attach_and_detach
from sparsefinder.models.replacement.registered_function import normalizer_of
from sparsefinder.models.transformers_internals import forget_attention

log = logging.getLogger(__name__)


def load_masked_lm(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model, with the attention that it was finetuned with, and its tokenizer.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a name on the Hugging Face hub.

    Returns:
        The model, in evaluation mode and float32, and its tokenizer.

    Raises:
        UserError: as `load_with_head`, and for a tokenizer without a mask token.
    """
    model, tokenizer = load_with_head(name_or_path, AutoModelForMaskedLM, ("encoder",))
    if tokenizer.mask_token_id is None:
        raise UserError(f"model={name_or_path}: its tokenizer has no mask token; a masked language model needs one")
    return model, tokenizer


def load_causal_lm(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, with the attention that it was finetuned with, and its tokenizer; see `load_masked_lm`.

    Where the tokenizer has no padding token, as GPT-2's, that of the end stands for it: padding is never attended.
    """
    return load_with_head(name_or_path, AutoModelForCausalLM, ("decoder",))


def load_language_model(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked or a causal language model, or an encoder-decoder, by its family; see `load_masked_lm`."""
    checkpoint = open_checkpoint(name_or_path, label=f"model={name_or_path}")
    traits = TRAITS.get(checkpoint.settings["model_type"])
    if traits is None or traits.kind == "encoder":
        check_family(checkpoint.settings["model_type"], checkpoint.label)
        return load_encoder(name_or_path)
    if traits.kind == "decoder":
        return load_causal_lm(name_or_path)
    return load_with_head(name_or_path, AutoModelForSeq2SeqLM, ("encoder_decoder",))


def load_encoder(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model, or the encoder alone where the checkpoint has no head: nothing is drawn at random then.

    Args:
        name_or_path: as in `load_masked_lm`.

    Returns:
        The model, in evaluation mode and float32, and its tokenizer; `has_head` tells which.

    Raises:
        UserError: as `load_masked_lm`.
    """
    named = open_checkpoint(name_or_path, label=f"model={name_or_path}").settings.get("architectures") or ["For"]
    if any("For" in name for name in named):  # BertForMaskedLM, and not BertModel
        return load_masked_lm(name_or_path)
    return load_with_head(name_or_path, AutoModel)


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model is more than an encoder."""
    return model.base_model is not model


def load_with_head(
    name_or_path: str | Path, auto_class: Any, kinds: tuple[Kind, ...] = ("encoder",), **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of one of the families by an Auto class, with the attention that it was finetuned with, and its tokenizer.

    A head or pooler that the checkpoint lacks, or has in another size, is drawn from torch's global random state and named in the
    log. No remote code is ever run.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a name on the Hugging Face hub.
        auto_class: the Auto class of transformers that says which head the model has.
        kinds: of the families that can have it.
        **options: settings of the configuration, such as ``num_labels=3``; with these the head may have another size than in the
            checkpoint.

    Returns:
        The model, in evaluation mode and in float32 whatever precision it was saved in, and its tokenizer.

    Raises:
        UserError: in one line, for everything that `sparsefinder.models.checkpoints` refuses, another family, and a tokenizer
            without padding.
    """
    checkpoint = open_checkpoint(name_or_path, label=f"model={name_or_path}")
    label, settings = checkpoint.label, checkpoint.settings
    check_family(settings["model_type"], label, kinds)
    if kinds == ("encoder",) and settings.get("is_decoder"):
        raise UserError(f"{label} is configured as a decoder; a masked language model needs is_decoder=false")
    config = load_config(checkpoint, **options)
    try:
        normalizer = None if isinstance(getattr(config, ALPHA, None), (list, tuple)) else normalizer_of(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{label}: attention_alpha in its config.json is wrong: {error}") from error
    forget_attention(config)  # whatever it was saved as; the normalizer is set below
    # transformers would keep half precision, in which small updates are lost
    model, _ = load_model(checkpoint, auto_class, config=config, new_head=bool(options), dtype=torch.float32)
    if attach_and_detach.owner_of(model) is not None:
        attach_and_detach.detach(model)
        log.info("%s: the index beside its weights is left out, the model attends densely", label)
    tokenizer = load_tokenizer(checkpoint, model.config.vocab_size)
    if tokenizer.pad_token_id is None and "decoder" in kinds:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{label}: its tokenizer has no padding token, which batches need; add one and save it again")
    check_heads(model, label)
    check_that_it_runs(model, label)
    if normalizer is None:  # an α for each head, which the configuration has
        set_heads(model, get_heads(model))
    else:
        set_normalizer(model, normalizer)
    return model, tokenizer
