"""Several calls side by side in one run: warm-up, median, spread, peak memory.

Every round runs each call once, in the same order, so that what else the machine does falls on all of them; a ratio is the
median over rounds of that round's ratio. Freed memory stays with the process (glibc only): a call of the `entmax` package
hands 200 MB back to the system, and whoever came next would pay for getting them anew. Peak memory is what a call adds to
the resident memory of the process (Linux only).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Measured:
    """Seconds of each round, and bytes that a call adds at its peak (None where the system does not tell)."""

    seconds: list[float]
    peak: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def times(self) -> str:
        """Median and spread in milliseconds, as two cells of a Markdown table."""
        return f"{1e3 * self.median:,.1f} | {1e3 * min(self.seconds):,.1f} – {1e3 * max(self.seconds):,.1f}"

    @property
    def megabytes(self) -> str:
        """The peak as a cell of a table."""
        return "" if self.peak is None else f"{self.peak / 2**20:,.0f}"

    def faster_than(self, baseline: Measured) -> float:
        """How many times as fast, round by round."""
        return statistics.median(a / b for a, b in zip(baseline.seconds, self.seconds, strict=True))


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Measured]:
    """Warm up and find the peaks, then time every call once a round."""
    keep_freed_memory()
    peaks = {}
    for name, call in calls.items():
        call()  # compiles
        peaks[name] = peak_memory(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Measured(seconds[name], peaks[name]) for name in calls}


def keep_freed_memory() -> None:
    """Blocks below 32 MB, glibc's limit, come from the heap, and the heap does not shrink by itself."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that ``call`` adds to the resident memory at its peak; it is called all the same where that cannot be told."""
    before = _from_here()
    call()
    return None if before is None else _status("VmHWM") - before


def _from_here() -> int | None:
    """Forget the peak so far; the resident memory now."""
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls left would hide what the next one needs
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine() -> str:
    """Processor, threads, versions, and how busy the machine is already."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {sys.version.split()[0]}"
    return f"{cpu}, {threads}\nload average before: {os.getloadavg()[0]:.1f}"
