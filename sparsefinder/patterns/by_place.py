"""Buckets that follow from where a token stands in its sentence, and not from what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefinder.store import UserError


def memberships(heads: int, *ids: Tensor) -> Tensor:
    """Bucket ids that all heads share, ``(B, N)`` int64 for each slot → ``(B, H, N, P)``; -1 is no bucket."""
    return torch.stack(ids, dim=-1)[:, None].expand(-1, heads, -1, -1)


def at_least(least: int, **settings: int) -> None:
    """A `UserError` for a setting that is smaller than ``least``."""
    for name, value in settings.items():
        if value < least:
            raise UserError(f"{name} must be {least} or more, got {value}")


def odd(**settings: int) -> None:
    """A `UserError` for a width that has no middle."""
    for name, value in settings.items():
        if value < 1 or value % 2 == 0:
            raise UserError(f"{name} must be an odd number, 1 or more, got {value}: try {max(value + 1, 1)}")
