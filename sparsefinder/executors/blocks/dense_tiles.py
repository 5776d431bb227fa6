"""Exact dense attention with torch's products, some queries at a time: on any device, and where there is no C++ compiler.

The scores of a tile of queries with all keys are in memory at one time, forward and backward: a tile is computed again for its
gradients. So memory is linear in N, with any normalizer; work is that of dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsefinder.executors.workload import Pairs, Work
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.numerics.padding import exactly

AT_ONCE = 1 << 22  # scores in memory at one time


class TilesExecutor:
    """Dense attention by torch's products, on any device."""

    name = "tiles"
    never_automatic = ""

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        return ""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead, dropout: float
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k``, ``v (B, H_k, N_k, D)``, of any precision → ``(B, H, N_q, D)``, float32 at least."""
        out = attend(*exactly(q, k, v), pairs.allowed, normalizer, dropout)
        return out.masked_fill(~pairs.query_valid[:, None, :, None], 0.0)

    def support(
        self, q: Tensor, k: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, keys and probabilities of the pairs of positive probability; see `support`."""
        real = pairs.query_valid[:, None, :, None]
        return support(q, k, lambda start, end: pairs.allowed(start, end) & real[:, :, start:end], normalizer)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Callable[[int, int], Tensor],
    normalizer: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
    at_once: int = AT_ONCE,
) -> Tensor:
    """Dense attention, float32 or float64, on any device.

    Args:
        q: ``(B, H, N_q, D)``.
        k: ``(B, H_k, N_k, D)``, ``H`` a multiple of ``H_k``.
        v: of the shape of ``k``.
        allowed: ``(start, end)`` → which pairs there are for these queries, bool that broadcasts to
            ``(B, H, end − start, N_k)``.
        normalizer: scores ``(B, H, n, N_k)``, ``-inf`` where absent, to probabilities of that shape; zeros for a row without
            keys.
        dropout: share of the probabilities that are set to zero.
        at_once: scores in memory at one time.

    Returns:
        ``(B, H, N_q, D)``.
    """
    batch, heads, queries, size = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))

    def tile(part: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        scores = part / math.sqrt(size) @ keys.mT
        scores = scores.masked_fill(~allowed(start, start + part.shape[2]), -math.inf)
        return nn.functional.dropout(normalizer(scores), dropout) @ values

    rows = max(1, at_once // max(1, batch * heads * k.shape[2]))
    starts = range(0, queries, rows)
    again = torch.is_grad_enabled() and len(starts) > 1
    parts = []
    for start, part in zip(starts, q.split(rows, dim=2), strict=True):
        done = checkpoint(tile, part, k, v, start, use_reentrant=False) if again else tile(part, k, v, start)
        parts.append(done)
    return torch.cat(parts, dim=2) if parts else torch.zeros_like(q)


def support(
    q: Tensor,
    k: Tensor,
    allowed: Callable[[int, int], Tensor],
    normalizer: Callable[[Tensor], Tensor],
    at_once: int = AT_ONCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of positive probability as lists, as `sparsefinder.executors.native.dense.support` has them."""
    batch, heads, queries, size = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    rows = max(1, at_once // max(1, batch * heads * k.shape[2]))
    counts = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
    keys, probabilities = [], []
    for start in range(0, queries, rows):
        scores = q[:, :, start : start + rows] / math.sqrt(size) @ k.mT
        found = normalizer(scores.masked_fill(~allowed(start, start + scores.shape[2]), -math.inf))
        counts[:, :, start : start + rows] = (found > 0).sum(-1)
        keys.append((found > 0).nonzero()[:, -1])
        probabilities.append(found[found > 0])
    # what was found tile by tile, in the order of heads: which query each pair is of, in the order of tiles, says where it goes
    row = torch.arange(counts.numel(), device=q.device).view(counts.shape)
    tiles = zip(row.split(rows, dim=2), counts.split(rows, dim=2), strict=True)
    of = [torch.repeat_interleave(each.flatten(), many.flatten()) for each, many in tiles]
    order = torch.cat([*of, row.new_zeros(0)]).argsort(stable=True)
    return counts, torch.cat([*keys, row.new_zeros(0)])[order], torch.cat([*probabilities, q.new_zeros(0)])[order]
