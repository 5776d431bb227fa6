"""The table of the stage ``calibrate``: which pattern has which value in which head, and patterns as it sets them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration, Dials
from sparsefinder.experiment.targets import whole_numbered

log = logging.getLogger(__name__)


def calibrated(configurations: Iterable[Configuration], folder: Path | str, target: str) -> tuple[Configuration, ...]:
    """Each pattern of ``configurations`` at its calibrated values; once for each set of local and global tokens.

    Patterns without a sparsity parameter are left out, and so are those that were not calibrated, which the log says.

    Args:
        configurations: patterns with their local and global tokens.
        folder: ``calibration/`` of a run.
        target: what the values must have been chosen for, such as ``density=0.1``.

    Returns:
        The configurations with a value for each layer and head.

    Raises:
        UserError: for a folder without a calibration, or with one for another target.
    """
    folder = Path(folder)
    path = folder / "dials.parquet"
    if not path.is_file():
        raise UserError(f"{folder} holds no dials.parquet: give a folder made by stage=calibrate with calibration=PATH")
    table = pd.read_parquet(path)
    if set(table["target"]) - {target}:
        raise UserError(
            f"{folder} was made for target={table['target'].iloc[0]}, not {target}: run stage=calibrate first"
        )
    names = list(_KEY)
    table[names] = table[names].astype(object).where(table[names].notna(), None)
    groups = {
        _comparable(dict(zip(names, key, strict=True))): group
        for key, group in table.groupby(names, dropna=False, sort=False)
    }
    chosen: dict[Any, Configuration] = {}
    for configuration in configurations:
        if configuration.pattern.sparsity_parameter is None or (key := _comparable(key_of(configuration))) in chosen:
            continue
        if key not in groups:
            log.warning("%s has no calibration with these settings: run stage=calibrate", configuration.name)
            continue
        kind = int if whole_numbered(configuration.pattern) else float
        grid = groups[key].pivot(index="layer", columns="head", values="value")
        values = tuple(tuple(kind(value) for value in row) for row in grid.to_numpy())
        chosen[key] = replace(configuration, dials=Dials(target, values))
    return tuple(chosen.values())


_KEY = ("pattern", "settings", "window", "global_tokens", "last_token", "block_size")


def key_of(configuration: Configuration) -> dict[str, Any]:
    """What a calibration belongs to: a pattern without its sparsity parameter, and its local and global tokens."""
    pattern = configuration.pattern
    own = {
        field.name: getattr(pattern, field.name)
        for field in dataclasses.fields(pattern)
        if field.name != pattern.sparsity_parameter and field.name not in configuration.needs
    }
    values = (configuration.name, json.dumps(own, sort_keys=True), configuration.window or 0)
    tokens = (configuration.global_tokens, configuration.last_token, configuration.block_size)
    return dict(zip(_KEY, (*values, *tokens), strict=True))


def _comparable(key: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key as it can be compared after a way through a file."""
    return tuple(value if isinstance(value, str) else int(value) for value in key.values())
