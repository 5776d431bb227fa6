"""Keep the best of each row: what the oracles with a budget share."""

from __future__ import annotations

import torch
from torch import Tensor


def best(scores: Tensor, kept: Tensor) -> Tensor:
    """The ``kept (…, 1)`` largest of each row of ``scores (…, N)``, as bool ``(…, N)``; of two equals the earlier one."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    among = torch.arange(scores.shape[-1], device=scores.device) < kept
    return torch.zeros_like(among.expand(scores.shape)).scatter(-1, order, among.expand(scores.shape))


def budget(share: float, number: Tensor) -> Tensor:
    """``⌈share · number⌉`` as int64; rounding noise does not add one (0.1 · 30 is a little more than 3)."""
    return (share * number.double() - 1e-9).ceil().long()
