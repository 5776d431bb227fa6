"""Load an LSG checkpoint, ours or one that the published converter saved, by the class that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from sparsefinder.lsg.configuration import config_class
from sparsefinder.lsg.families import architecture_of, family_of
from sparsefinder.lsg.modeling import model_class
from sparsefinder.store import UserError
from sparsefinder.transformers_internals import cached_file

IGNORED = ("auto_map", "base_model_prefix", "model_type")
"""Entries of a `config.json` that point to the code it was saved with."""

_FOR_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(path: str | Path, *, architecture: str | None = None, **kwargs: Any) -> Any:
    """The model in `path` (a folder or a name on the hub), in evaluation mode.

    The class is that of `architecture`, or the one that the checkpoint names (`LSGRobertaForMaskedLM`); it may also be a
    plain class of the family (`RobertaForSequenceClassification`). Settings of the configuration can be overridden by name
    (`num_global_tokens=16, block_size=64, sparsity_type="none"`), everything else goes to transformers' `from_pretrained`.
    Raises `UserError` for something that is not an LSG checkpoint, an unsupported architecture and wrong settings.
    """
    raw = read_config(path, {name: kwargs[name] for name in _FOR_THE_HUB if name in kwargs})
    if not is_lsg(raw):
        raise UserError(f"{path} is no LSG checkpoint but a plain {raw.get('model_type')!r}; convert it first")
    family = family_of(raw.get("model_type"))
    named = architecture or next(iter(raw.get("architectures") or ()), None)
    made = config_class(family)
    settings = {name: value for name, value in raw.items() if name not in IGNORED}
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if _is_setting(made, raw, name)}
    if "num_labels" in overrides:
        settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    config = check_config(made, {**settings, **overrides})
    return model_class(f"LSG{architecture_of(family, named)}").from_pretrained(path, config=config, **kwargs)


def check_config(made: Any, settings: dict[str, Any]) -> Any:
    """A configuration of class `made`, whose LSG settings are sound. Raises `UserError` for others, in one line."""
    try:
        config = made(**settings)
        config.lsg_attention()
    except UserError:
        raise
    except (TypeError, ValueError) as error:
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


def read_config(path: str | Path, hub: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`. Raises `UserError` where there is none."""
    try:
        file = cached_file(str(path), "config.json", **(hub or {}))
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"no model at {path}: a folder with a config.json, or a name on the hub, is needed") from error
    if not isinstance(content, dict):
        raise UserError(f"config.json of {path} does not hold the settings of a model")
    return content


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' reports of missing and unexpected weights off the screen."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _is_setting(made: Any, raw: dict[str, Any], name: str) -> bool:
    """Whether a keyword belongs to the configuration, and not to transformers' loading."""
    if name in ("dtype", "torch_dtype"):
        return False
    return name == "num_labels" or name in made.__dataclass_fields__ or name in made.attribute_map or name in raw
