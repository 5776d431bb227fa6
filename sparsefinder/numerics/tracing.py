"""Recording a model: `torch.export`, `torch.compile` and `torch.jit.trace` keep what is done to tensors, never why.

Where a choice depends on what a tensor holds (are there padding tokens?), a recorded run takes the way that is right for every
content, and the numbers are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether torch exports a model; of torch 2.6, which does not say so, also whether it compiles one."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def recorded() -> bool:
    """Whether the present run is recorded, so that no choice may depend on what a tensor holds."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def known(truth: Tensor) -> bool:
    """Whether `truth`, a bool tensor of one entry, is known to hold; never while a run is recorded."""
    return not recorded() and bool(truth)


@torch.compiler.assume_constant_result
def constant(make: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """Tensors that depend on numbers alone; a recorded run keeps them, and not that they were drawn.

    Args:
        make: A function of numbers that returns tensors.
        *arguments: What it is called with.

    Returns:
        ``make(*arguments)``.
    """
    if not recorded():
        return make(*arguments)
    with ThreadPoolExecutor(1) as elsewhere:  # runs are recorded on the thread that they are on
        return elsewhere.submit(make, *arguments).result()


def of_this_length(x: Tensor) -> Tensor:
    """The tensor itself; in a model that `torch.jit.trace` made, an error where N is not the one that it was traced with.

    Whether attention is dense or in blocks depends on N, and a trace remembers what it was. `torch.export` sees to it itself.

    Args:
        x: ``(B, N, …)``.

    Returns:
        ``x``.

    Raises:
        RuntimeError: In a traced model that is given another N.
    """
    if not torch.jit.is_tracing():
        return x
    checked: Tensor = _checker()(x, int(x.shape[1]))
    return checked


@cache
def _checker() -> Callable[[Tensor, int], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what it advises instead cannot be part of a trace
        made: Callable[[Tensor, int], Tensor] = torch.jit.script(_checked)
    return made


def _checked(x: Tensor, tokens: int) -> Tensor:
    if x.size(1) != tokens:
        raise RuntimeError(
            f"this LSG model was traced with {tokens} tokens; pad or cut the input of {x.size(1)} to them"
        )
    return x
