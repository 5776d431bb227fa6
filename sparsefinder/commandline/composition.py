"""From a composed configuration to the objects that its ``_target_``s name.

`hydra.utils.instantiate` would build them too, but it passes values on as they are: ``rounds=four`` would fail deep inside a
stage. Here every field is checked against its declared type first, and named as the command line spells it
(`sparsefinder.experiment.instantiate`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsefinder.errors import UserError
from sparsefinder.experiment.instantiate import class_named, construct


def build(node: DictConfig, **extra: Any) -> Any:
    """The object that ``_target_`` names, from the inside out; fields are checked against their declared types first."""
    name = node._get_full_key(None)  # corpus, wherever it is interpolated: what the command line calls it
    values = {str(key): built(node[key]) for key in node if key != "_target_"}
    return construct(class_named(node.get("_target_"), name), {**values, **extra}, name)


def built(value: Any) -> Any:
    """What stands in a field of a configuration, with objects for all that has a ``_target_``."""
    if OmegaConf.is_dict(value):
        return build(value) if "_target_" in value else {key: built(value[key]) for key in value}
    return [built(item) for item in value] if OmegaConf.is_list(value) else value


def plain(node: Any) -> Any:
    """Lists, dictionaries and scalars, resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def without(node: Any, key: str) -> Any:
    """A copy of a configuration without one of its keys, its interpolations intact."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    copy.pop(key, None)
    return copy


def path_of(cfg: DictConfig, key: str) -> Path:
    """A path of the configuration. A number is a name like any other: ``run_dir=2024`` is the folder 2024."""
    value = cfg[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        needed = "a folder is needed, in which everything of the run will lie"
        raise UserError(
            f"{key}={value}: {needed if key == 'run_dir' else 'the path of an artefact is needed, or null'}"
        )
    return Path(str(value))
