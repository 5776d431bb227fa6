"""How long a model takes with each of several attentions, measured in turn so that all of them meet the same machine."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder.evaluation.cost import peak_memory
from sparsefinder.executors.fastest_by_length import now
from sparsefinder.models.masked_lm import masked_logits

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """Something that a model is run with.

    Args:
        installed: Makes a context within which the model is as it is to be measured.
        batch: What it reads, ``(B, N)`` each.
        learns: Whether a training step is measured too.
    """

    installed: Callable[[], AbstractContextManager[Any]]
    batch: Batch
    learns: bool = True


def race(model: Any, contestants: Mapping[str, Contestant], rounds: int, step_rounds: int) -> dict[str, dict[str, Any]]:
    """Time whole passes, one of every contestant in each round; the first round warms up and does not count.

    Args:
        model: A masked language model in evaluation mode.
        contestants: By name.
        rounds: How often each passes forward.
        step_rounds: How often each passes forward and backward; 0 for never.

    Returns:
        For each name ``latency_ms`` and ``latency_spread_ms`` (median and interquartile range), ``peak_memory_mb`` of a forward
        pass (None where it cannot be measured), and ``step_ms``, the median time forward and backward (None where it was not
        measured).
    """
    forward: dict[str, list[float]] = {name: [] for name in contestants}
    steps: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            forward[name].append(_forward(model, contestant))
    for _ in range(step_rounds + 1 if step_rounds else 0):
        for name, contestant in contestants.items():
            if contestant.learns:
                steps[name].append(_step(model, contestant))
    return {
        name: {
            "latency_ms": 1e3 * statistics.median(forward[name][1:]),
            "latency_spread_ms": 1e3 * _spread(forward[name][1:]),
            "peak_memory_mb": _memory(model, contestant),
            "step_ms": 1e3 * statistics.median(steps[name][1:]) if steps[name] else None,
        }
        for name, contestant in contestants.items()
    }


@torch.inference_mode()
def _forward(model: Any, contestant: Contestant) -> float:
    inputs = {name: tensor.to(model.device) for name, tensor in contestant.batch.items() if name != "labels"}
    with contestant.installed():
        start = now(model.device)
        model(**inputs)
        return now(model.device) - start


def _step(model: Any, contestant: Contestant) -> float:
    batch = {name: tensor.to(model.device) for name, tensor in contestant.batch.items()}
    with contestant.installed():
        start = now(model.device)
        logits, labels = masked_logits(model, batch)
        nn.functional.cross_entropy(logits, labels).backward()
        seconds = now(model.device) - start
    model.zero_grad(set_to_none=True)
    return seconds


def _memory(model: Any, contestant: Contestant) -> float | None:
    give_back_memory()
    with peak_memory(model.device) as peak:
        _forward(model, contestant)
    return None if peak.bytes is None else peak.bytes / 1e6


def give_back_memory() -> None:
    """Hand what this process holds and does not use to the system, or the next peak begins above the ground."""
    with contextlib.suppress(OSError, AttributeError):  # of glibc alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    quarter = statistics.quantiles(times, n=4)
    return quarter[2] - quarter[0]
