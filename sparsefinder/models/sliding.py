"""What a mask is, read from its numbers: the window of a sliding layer, or the past. Whoever knows multiplies no more."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def window_of(mask: Tensor | None, reach: int) -> tuple[Tensor, bool] | None:
    """``valid (B, N)`` and whether it is causal, where a mask is nothing but a window and padding; else None.

    Args:
        mask: ``(B, 1, N, N)`` bool, True where a query may attend.
        reach: Keys that a query sees on a side. Transformers leaves it to every model what ``sliding_window`` counts, so the
            mask decides: it is compared with the band, diagonal by diagonal, and nothing may lie outside.
    """
    if mask is None or mask.device.type != "cpu" or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    pairs, tokens = mask[:, 0], mask.shape[3]
    if tokens <= 2 * reach + 1:  # the band is nearly everything
        return None
    valid = pairs.diagonal(dim1=1, dim2=2)
    causal = not bool(pairs.diagonal(1, 1, 2).any())
    inside = 0
    for step in range(-reach, 1 if causal else reach + 1):
        keys = valid[:, max(step, 0) : tokens + min(step, 0)]
        if not pairs.diagonal(step, 1, 2).equal(keys):
            return None
        inside += int(keys.sum())
    # ten times as fast as torch's sum
    return (valid, causal) if np.count_nonzero(pairs.numpy()) == inside else None


def causal_of(mask: Tensor | None) -> Tensor | None:
    """``valid (B, N)``, where a mask hides nothing but padding and later keys; else None.

    Args:
        mask: ``(B, 1, N, N)`` bool, True where a query may attend.
    """
    if mask is None or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3] or mask.shape[3] < 2:
        return None
    valid = mask[:, 0, -1]  # the last query sees all that is real
    return valid if mask[:, 0].equal(valid[:, None].expand(mask[:, 0].shape).tril()) else None
