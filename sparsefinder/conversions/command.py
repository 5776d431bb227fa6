"""From the name of a checkpoint to a folder with the converted model: what the command line calls."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from sparsefinder import hub
from sparsefinder.conversions.bigbird import convert_roberta_to_bigbird
from sparsefinder.conversions.certificate import Certificate, refuse_existing
from sparsefinder.conversions.led import convert_longformer_to_led
from sparsefinder.conversions.longformer import convert_roberta_to_longformer, resize_longformer
from sparsefinder.conversions.nystromformer import convert_roberta_to_nystromformer
from sparsefinder.conversions.proof import save
from sparsefinder.conversions.sources import SOURCE_FAMILIES
from sparsefinder.models import gaps
from sparsefinder.names import one_of
from sparsefinder.store import UserError

logger = logging.getLogger(__name__)

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
    """Load `initial_model` (a name or a folder), convert it to `target`, save it with its certificate in `model_name`.

    `architecture` names the class to load; by default the one that the checkpoint names. `settings` are arguments of
    the target's function, e.g. `{"attention_window": 256}`. A Longformer as source is resized for `longformer`, and
    lengthened first for `led` if need be; a RoBERTa becomes a Longformer on its way to `led`. A head (or pooler) that the
    checkpoint has not is drawn from a fixed seed, and named in the log.

    Raises `UserError` for an existing folder, a checkpoint that cannot be loaded or lacks other weights, an unknown
    target, architecture or setting, and for everything that the conversions refuse.
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
    source = _load_model(initial_model, architecture)
    tokenizer = _load("tokenizer", initial_model, AutoTokenizer.from_pretrained)
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


def _load_model(name: str, architecture: str | None) -> PreTrainedModel:
    config = _load("configuration", name, AutoConfig.from_pretrained)
    families = (*SOURCE_FAMILIES, "Longformer")
    wanted = architecture or next(iter(config.architectures or ()), None)
    found: Any = getattr(transformers, wanted, None) if wanted else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)  # and no tokenizer or configuration
    if not is_model or not str(wanted).startswith(families):
        names = ", ".join([*SOURCE_FAMILIES.values(), "longformer"])
        raise UserError(f"architecture {wanted} of {name} cannot be converted; needed: a class of {names}")
    if found.config_class.model_type != config.model_type:
        raise UserError(
            f"architecture {wanted} does not load a {config.model_type} checkpoint; leave it out, or give a class of it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for a head that the checkpoint has not
        model, report = _load("weights", name, found.from_pretrained, output_loading_info=True)
    _check_weights(model, {*report["missing_keys"]}, name)
    checked: PreTrainedModel = model
    return checked


def _check_weights(model: PreTrainedModel, missing: set[str], name: str) -> None:
    """Name the head or pooler that a checkpoint lacks as a whole in the log; raises `UserError` for any other gap."""
    if wrong := gaps(model, missing):
        raise UserError(
            f"{name} lacks {len(wrong)} weights of a {type(model).__name__}, the first is {wrong[0]}; it is damaged or of "
            "another architecture"
        )
    if missing:
        logger.warning("%s has no %s: drawn anew, train them", name, ", ".join(sorted(missing)))


def _load(what: str, name: str, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(name, local_files_only=Path(name).is_dir() or not hub.reachable(), **options)
    except Exception as error:  # OSError, ValueError, SafetensorError, JSON errors: the loaders have no common type
        raise UserError(f"no {what} can be loaded from {name} ({hub.in_words(error)})") from error
