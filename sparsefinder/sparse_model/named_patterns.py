"""Patterns by their names, without Hydra: those of ``conf/pattern``, and those of other packages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparsefinder.errors import UserError
from sparsefinder.experiment import named
from sparsefinder.experiment.instantiate import construct


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
        given: A name in ``conf/pattern`` or of an installed package, or a pattern of a class that is there.
        alpha: Of the entmax that patterns assume whose threshold or support they estimate; 1.5 where the model has softmax.
        seed: Of patterns that draw.

    Raises:
        UserError: For a name that is not there, and an object of another class.
    """
    values = {"alpha": alpha if alpha > 1 else 1.5, "seed": seed, "causal": False}
    if isinstance(given, str):
        kind, settings, sweep = named.filled("pattern", given, values)
        return NamedPattern(given, construct(kind, settings, "pattern"), sweep)
    others = named.installed("pattern")
    for name in sorted(
        named.names("pattern"), key=others.__contains__
    ):  # our own first: they need no package of others
        if _class_of(name) is type(given):
            return NamedPattern(name, given, named.filled("pattern", name, values)[2])
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


def _class_of(name: str) -> Any:
    """The class of a pattern by its name."""
    return named.filled("pattern", name, {"alpha": 1.5, "seed": 0, "causal": False})[0]
