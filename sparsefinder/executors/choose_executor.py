"""Which executor does a piece of work: the one that was named, or with ``auto`` the first that can.

Every executor says itself what it cannot do and why (``why_not``). Whoever has several gives them in the order of preference.
As in flash-linear-attention's ``fla/ops/backends``, where each backend of an operation verifies its arguments and gives a
reason for what it rejects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from sparsefinder.errors import UserError, one_of
from sparsefinder.executors.workload import Work

AUTO = "auto"


class Executor(Protocol):
    """One way to do a kind of work."""

    @property
    def name(self) -> str:
        """What users type."""

    @property
    def never_automatic(self) -> str:
        """Why ``auto`` passes by even where this works; empty where it does not."""

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work, by what the machine lacks."""


E = TypeVar("E", bound=Executor)


def check(executors: Sequence[Executor], name: str) -> None:
    """Refuse a name before there is any work.

    Args:
        executors: all that there are, in the order of preference.
        name: one of theirs, or ``auto``.

    Raises:
        UserError: nobody has that name, or this machine lacks what that executor needs.
    """
    known = [executor.name for executor in executors]
    if name not in (AUTO, *known):
        raise UserError(f"executor={name} is unknown; {one_of((AUTO, *known), name)}")
    for executor in executors:
        if executor.name == name and (reason := executor.why_not(None)):
            raise UserError(f"executor={name}: {reason}, or choose {_others(executors, name, None)}")


def choose(executors: Sequence[E], name: str, work: Work) -> E:
    """The executor that does the work.

    Args:
        executors: all that there are, in the order of preference.
        name: one of theirs, or ``auto`` for the first that can.
        work: what is to be done.

    Raises:
        UserError: the one that was named, or with ``auto`` every one, cannot do this.
    """
    check(executors, name)
    for executor in executors:
        if name == AUTO:
            if not executor.never_automatic and not executor.why_not(work):
                return executor
        elif executor.name == name:
            if reason := executor.why_not(work):
                raise UserError(f"executor={name}: {reason}, or choose {_others(executors, name, work)}")
            return executor
    raise UserError(f"executor={AUTO} found none that can do this. {'; '.join(_lines(executors, name, work))}")


def explain(executors: Sequence[Executor], name: str, work: Work) -> str:
    """A line for each executor: chosen, or why not.

    Args:
        executors: all that there are, in the order of preference.
        name: one of theirs, or ``auto``.
        work: what is to be done.
    """
    return "\n".join(_lines(executors, name, work))


def _lines(executors: Sequence[Executor], name: str, work: Work) -> list[str]:
    lines, chosen = [], False
    for executor in executors:
        reason = executor.why_not(work)
        if not reason and name == AUTO:
            reason = executor.never_automatic or ("works, but comes later" if chosen else "")
        elif not reason and name != executor.name:
            reason = f"works, but executor={name} was asked for"
        chosen = chosen or not reason
        lines.append(f"{executor.name}: {reason or 'chosen'}")
    return lines


def _others(executors: Sequence[Executor], name: str, work: Work | None) -> str:
    """What to choose instead: those that work, or ``auto``."""
    working = [e.name for e in executors if e.name != name and not e.never_automatic and not e.why_not(work)]
    return " or ".join(f"executor={other}" for other in working or [AUTO])
