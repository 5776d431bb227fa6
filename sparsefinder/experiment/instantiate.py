"""From plain settings to the object that they describe, checked against its declared types first."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Iterator
from typing import Any

from sparsefinder.errors import UserError, one_of
from sparsefinder.storage.moved_names import MOVED

PLAIN = (int, float, str, bool, type(None))
LARGEST = 2**63  # one more than torch takes
INFINITE = "or infinite"  # ``Annotated[float, "or infinite"]`` says of a field that infinity has a meaning there


def construct(kind: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """``kind(**values)``, or one clear line: a setting that it does not have, a value of another type or one that it refuses.

    ``prefix``: of the settings' names on the command line, such as ``model``; empty where there is none.
    """
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in values if name not in parameters]
    if unknown:
        raise UserError(
            f"{kind.__name__} has no setting {', '.join(unknown)}; {one_of(parameters, unknown[0], 'its settings are')}"
        )
    before = f"{prefix}." if prefix else ""
    for name, parameter in parameters.items():
        many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)  # *args, **kwargs: none is needed
        if name not in values and parameter.default is parameter.empty and not many:
            raise UserError(f"{before}{name} is missing, which {kind.__name__} needs: set {before}{name}=VALUE")
    hints, annotated = (typing.get_type_hints(kind, include_extras=extras) for extras in (False, True))
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            kinds = " or ".join(in_words(k) for k in choices(hints[name]))
            raise UserError(f"{before}{name} must be {kinds}, got {value!r}")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise UserError(f"{before}{name}={value} is too large: give a whole number below 2**63")
        if not_finite := [
            x for x in numbers(value) if math.isnan(x) or (math.isinf(x) and not infinite(annotated.get(name)))
        ]:
            raise UserError(f"{before}{name} must be a finite number, got {not_finite[0]}: set {before}{name}=NUMBER")
    try:
        return kind(**values)
    except UserError:
        raise
    except ValueError as error:  # of classes that are also used without files and settings, such as a normalizer
        raise UserError(str(error)) from error


def class_named(name: Any, prefix: str) -> Any:
    """The class, or any function with settings, of that name: ``sparsefinder.attention.Masked``; ``prefix`` as in `construct`."""
    try:
        kind = pkgutil.resolve_name(MOVED.get(str(name), str(name)))
        inspect.signature(kind)
    except Exception as error:  # whatever a module of somebody else raises while it is imported
        reason = " ".join(str(error).split())
        raise UserError(
            f"{prefix}._target_={name} cannot be used ({reason}): give the full name of a class, "
            "such as sparsefinder.attention.Masked"
        ) from error
    return kind


def numbers(value: Any) -> Iterator[float]:
    """Every floating-point number in a plain value, at any depth."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, collections.abc.Mapping):
        yield from (number for item in value.values() for number in numbers(item))
    elif isinstance(value, (list, tuple)):
        yield from (number for item in value for number in numbers(item))


def infinite(hint: Any) -> bool:
    """Whether a field of this type may be infinite."""
    return INFINITE in getattr(hint, "__metadata__", ())


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has one of the plain types of ``hint``; other types are their own class's business."""
    return any(_is(value, kind) for kind in choices(hint))


def _is(value: Any, kind: Any) -> bool:
    of = typing.get_origin(kind)
    within = [item for item in typing.get_args(kind) if item is not Ellipsis]
    if of in (list, tuple, collections.abc.Sequence):
        listed = isinstance(value, (list, tuple))
        return listed and (len(within) != 1 or all(fits(item, within[0]) for item in value))
    if of in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping) and all(fits(item, within[1]) for item in value.values())
    if kind in PLAIN:
        if isinstance(value, bool):
            return kind is bool
        return isinstance(value, kind) or (isinstance(value, int) and kind is float)
    has_settings = dataclasses.is_dataclass(kind) or getattr(kind, "_is_protocol", False)
    return not (has_settings and isinstance(value, PLAIN))  # a number where an object is needed


def in_words(kind: Any) -> str:
    """A type as the command line spells its values: ``null``, ``int``, ``a list of float``."""
    of, within = typing.get_origin(kind), typing.get_args(kind)
    if of in (list, tuple, collections.abc.Sequence):
        return f"a list of {' or '.join(in_words(option) for option in choices(within[0]))}"
    if of in (dict, collections.abc.Mapping):
        return f"a mapping {{{in_words(within[0])}: {' or '.join(in_words(option) for option in choices(within[1]))}}}"
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))


def choices(hint: Any) -> tuple[Any, ...]:
    """``int | None`` → ``(int, NoneType)``."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
