"""Recording a model: `torch.export`, `torch.compile` and `torch.jit.trace` keep what is done to tensors, never why.

Where a choice depends on what a tensor holds (are there padding tokens?), a recorded run takes the way that is right for every
content, and the numbers are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recorded() -> bool:
    """Whether the present run is recorded, so that no choice may depend on what a tensor holds."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def known(truth: Tensor) -> bool:
    """Whether `truth`, a bool tensor of one entry, is known to hold; never while a run is recorded."""
    return not recorded() and bool(truth)
