"""Names that people type: what to say where there is none of that name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_of(known: Iterable[str], given: object, words: str = "choose one of") -> str:
    """The ``known`` names after some ``words``, and which of them was probably meant by ``given``: the end of a message."""
    known = [str(name) for name in known]
    return f"{words} {', '.join(known)}{meant(known, given)}".lstrip()


def meant(known: Iterable[str], given: object, before: str = "") -> str:
    """``; did you mean kmeans?`` where one of the ``known`` names is close to ``given``; empty where none is.

    ``before``: what one types in front of the name, such as ``pattern=``.
    """
    near = closest(known, given)
    return "" if near is None else f"; did you mean {before}{near}?"


def closest(known: Iterable[str], given: object) -> str | None:
    """The one of the ``known`` names that is nearest to ``given``; None where it resembles none of them."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), lowered, n=1)
    return lowered[near[0]] if near else None
