"""Load an LSG checkpoint, ours or one that the published converter saved, by the class that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsefinder.errors import UserError
from sparsefinder.lsg.configuration import config_class
from sparsefinder.lsg.families import Family, architecture_of, family_of, plain_class
from sparsefinder.lsg.modeling import model_class
from sparsefinder.models.checkpoints import Checkpoint, load_model, open_checkpoint

IGNORED = ("auto_map", "base_model_prefix", "model_type")
"""Entries of a `config.json` that point to the code it was saved with."""

_WORDS = "model.decoder.embed_tokens.weight"
_FOR_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(path: str | Path, *, architecture: str | None = None, **kwargs: Any) -> Any:
    """An LSG model, ours or one that the published converter saved.

    Args:
        path: a folder or a name on the hub.
        architecture: its class, by default the one that the checkpoint names (`LSGRobertaForMaskedLM`); it may also be a plain
            class of the family (`RobertaForSequenceClassification`).
        **kwargs: settings of the configuration, which they override (`num_global_tokens=16, block_size=64,
            sparsity_type="none"`); everything else goes to transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: for something that is not an LSG checkpoint, an unsupported architecture and wrong settings.
    """
    checkpoint = open_checkpoint(path, **{name: kwargs[name] for name in _FOR_THE_HUB if name in kwargs})
    raw = checkpoint.settings
    if not is_lsg(raw):
        raise UserError(f"{path} is no LSG checkpoint but a plain {raw['model_type']!r}; convert it first")
    family = family_of(raw["model_type"])
    named = architecture or next(iter(raw.get("architectures") or ()), None)
    made = config_class(family)
    settings = {name: value for name, value in raw.items() if name not in IGNORED}
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if _is_setting(made, raw, name)}
    if "num_labels" in overrides:
        settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    config = check_config(made, {**settings, **overrides})
    cls = model_class(f"LSG{architecture_of(family, named)}")
    return load(checkpoint, cls, family, config=config, **kwargs)


def load(checkpoint: Checkpoint, cls: Any, family: Family, *, makes_globals: bool = False, **options: Any) -> Any:
    """A model out of a checkpoint, as `load_model` does it, with its words.

    A decoder alone, out of a checkpoint that has the words once for both sides, gets them from there: transformers would draw
    them anew.

    Args:
        checkpoint: an opened folder or name on the hub.
        cls: class of the model, plain or LSG.
        family: its family.
        makes_globals: the checkpoint may lack the global tokens.
        **options: for `load_model`.

    Returns:
        The model, in evaluation mode.
    """
    copied = (_WORDS, "lm_head.weight") if family.encoder_decoder else ()

    def may_lack(key: str) -> bool:
        return key in copied or (makes_globals and "global_embeddings" in key)

    model, new = load_model(checkpoint, cls, may_lack=may_lack, **options)
    if _WORDS in new:
        base = model_class(f"LSG{family.base}") if type(model).__name__.startswith("LSG") else plain_class(family.base)
        whole, _ = load_model(checkpoint, base, may_lack=may_lack, **options)
        model.get_input_embeddings().weight.data.copy_(whole.shared.weight.data)
    return model


def check_config(made: Any, settings: dict[str, Any]) -> Any:
    """A configuration of class `made`, whose LSG settings are sound. Raises `UserError` for others, in one line."""
    try:
        config = made(**settings)
        config.lsg_attention()
    except UserError:
        raise
    except (
        Exception
    ) as error:  # transformers' own checks of types have an error that is neither TypeError nor ValueError
        raise UserError(f"configuration of {made.__name__}: {' '.join(str(error).split())}") from error
    return config


def is_lsg(raw: dict[str, Any]) -> bool:
    """Whether the content of a `config.json` is that of an LSG model, ours or a published one."""
    architectures = raw.get("architectures") or []
    return (
        str(raw.get("model_type")).startswith("lsg-")
        or raw.get("base_model_prefix") == "lsg"
        or any(name.startswith("LSG") for name in architectures)
    )


def _is_setting(made: Any, raw: dict[str, Any], name: str) -> bool:
    """Whether a keyword belongs to the configuration, and not to transformers' loading."""
    if name in ("dtype", "torch_dtype"):
        return False
    # the second is one of those that transformers' configurations do not declare
    return (
        name in ("num_labels", "gradient_checkpointing")
        or name in made.__dataclass_fields__
        or name in made.attribute_map
        or name in raw
    )
