"""What a mask is, read from its numbers: the window of a sliding layer, or the past; and how many keys it leaves a query.

The window of a sliding layer need not be a matrix at all: `band` writes it as its diagonals, which are all alike; nor need the
past be one, which `past` writes as which keys are real.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsefinder.errors import UserError

_ABSENT = -1e4  # at or below it a number in an additive mask says "never": BERT's old convention, and those after it


def band(valid: Tensor, reach: int, causal: bool = False) -> Tensor:
    """A window and padding as ``(B, 1, 2·reach + 1, N)`` bool: whether a key may be seen by the query ``r - reach`` before it.

    A view of ``valid (B, N)``, where a mask of pairs would be the largest tensor of a long text. A causal one, of ``reach`` 1
    and more, has one row more, and by this even number is known. Only for more queries than rows, and as many keys: that is
    what tells it from a mask of pairs.
    """
    return valid[:, None, None].expand(-1, 1, rows_of_band(reach, causal), -1)


def rows_of_band(reach: int, causal: bool) -> int:
    """How many rows a `band` has."""
    return 2 * reach + 1 + causal


def is_band(mask: Tensor, queries: int) -> bool:
    """Whether a mask for so many queries is a `band`: any other has a row for each of them, or one for all, or is `past`."""
    return mask.shape[2] not in (1, queries) and not is_past(mask, queries)


def past(valid: Tensor) -> Tensor:
    """Earlier keys and padding as ``(B, 1, 2, N)`` bool, a view of ``valid (B, N)``: for more than two queries."""
    return valid[:, None, None].expand(-1, 1, 2, -1)


def is_past(mask: Tensor, queries: int) -> bool:
    """Whether a mask for so many queries is `past`: no other has two rows for more than two of them."""
    return mask.shape[2] == 2 < queries


def pairs_of(mask: Tensor, queries: int) -> Tensor:
    """The mask ``(B, 1, N, N)`` of a `band` or of the `past`; any other mask for so many queries as it is."""
    if is_past(mask, queries):
        return mask[:, :, :1] & torch.ones(queries, queries, dtype=torch.bool, device=mask.device).tril()
    if not is_band(mask, queries):
        return mask
    reach, causal = _reach_of(mask)
    token = torch.arange(queries, device=mask.device)
    ahead = token - token[:, None]
    return mask[:, :, :1] & (ahead >= -reach) & (ahead <= (0 if causal else reach))


def _reach_of(mask: Tensor) -> tuple[int, bool]:
    """How far a query sees by a `band`, and whether it is causal."""
    return (mask.shape[2] - 1) // 2, mask.shape[2] % 2 == 0


def window_of(mask: Tensor | None, reach: int, queries: int) -> tuple[Tensor, bool] | None:
    """``valid (B, N)`` and whether it is causal, where a mask is nothing but a window and padding; else None.

    Args:
        mask: ``(B, 1, N, N)`` bool, True where a query may attend, or a `band`.
        reach: Keys that a query sees on a side. Transformers leaves it to every model what ``sliding_window`` counts, so the
            mask decides: it is compared with the band, diagonal by diagonal, and nothing may lie outside.
        queries: How many queries the mask is for.
    """
    if mask is not None and is_band(mask, queries):
        own, causal = _reach_of(mask)
        return (mask[:, 0, 0], causal) if own == reach else None
    if mask is not None and is_past(mask, queries):
        return None
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


def causal_of(mask: Tensor | None, queries: int) -> Tensor | None:
    """``valid (B, N)``, where a mask hides nothing but padding and later keys; else None.

    Args:
        mask: ``(B, 1, N, N)`` bool, True where a query may attend, or `past`.
        queries: How many queries the mask is for.
    """
    if mask is not None and is_past(mask, queries):
        return mask[:, 0, 0]
    if mask is None or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3] or mask.shape[3] < 2:
        return None
    valid = mask[:, 0, -1]  # the last query sees all that is real
    return valid if mask[:, 0].equal(valid[:, None].expand(mask[:, 0].shape).tril()) else None


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a query may attend, bool, and what is added to the scores there; None for a boolean mask."""
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise UserError(
            f"this attention got a mask of {mask.dtype}; give a boolean one, True where a query may attend "
            "(mask.bool()), or numbers that are added to the scores"
        )
    return mask > _ABSENT, mask


def keys_seen(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """How many keys each query may attend to, ``(B or 1, N_q or 1)`` int64.

    Args:
        mask: None, ``(B, 1, N_q or 1, N_k)``, bool or numbers that are added to the scores, a `band`, or `past`.
        q: queries ``(B, H, N_q, D)``.
        k: keys ``(B, H_k, N_k, D)``.
    """
    if mask is None:
        return torch.full((1, 1), k.shape[2], device=q.device)
    if is_past(mask, q.shape[2]):
        return mask[:, 0, 0].cumsum(-1)
    return pairs_of(split_mask(mask)[0], q.shape[2])[:, 0].sum(-1)
