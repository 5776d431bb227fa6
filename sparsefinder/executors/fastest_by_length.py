"""From which length on one way of attending is faster than another: raced once on this machine, and kept in a file.

Who wins depends on the machine, on the shape and on what was learned, so it is measured, on the very vectors that are to be
attended with, cut to one of a few lengths (`LENGTHS`). What is known is a bracket: a length at which the second way lost, and a
longer one at which it won. Whatever lies outside is settled; a length inside is raced the first time that somebody meets it. No
answer is ever changed, so the same text is attended in the same way from then on.

The file is ``crossovers.json`` in the cache folder (``~/.cache/sparsefinder``, ``$XDG_CACHE_HOME/sparsefinder``), or what the
environment variable ``SPARSEFINDER_CROSSOVERS`` names. Remove it to have everything measured again. Where it cannot be written,
answers live as long as the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from sparsefinder.storage.files import cache_folder, write_text

FILE = "SPARSEFINDER_CROSSOVERS"
# tokens; below the first the dense way is taken unasked
LENGTHS = tuple(int(scale * 2**power) for power in range(7, 21) for scale in (1, 1.5))
_FIRST = 1024  # raced before anything longer: whoever wins there need not be raced where that takes seconds
_ROUNDS = 3
_MARGIN = 0.95  # time of the winner, in that of the dense way: noise must not choose
_PATIENCE = 120.0  # seconds to wait for another process that measures

Race = Callable[[int], tuple[float, float]]
"""Tokens → seconds of the dense and of the sparse way."""


@dataclass(frozen=True)
class Bracket:
    """What is known: at ``slower`` tokens and fewer the sparse way does not pay, at ``faster`` and more it does."""

    slower: int = 0
    faster: float = math.inf

    def pays(self, tokens: int) -> bool | None:
        """Whether the sparse way pays for a text of so many tokens; None where that must be raced."""
        length = raced_at(tokens)
        if length <= self.slower:
            return False
        return True if length >= self.faster else None

    def with_race(self, tokens: int, race: Race) -> Bracket:
        """After the races that settle a text of so many tokens, the cheapest first."""
        known = self
        while known.pays(tokens) is None:
            length = min(raced_at(tokens), max(_FIRST, _next(known.slower)))
            dense, sparse = race(length)
            won = sparse < _MARGIN * dense
            known = Bracket(known.slower, length) if won else Bracket(length, known.faster)
        return known

    def __str__(self) -> str:
        parts = [f"not up to {self.slower:,} tokens"] if self.slower else []
        parts += [f"from {self.faster:,} tokens on"] if self.faster < math.inf else []
        return ", ".join(parts) or "not measured yet"


def raced_at(tokens: int) -> int:
    """The length that a text of so many tokens is judged by: the longest of `LENGTHS` that it has; 0 below all."""
    index = bisect_right(LENGTHS, tokens)
    return LENGTHS[index - 1] if index else 0


def _next(length: int) -> int:
    return LENGTHS[min(bisect_right(LENGTHS, length), len(LENGTHS) - 1)]


_known: dict[tuple[Path, str], Bracket] = {}  # of this process


def known(key: str) -> Bracket:
    """What was measured about ``key``, by this process or by others before its first question."""
    path = file()
    if (path, key) not in _known:
        _known[path, key] = _bracket(_read(path).get(key))
    return _known[path, key]


def settled(key: str, tokens: int, race: Race) -> Bracket:
    """What is known about ``key`` once a text of so many tokens is settled; nobody else races meanwhile."""
    if known(key).pays(tokens) is not None:
        return known(key)
    path = file()
    with _alone(path):
        before = _bracket(_read(path).get(key)) if path.exists() else known(key)
        after = before.with_race(tokens, race)
        if after != before:
            with contextlib.suppress(OSError):  # no home, not writable, full
                write_text(path, json.dumps({**_read(path), key: [after.slower, _finite(after.faster)]}, indent=1))
    _known[path, key] = after
    return after


def file() -> Path:
    """Where answers are kept."""
    if named := os.environ.get(FILE):
        return Path(named)
    try:
        return cache_folder() / "crossovers.json"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "sparsefinder" / "crossovers.json"


def fingerprint(x: Any) -> str:
    """A short name for a pattern's settings and what it learned: the same for equal ones, whatever they are called.

    A wrapper that says that it is ``transparent``, such as a stopwatch around a pattern, has the name of what it wraps.
    """
    digest = hashlib.sha256()
    for part in _parts(x):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _parts(x: Any) -> Iterator[bytes]:
    if isinstance(x, Tensor):
        values = x.detach().cpu().contiguous()
        yield f"{values.dtype} {tuple(values.shape)}".encode()
        yield values.flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(x, nn.Module):
        yield type(x).__name__.encode()
        yield from _parts(x.state_dict())
    elif isinstance(x, Mapping):
        for name, value in x.items():
            yield str(name).encode()
            yield from _parts(value)
    elif isinstance(x, (list, tuple)):
        yield str(len(x)).encode()
        for value in x:
            yield from _parts(value)
    elif getattr(x, "transparent", False):
        yield from _parts(x.pattern)
    elif hasattr(x, "__dict__") and not isinstance(x, type):
        yield type(x).__name__.encode()
        yield from _parts({name: value for name, value in vars(x).items() if not name.startswith("_")})
    else:
        yield repr(x).encode()


def timed(device: torch.device, dense: Callable[[], object], sparse: Callable[[], object]) -> tuple[float, float]:
    """Seconds of both, the least of a few rounds in turn, after one that warms up."""
    calls, seconds = (dense, sparse), [math.inf, math.inf]
    for call in calls:
        call()
    for _ in range(_ROUNDS):
        for which, call in enumerate(calls):
            start = now(device)
            call()
            seconds[which] = min(seconds[which], now(device) - start)
    return seconds[0], seconds[1]


def now(device: torch.device) -> float:
    """Seconds, after everything that was sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _alone(path: Path) -> Any:
    """Two that race at once slow each other down. Where there can be no lock, or it takes too long, without."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, Timeout):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock"), timeout=_PATIENCE))
        yield


def _read(path: Path) -> dict[str, Any]:
    """The content, whatever the file holds: what cannot be read is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _bracket(value: Any) -> Bracket:
    match value:
        case [int(slower), int(faster)] if 0 <= slower < faster:
            return Bracket(slower, faster)
        case [int(slower), None] if slower >= 0:
            return Bracket(slower)
    return Bracket()


def _finite(length: float) -> int | None:
    return None if math.isinf(length) else int(length)
