"""What a computation costs: time, and the memory it needs at its peak."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsefinder.executors.fastest_by_length import now
from sparsefinder.graphs import QK, Layout

_STATM = Path("/proc/self/statm")  # Linux only; elsewhere peak memory on the CPU is not measured


@dataclass
class Peak:
    """Bytes above the start of the block; None where they cannot be measured."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device, every: float = 0.002) -> Iterator[Peak]:
    """Peak memory of a block: the allocator's own figure on CUDA, else resident memory looked at ``every`` seconds.

    On the CPU this is a lower bound: memory that the process already held and reuses is not seen.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    if not _STATM.exists():
        yield peak
        return
    start, highest, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            highest[0] = max(highest[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        highest[0] = max(highest[0], _resident())
        done.set()
        watcher.join()
        peak.bytes = max(0, highest[0] - start)


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Stopwatch:
    """A pattern that lets another one work and adds up the seconds it takes: the predictor's own share of the time."""

    pattern: Any
    seconds: float = 0.0

    transparent: ClassVar[bool] = True  # to `sparsefinder.executors.fastest_by_length.fingerprint`

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """As the pattern."""
        graph: Tensor = self._timed(self.pattern, qk, layer)
        return graph

    def layout(self, qk: QK, layer: int) -> Layout:
        """As the pattern."""
        layout: Layout = self._timed(self.pattern.layout, qk, layer)
        return layout

    def _timed(self, function: Any, qk: QK, layer: int) -> Any:
        start = now(qk.q.device)
        result = function(qk, layer)
        self.seconds += now(qk.q.device) - start
        return result
