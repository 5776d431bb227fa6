"""From plain settings to the object that they describe, checked against its declared types first."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from sparsefinder.store import UserError


def construct(kind: Any, values: dict[str, Any]) -> Any:
    """``kind(**values)``, or one clear line: a setting that it does not have, a value of another type or one that it refuses."""
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in values if name not in parameters]
    if unknown:
        raise UserError(
            f"{kind.__name__} has no setting {', '.join(unknown)}; its settings are {', '.join(parameters)}"
        )
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            kinds = " or ".join("null" if k is type(None) else k.__name__ for k in choices(hints[name]))
            raise UserError(f"{name} must be {kinds}, got {value!r}")
    try:
        return kind(**values)
    except UserError:
        raise
    except ValueError as error:  # of classes that are also used without files and settings, such as a normalizer
        raise UserError(str(error)) from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has one of the plain types of ``hint``; other types are their own class's business."""
    kinds = choices(hint)
    if not all(kind in (int, float, str, bool, type(None)) for kind in kinds):
        return True
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kinds)) or (isinstance(value, int) and float in kinds)


def choices(hint: Any) -> tuple[Any, ...]:
    """``int | None`` → ``(int, NoneType)``."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
