"""Patterns by the names of their files in ``conf/pattern``, without Hydra."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sparsefinder.errors import UserError, one_of
from sparsefinder.experiment.instantiate import class_named, construct

_PACKAGE = Path(__file__).resolve().parent.parent
_CONF = (
    _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
)  # installed, or in the repository


@dataclass(frozen=True)
class NamedPattern:
    """A pattern without what it learns.

    Args:
        name: Of its file in ``conf/pattern``.
        pattern: A pattern dataclass.
        sweep: Values of its sparsity parameter to measure; empty where it has none.
    """

    name: str
    pattern: Any
    sweep: tuple[Any, ...]


def named_pattern(given: Any, alpha: float, seed: int) -> NamedPattern:
    """The pattern that somebody asked for.

    Args:
        given: A name in ``conf/pattern``, or a pattern of a class that is there.
        alpha: Of the entmax that patterns assume whose threshold or support they estimate; 1.5 where the model has softmax.
        seed: Of patterns that draw.

    Raises:
        UserError: For a name that is not there, and an object of another class.
    """
    if isinstance(given, str):
        settings = settings_of(given)
        values = {"alpha": alpha if alpha > 1 else 1.5, "seed": seed}
        plain = {name: _filled(value, values) for name, value in settings.items() if name not in ("_target_", "sweep")}
        return NamedPattern(given, construct(_class_of(given), plain, "pattern"), tuple(settings.get("sweep") or ()))
    for name in names():
        if type(given) is _class_of(name):
            return NamedPattern(name, given, tuple(settings_of(name).get("sweep") or ()))
    raise UserError(
        f"pattern={given!r:.80} is none of conf/pattern: give a name such as 'routed', or an object of such a class"
    )


def restored(name: str, settings: dict[str, Any]) -> Any:
    """The pattern of that name with these settings, which come from a file.

    Raises:
        UserError: For a name that is not there and settings that the pattern does not have.
    """
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return construct(_class_of(name), settings, "pattern")


def plain_settings(pattern: Any) -> dict[str, Any]:
    """The settings of a pattern without what it learned, as JSON can hold them."""
    names = [field.name for field in dataclasses.fields(pattern) if field.name not in pattern.needs]
    return {name: getattr(pattern, name) for name in names}


@cache
def names() -> tuple[str, ...]:
    """What there is in ``conf/pattern``."""
    return tuple(
        path.stem for path in sorted((_CONF / "pattern").glob("*.yaml")) if "every" not in settings_of(path.stem)
    )


@cache
def settings_of(name: str) -> dict[str, Any]:
    """The file of that name; a `UserError` where there is none."""
    path = _CONF / "pattern" / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        raise UserError(f"pattern={name} is unknown; {one_of(names(), name)}")
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings


def _class_of(name: str) -> Any:
    settings = settings_of(name)
    if "_target_" not in settings:
        raise UserError(f"pattern={name} is not one pattern; {one_of(names(), name)}")
    return class_named(settings["_target_"], "pattern")


def _filled(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, str) and value.startswith("${"):
        return values[value[2:-1]]
    return tuple(value) if isinstance(value, list) else value
