"""The one exception that is meant for people: its message is all that they are shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: one clear line saying what came, what was needed and what to do next."""


def check_counts(stage: str, settings: object, *names: str) -> None:
    """A `UserError` for the first of the settings of a stage (``cluster``, ``evaluate.head``) that is below 1."""
    for name in names:
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"{stage}.{name} must be 1 or more, got {value}")


def one_of(known: Iterable[str], given: object, words: str = "choose one of") -> str:
    """The ``known`` names after some ``words``, and which of them was probably meant by ``given``: the end of a message."""
    known = [str(name) for name in known]
    return f"{words} {', '.join(known)}{meant(known, given)}".lstrip()


def meant(known: Iterable[str], given: object, before: str = "") -> str:
    """``; did you mean kmeans?`` where one of the ``known`` names is close to ``given``; empty where none is.

    Of ``finetune.steps`` and ``project.steps`` ``steps`` means both. ``before``: what one types in front of the name, such as
    ``pattern=``.
    """
    known = list(known)
    near = [name for name in known if name.endswith(f".{given}")] or closest(known, given)
    return f"; did you mean {' or '.join(f'{before}{name}' for name in near)}?" if near else ""


def closest(known: Iterable[str], given: object) -> list[str]:
    """The one of the ``known`` names that is nearest to ``given``; empty where it resembles none of them."""
    lowered, typed = {name.lower(): name for name in known}, str(given).lower()
    near = difflib.get_close_matches(typed, lowered, n=1)
    if not near and len(typed) > 2:  # a beginning
        near = [name for name in lowered if name.startswith(typed)]
    return [lowered[name] for name in near[:1]]
