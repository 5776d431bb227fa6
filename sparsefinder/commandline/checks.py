"""Whether a command line can be meant, before anything is run: every job that it asks for is composed once."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Sequence

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sparsefinder.commandline.composition import path_of
from sparsefinder.commandline.conf_folder import CONF, FILES, groups, refuse_unknown_keys, settings_with, tell_hydra
from sparsefinder.commandline.messages import one_line
from sparsefinder.commandline.overrides import Typed
from sparsefinder.errors import UserError, meant
from sparsefinder.storage import sweep_points
from sparsefinder.storage.sweep_points import Point

PLUGINS = {  # what a launcher is installed with
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}


def check(typed: Typed) -> list[Point]:
    """Compose every job of the command line once, so that a mistake is one line and not a page of Hydra's.

    Returns the points of a sweep, none without ``-m``.
    """
    use_own_launchers()
    overrides = [override_of(text) for text in typed.settings]
    check_launcher(overrides, typed.sweeps)
    alternatives = [expanded(override) for override in overrides] if typed.sweeps else [[s] for s in typed.settings]
    for choice in {choice for choices in alternatives for choice in choices}:
        tell_hydra(*choice.split("=", 1))
    swept = [choices[0].partition("=")[0] for choices in alternatives if len(choices) > 1]
    todo = []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for chosen in itertools.product(*alternatives):
                cfg = hydra.compose("config", overrides=list(chosen))  # a list of values is Hydra's to refuse
                refuse_unknown_keys(cfg)
                if typed.sweeps:
                    todo.append(sweep_points.point_of(path_of(cfg, "run_dir"), chosen, swept))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises the last for corpus=null
        message = one_line(error)
        if unknown := re.match(r"there is no setting ([^;]*);", message):
            files = [text for text in typed.settings if text.partition("=")[0] in FILES and "," not in text]
            message += meant(settings_with(files), unknown[1])
        elif group := re.match(r"(\w+)=(\S+) is unknown;", message):
            message += meant(groups().get(group[1], ()), group[2])
        raise UserError(message) from error
    if any(not point.settings for point in todo) and not typed.asks:
        raise UserError(
            "-m starts a run for each value of a setting, and none is given: write -m pattern=kmeans,distance, or leave out -m"
        )
    return todo


def override_of(text: str) -> Override:
    """One setting, read by Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        raise UserError(f"{key}={value} cannot be read: put the value in quotes, {key}=\"'…'\"") from error


def expanded(override: Override) -> list[str]:
    """``pattern=kmeans,distance`` → one override for each value, spelled as Hydra's sweeper does."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if key in ("stage", "hydra/launcher"):
        raise UserError(
            f"{override.input_line}: nothing to sweep over; several stages are a list, stage=[score,evaluate]"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def use_own_launchers() -> None:
    """Forget the defaults of the launchers' plugins: those of conf/hydra/launcher stand in their place."""
    Plugins.instance()  # looks for plugins, which enter their defaults
    known = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in PLUGINS:
        known.pop(f"{name}.yaml", None)


def check_launcher(overrides: Sequence[Override], sweeping: bool) -> None:
    """A launcher is an option of a sweep, and joblib's and submitit's are installed apart."""
    for override in overrides:
        if override.get_key_element().startswith("hydra/launcher"):
            name = str(override.value())
            if not sweeping:
                raise UserError(f"hydra/launcher={name} is for sweeps: add -m")
            try:
                importlib.metadata.distribution(PLUGINS.get(name, "hydra-core"))
            except importlib.metadata.PackageNotFoundError as error:
                raise UserError(
                    f"hydra/launcher={name} is not installed: pip install 'sparsefinder[launchers]'"
                ) from error
