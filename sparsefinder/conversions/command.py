"""From the name of a checkpoint to a folder with the converted model: what the command line calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from sparsefinder.conversions.bigbird import convert_roberta_to_bigbird
from sparsefinder.conversions.certificate import Certificate
from sparsefinder.conversions.equivalence import save
from sparsefinder.conversions.led import convert_longformer_to_led
from sparsefinder.conversions.longformer import convert_roberta_to_longformer, resize_longformer
from sparsefinder.conversions.nystromformer import convert_roberta_to_nystromformer
from sparsefinder.conversions.roberta_source import SOURCE_FAMILIES, word_rows
from sparsefinder.conversions.staging import refuse_existing
from sparsefinder.errors import UserError, one_of
from sparsefinder.models.checkpoints import (
    Checkpoint,
    check_that_it_runs,
    load_config,
    load_model,
    load_tokenizer,
    open_checkpoint,
)

TARGETS = {
    "longformer": ("attention_window",),
    "nystromformer": ("num_landmarks", "conv_kernel_size"),
    "bigbird": ("attention_type", "block_size", "num_random_blocks"),
    "led": ("attention_window", "decoder_output_max_length"),
}
"""Targets of `convert_checkpoint` and the settings that each knows."""


def convert_checkpoint(
    initial_model: str,
    model_name: str | Path,
    max_sequence_length: int = 4096,
    *,
    target: str,
    architecture: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Certificate:
    """Load a checkpoint, convert it, and save it with its certificate.

    A Longformer as source is resized for `longformer`, and lengthened first for `led` if need be; a RoBERTa becomes a Longformer
    on its way to `led`. A head (or pooler) that the checkpoint lacks is drawn from a fixed seed, and named in the log.

    Args:
        initial_model: a folder, or a name on the hub.
        model_name: the folder to save in.
        max_sequence_length: longest input in tokens.
        target: one of `TARGETS`.
        architecture: the class to load; by default the one that the checkpoint names.
        settings: arguments of the target's function, e.g. `{"attention_window": 256}`.

    Returns:
        The certificate.

    Raises:
        UserError: for an existing folder, a checkpoint that cannot be loaded or lacks other weights, an unknown target,
            architecture or setting, and for everything that the conversions refuse.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r} is unknown; {one_of(TARGETS, target)}")
    chosen = dict(settings or {})
    unknown = sorted({*chosen} - {*TARGETS[target]})
    if unknown:
        raise UserError(
            f"{target} has no setting {', '.join(unknown)}; {one_of(TARGETS[target], unknown[0], 'it has')}"
        )
    refuse_existing(model_name)
    checkpoint = open_checkpoint(initial_model)
    source = _load_source(checkpoint, architecture)
    tokenizer = load_tokenizer(checkpoint, word_rows(source))
    model, new_tokenizer, compared = _convert(source, tokenizer, target, max_sequence_length, chosen)
    return save(model, new_tokenizer, compared, model_name)


def _convert(
    source: PreTrainedModel, tokenizer: Any, target: str, length: int, settings: dict[str, Any]
) -> tuple[PreTrainedModel, Any, PreTrainedModel]:
    """The converted model, its tokenizer, and the model that it is to be compared with."""
    if target == "nystromformer":
        return *convert_roberta_to_nystromformer(source, tokenizer, length, **settings), source
    if target == "bigbird":
        return *convert_roberta_to_bigbird(source, tokenizer, length, **settings), source
    longformer_settings = {name: settings.pop(name) for name in ("attention_window",) if name in settings}
    if source.config.model_type == "longformer":
        if longformer_settings:
            raise UserError("attention_window of a Longformer stays as it is; leave it out, or start from a RoBERTa")
        longformer, longformer_tokenizer = resize_longformer(source, tokenizer, length)
    else:
        longformer, longformer_tokenizer = convert_roberta_to_longformer(
            source, tokenizer, length, **longformer_settings
        )
    if target == "longformer":
        return longformer, longformer_tokenizer, source
    longformer.name_or_path = source.name_or_path
    return *convert_longformer_to_led(longformer, longformer_tokenizer, **settings), longformer


def _load_source(checkpoint: Checkpoint, architecture: str | None) -> PreTrainedModel:
    families = (*SOURCE_FAMILIES, "Longformer")
    wanted = architecture or next(iter(checkpoint.settings.get("architectures") or ()), None)
    model_class: Any = getattr(transformers, wanted, None) if wanted else None
    # a tokenizer or a configuration is no model
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if not is_model or not str(wanted).startswith(families):
        names = ", ".join([*SOURCE_FAMILIES.values(), "longformer"])
        raise UserError(f"architecture {wanted} of {checkpoint.name} cannot be converted; needed: a class of {names}")
    family = checkpoint.settings["model_type"]
    if model_class.config_class.model_type != family:
        raise UserError(
            f"architecture {wanted} does not load a {family} checkpoint; leave it out, or give a class of it"
        )
    config = load_config(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for a head that the checkpoint has not
        source, _ = load_model(checkpoint, model_class, config=config)
    check_that_it_runs(source, checkpoint.label)
    checked: PreTrainedModel = source
    return checked
