"""What patterns that choose tokens share: how many a share of a sentence is, who ranks where, and memberships as ids.

All counts are of real tokens of that sentence, and all orders are stable: of equal values the earlier token comes first, so
neither padding nor the other sentences of a batch change a choice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.padding import at_least_float32, without_padding


def check_share(name: str, share: float) -> None:
    """A `UserError` unless ``share`` lies in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"{name} must be a share, more than 0 and at most 1, got {share}")


def check_counts(**counts: int) -> None:
    """A `UserError` for the first setting that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")


def vectors(qk: QK) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(B, H, N, D)``, float32 at least, zeros on padding: even NaN there cannot reach a sum."""
    return at_least_float32(without_padding(qk.q, qk.queries_valid)), at_least_float32(without_padding(qk.k, qk.valid))


def share_of(counts: Tensor, share: float) -> Tensor:
    """``⌈share · counts⌉`` int64, not fooled by the rounding of the product: 0.07 · 100 is 7, not 8."""
    return (counts.double() * share - 1e-9).ceil().long()


def first_share(values: Tensor, qk: QK, share: float) -> Tensor:
    """The ``⌈share · n⌉`` tokens of largest value.

    Where attention is causal, a token is compared with those before it only: it is in iff it was among the ``⌈share · (j +
    1)⌉`` largest of the tokens ``0 … j`` when it arrived, and later ones change nothing.

    Args:
        values: ``(B, H, N, C)``, a ranking in each column; what padding holds never matters.
        qk: Says which tokens are real, and whether attention is causal.
        share: In (0, 1].

    Returns:
        ``(B, H, N, C)`` bool, False on padding.
    """
    values = values.masked_fill(~qk.valid[:, None, :, None], -math.inf).transpose(-1, -2)
    if qk.causal:
        ranks, seen = _rank_on_arrival(values), qk.positions + 1
    else:
        order = values.argsort(dim=-1, descending=True, stable=True)
        ranks, seen = order.argsort(dim=-1, stable=True), qk.lengths[:, None]
    inside = (ranks < share_of(seen, share)[:, None, None]) & qk.valid[:, None, None]
    return inside.transpose(-1, -2)


def as_ids(member: Tensor) -> Tensor:
    """Memberships as bucket ids.

    Args:
        member: ``(B, H, N, C)`` bool.

    Returns:
        ``(B, H, N, P)`` int64, then -1; ``P`` is what the busiest token needs.
    """
    numbers = member.sum(-1).flatten()
    ids = torch.full((len(numbers), int(numbers.max()) if len(numbers) else 0), -1, device=member.device)
    rows, columns = member.flatten(0, 2).nonzero(as_tuple=True)  # row by row, so the ids of a row lie side by side
    first = numbers.cumsum(0) - numbers
    ids[rows, torch.arange(len(rows), device=rows.device) - first[rows]] = columns
    return ids.unflatten(0, member.shape[:3])


def _rank_on_arrival(values: Tensor) -> Tensor:
    """For each position of ``(…, N)``, the earlier ones whose value is no smaller: a merge sort's count, ``N log² N`` work."""
    tokens = values.shape[-1]
    width = 1 << max(tokens - 1, 0).bit_length()
    values = F.pad(values, (0, width - tokens), value=-math.inf).contiguous()
    ranks = torch.zeros_like(values, dtype=torch.int64)
    half = 1
    while half < width:
        left, right = values.unflatten(-1, (-1, 2, half)).unbind(-2)
        smaller = torch.searchsorted(
            left.contiguous().sort(dim=-1).values, right.contiguous()
        )  # earlier ones that are smaller
        ranks.unflatten(-1, (-1, 2, half))[..., 1, :] += half - smaller
        half *= 2
    return ranks[..., :tokens]


def best(scores: Tensor, kept: Tensor) -> Tensor:
    """The largest of each row; of two equals the earlier one.

    Args:
        scores: ``(…, N)``, ``-inf`` on what may not be taken.
        kept: ``(…, 1)`` int64, how many of each row.

    Returns:
        ``(…, N)`` bool.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    among = torch.arange(scores.shape[-1], device=scores.device) < kept
    return torch.zeros_like(among.expand(scores.shape)).scatter(-1, order, among.expand(scores.shape))


def fewest(weights: Tensor, share: float) -> Tensor:
    """The fewest columns of each row that hold a share of what the row holds; of equal ones the earlier come first.

    Args:
        weights: ``(…, N)``, 0 or more.
        share: In [0, 1].

    Returns:
        ``(…, N)`` bool; nothing of a row of zeros.
    """
    # sums in float64: the smallest weights are less than the rounding of a float32 sum near 1
    held = weights.double().sort(-1, descending=True).values.cumsum(-1)
    enough = share * held[..., -1:]
    # a column is needed as long as those before it hold too little
    return best(weights, (held < enough).sum(-1, keepdim=True) + (enough > 0))


def memberships(heads: int, *ids: Tensor) -> Tensor:
    """Bucket ids that all heads share.

    Args:
        heads: ``H``.
        *ids: ``(B, N)`` int64 for each slot; -1 is no bucket.

    Returns:
        ``(B, H, N, P)`` int64.
    """
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
