"""The folder ``conf`` and what other packages add to it: what can be chosen, every setting, and the names that people type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsefinder.errors import UserError, meant
from sparsefinder.experiment.named import CONF, installed, settings_of_installed

HYDRA: dict[str, Any] = {"version_base": "1.3", "config_path": str(CONF), "config_name": "config"}
FILES = {  # of each folder of conf, what can be chosen
    folder.name: [path.stem for path in sorted(folder.glob("*.yaml"))]
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
}


def groups() -> dict[str, list[str]]:
    """`FILES` with the names that other packages bring."""
    return {group: sorted({*names, *installed(group)}) for group, names in FILES.items()}


def tell_hydra(group: str, name: str) -> None:
    """Give Hydra what stands for a file of ``conf``, if another package brings it; a `UserError` where it cannot be used."""
    if name in installed(group):
        ConfigStore.instance().store(name, settings_of_installed(group, name), group, provider=name)


def settings_with(chosen: Sequence[str] = ()) -> list[str]:
    """The full names of all settings, with the files of conf that are ``chosen`` (``group=name``)."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return list(keys(OmegaConf.to_container(hydra.compose("config", overrides=list(chosen)))))
    except (HydraException, OmegaConfBaseException):  # what was chosen is unknown itself
        return settings_with() if chosen else []


def keys(node: Any, prefix: str = "") -> Iterable[str]:
    """The full name of every setting, at any depth."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key != "_target_":
            yield f"{prefix}{key}"
            yield from keys(value, f"{prefix}{key}.")


def refuse_unknown_keys(cfg: DictConfig) -> None:
    """``+key=value`` adds a key that nobody reads: an error, never a default."""
    known = {*OmegaConf.load(CONF / "config.yaml"), *(folder.name for folder in CONF.iterdir() if folder.is_dir())}
    unknown = [str(key) for key in cfg if key not in known]
    if unknown:
        raise UserError(
            f"there is no setting {', '.join(unknown)}; `--cfg job` shows all of them{meant(known, unknown[0])}"
        )


def as_typed(message: str, cfg: DictConfig) -> str:
    """With the names that the user types: ``target`` for ``calibrate.target``, which takes its value from there."""
    groups = {
        group: [OmegaConf.load(path) for path in (CONF / group).glob("*.yaml")] for group in ("pattern", "attention")
    }
    borrowed = {key: name for group, nodes in groups.items() for node in nodes for key, name in sources(node, group)}
    borrowed = {key: name for key, name in borrowed.items() if OmegaConf.select(cfg, key) is None} | dict(sources(cfg))
    for key, name in borrowed.items():
        message = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", name, message)
    return message


def sources(node: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """The settings that are interpolated, each with the one that it takes its value from."""
    unresolved: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in unresolved.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from sources(OmegaConf.create(value), name)
        elif isinstance(value, str) and (source := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            yield name, source[1]
