"""What the commands share: the name they go by, one line for wrong arguments, and what a signal does to them."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sparsefinder.errors import UserError, meant

STOPPING = (signal.SIGINT, signal.SIGTERM)


def program() -> str:
    """What one types to start this program again: ``sparsefinder``, or ``python scripts/run.py``."""
    started = Path(sys.argv[0])
    return f"python {started.parent.name}/{started.name}" if started.suffix == ".py" else started.name


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, and which one was meant; nothing is abbreviated."""

    def __init__(self, description: str | None):
        super().__init__(
            prog=program(),
            description=re.sub(r"python scripts/\w+\.py", program(), description or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """The end, with status 2."""
        unknown = re.search(r"unrecognized arguments: (-\S+)", message)
        near = meant(self._option_string_actions, unknown[1].partition("=")[0]) if unknown else ""
        self.exit(2, f"error: {message}{near or '; --help lists them'}\n")


def until_stopped(work: Callable[[], int], advice: str) -> int:
    """The exit status of ``work``; where Ctrl-C or SIGTERM ends it, one line with ``advice``, and 128 + the signal's number.

    An empty ``advice`` leaves the line out.

    Whatever ``work`` makes of the interruption, an error of its own included, it counts as one. A second signal ends the
    process at once. Signals that somebody else handles, or ignores, stay theirs.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    ours = {}
    if threading.current_thread() is threading.main_thread():  # nobody else may
        ours = {n: signal.getsignal(n) for n in STOPPING}
        ours = {n: handler for n, handler in ours.items() if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in ours:
        signal.signal(number, stop)
    status = 0
    try:
        status = work()
    except KeyboardInterrupt:
        received = received or [signal.SIGINT]
    except Exception:
        if not received:
            raise
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    if not received:
        return status
    if advice:
        print(f"error: interrupted by {signal.Signals(received[0]).name}; {advice}", file=sys.stderr)
    return 128 + received[0]


def in_one_line(work: Callable[[], None], advice: str) -> int:
    """`until_stopped`; 0 when all went well, 2 and one line with the program's name where a `UserError` ends it."""

    def outcome() -> int:
        try:
            work()
        except UserError as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            return 2
        return 0

    return until_stopped(outcome, advice)
