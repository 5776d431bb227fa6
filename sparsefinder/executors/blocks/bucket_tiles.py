"""Buckets as dense blocks: the queries of a bucket against its keys, buckets of like size side by side.

Memberships (a token in one of its buckets) are sorted by bucket, so that each bucket is a run. Runs are lengthened to a few
sizes (multiples of ``STEP`` up to eight, then at most a quarter more), and all buckets with the same two sizes are one batched
product. Every query is gathered once per bucket that it is in, however many keys wait there; memory is that of the pairs
that are multiplied, and no pair is listed by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from sparsefinder.executors.blocks.gather import gather

STEP = 16  # sizes are multiples of it; 16 scores are also the unit in which `rows` moves them (64 bytes in float32)


@dataclass(frozen=True)
class Members:
    """Queries or keys laid out by bucket, each bucket on a run of positions.

    Args:
        tokens: ``(positions, 1)`` int64, the token on each position, -1 on filling.
        positions: ``(M, P)`` int64, where each of a token's memberships lies, -1 where nobody of the other side is in that
            bucket.
    """

    tokens: Tensor
    positions: Tensor

    def lay_out(self, x: Tensor) -> Tensor:
        """Vectors ``(M, D)`` → ``(positions, D)``, zeros on filling."""
        return gather(x, self.tokens, self.positions)

    def collect(self, x: Tensor) -> Tensor:
        """``(positions, D)`` → ``(M, D)``, the sum over each token's positions."""
        return gather(x, self.positions, self.tokens)

    def look_up(self, values: Tensor, filling: int) -> Tensor:
        """Integers ``(M, ...)`` of the token on each position, ``filling`` where there is none: ``(positions, ...)``."""
        tokens = self.tokens.squeeze(-1)
        result = values[tokens.clamp_min(0)]
        result[tokens < 0] = filling
        return result


@dataclass(frozen=True)
class Tiles:
    """The blocks of all buckets that hold both queries and keys, in the order of their sizes.

    Scores are flat: block after block, each row by row.

    Args:
        count: bucket ids in all.
        buckets: ``(A,)`` int64, id of each.
        q_sizes: ``(A,)`` int64, positions of each on the side of the queries.
        k_sizes: the same of the keys.
        q: the queries.
        k: the keys.
        shapes: for each pair of sizes ``(buckets, queries, keys)``.
        hidden: for each of ``shapes`` a flat bool, True on pairs that do not count; None where only filling does not.
    """

    count: int
    buckets: Tensor
    q_sizes: Tensor
    k_sizes: Tensor
    q: Members
    k: Members
    shapes: tuple[tuple[int, int, int], ...]
    hidden: tuple[Tensor, ...] | None = None

    @property
    def size(self) -> int:
        """Scores in all blocks, filling included."""
        return sum(number * rows * columns for number, rows, columns in self.shapes)

    def scores(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """``q, k (M, D)`` → flat scores for each of ``shapes``, ``-inf`` on filling keys and hidden pairs.

        Filling queries get scores that nobody reads.
        """
        bias = torch.zeros_like(self.k.tokens, dtype=q.dtype).masked_fill(self.k.tokens < 0, -math.inf).squeeze(-1)
        q_blocks, k_blocks = self._q_blocks(self.q.lay_out(q)), self._k_blocks(self.k.lay_out(k))
        scores = [
            torch.baddbmm(bias_block.unsqueeze(1), q_block, k_block.transpose(1, 2)).view(-1)
            for q_block, k_block, bias_block in zip(q_blocks, k_blocks, self._k_blocks(bias), strict=True)
        ]
        if self.hidden is None:
            return scores
        return [block.masked_fill_(mask, -math.inf) for block, mask in zip(scores, self.hidden, strict=True)]

    def apply(self, weights: Tensor, v: Tensor) -> Tensor:
        """Flat ``weights`` (zero for filling queries), ``v (M, D)`` → ``(M, D)``, the sum over all blocks."""
        blocks = weights.split([number * rows * columns for number, rows, columns in self.shapes])
        outputs = [
            torch.bmm(block.view(shape), v_block).view(-1, v.shape[1])
            for block, shape, v_block in zip(blocks, self.shapes, self._k_blocks(self.k.lay_out(v)), strict=True)
        ]
        return self.q.collect(torch.cat(outputs) if outputs else v[:0])

    def hide(
        self, q_ids: Tensor, k_ids: Tensor, slots: Sequence[tuple[int, int]], order: Tensor | None = None
    ) -> Tiles:
        """The same tiles with each pair counted once, and without later keys.

        A pair counts where its bucket is the smallest that it shares.

        Args:
            q_ids: ``(M, P)`` int64, buckets of each query.
            k_ids: the same of the keys.
            slots: the pairs of slots that can name the same bucket.
            order: of the tokens in their text, ``(M,)`` int64, where attention is causal.
        """
        # a pair needs two slots on either side to share two buckets
        slots = slots if min(len({q for q, _ in slots}), len({k for _, k in slots})) > 1 else []
        if not self.shapes or (not slots and order is None):
            return self
        smaller = self.q.look_up(q_ids, -1)
        smaller[smaller >= self.buckets.repeat_interleave(self.q_sizes)[:, None]] = -1
        # a query in no bucket is -1, a key in none is -2
        keys_in = self.k.look_up(k_ids.masked_fill(k_ids < 0, -2), -2)
        ids = zip(self._q_blocks(smaller), self._k_blocks(keys_in), strict=True)
        masks = []
        for q_block, k_block in ids:
            mask = torch.zeros(*q_block.shape[:2], k_block.shape[1], dtype=torch.bool, device=q_ids.device)
            for q_slot, k_slot in slots:
                mask |= q_block[:, :, None, q_slot] == k_block[:, None, :, k_slot]
            masks.append(mask)
        if order is not None:
            q_at, k_at = self._q_blocks(self.q.look_up(order, 0)), self._k_blocks(self.k.look_up(order, 0))
            for mask, q_block, k_block in zip(masks, q_at, k_at, strict=True):
                mask |= q_block[:, :, None] < k_block[:, None, :]
        return replace(self, hidden=tuple(mask.view(-1) for mask in masks))

    def row_segments(self) -> tuple[Tensor, Tensor]:
        """Where the scores of each membership of a query lie, in units of ``STEP``: starts and counts, ``(M, P)`` int64."""
        counts = self.k_sizes // STEP
        count_of_position = counts.repeat_interleave(self.q_sizes)
        start_of_position = count_of_position.cumsum(0) - count_of_position
        absent = self.q.positions < 0
        if not count_of_position.numel():
            return torch.zeros_like(self.q.positions), torch.zeros_like(self.q.positions)
        at = self.q.positions.clamp_min(0)
        return start_of_position[at].masked_fill_(absent, 0), count_of_position[at].masked_fill_(absent, 0)

    def _q_blocks(self, x: Tensor) -> list[Tensor]:
        return _blocks(x, [(number, rows) for number, rows, _ in self.shapes])

    def _k_blocks(self, x: Tensor) -> list[Tensor]:
        return _blocks(x, [(number, columns) for number, _, columns in self.shapes])


def lay_out_tiles(q_ids: Tensor, k_ids: Tensor, q_alive: Tensor, k_alive: Tensor, count: int) -> Tiles:
    """Tiles of memberships ``(M, P)`` int64 in ``[0, count)``; only tokens of either side that are alive ``(M,)`` take part."""
    sides = ((q_ids, q_alive), (k_ids, k_alive))
    q_ids, k_ids = (ids.masked_fill(~alive[:, None] | (ids < 0), count).view(-1) for ids, alive in sides)
    q_counts, k_counts = (torch.bincount(ids, minlength=count + 1)[:count] for ids in (q_ids, k_ids))
    buckets = ((q_counts > 0) & (k_counts > 0)).nonzero().squeeze(-1)
    q_sizes, k_sizes = round_up(q_counts[buckets], STEP), round_up(k_counts[buckets], STEP)
    by_size = (q_sizes * (k_sizes.max() + 1) + k_sizes if len(buckets) else q_sizes).argsort(stable=True)
    buckets, q_sizes, k_sizes = buckets[by_size], q_sizes[by_size], k_sizes[by_size]
    sizes, numbers = torch.stack([q_sizes, k_sizes], dim=1).unique_consecutive(dim=0, return_counts=True)
    return Tiles(
        count,
        buckets,
        q_sizes,
        k_sizes,
        _members(q_ids, q_counts, buckets, q_sizes, len(q_alive)),
        _members(k_ids, k_counts, buckets, k_sizes, len(k_alive)),
        tuple(
            (number, rows, columns) for number, (rows, columns) in zip(numbers.tolist(), sizes.tolist(), strict=True)
        ),
    )


def slots_in_common(q_ids: Tensor, k_ids: Tensor) -> list[tuple[int, int]]:
    """Pairs of slots of ``(..., P)`` ids whose ranges overlap: only these can name the same bucket.

    Rounds use ranges of their own, so each meets itself alone and comparing ids costs P instead of P².
    """
    q_ranges, k_ranges = (_ranges(ids.flatten(0, -2)) for ids in (q_ids, k_ids))
    return [
        (i, j)
        for (i, (q_low, q_high)), (j, (k_low, k_high)) in product(enumerate(q_ranges), enumerate(k_ranges))
        if q_low <= k_high and k_low <= q_high
    ]


def _ranges(ids: Tensor) -> list[list[int]]:
    """Smallest and largest id of each slot; an empty range where nobody is in a bucket."""
    lowest = ids.masked_fill(ids < 0, torch.iinfo(ids.dtype).max).amin(dim=0)
    return torch.stack([lowest, ids.amax(dim=0)]).T.tolist()


def round_up(sizes: Tensor, step: int) -> Tensor:
    """Sizes to the next multiple of ``step`` with at most three leading bits: 1, 2, … 8, 10, 12, 14, 16, 20, … times it."""
    units = -(-sizes // step)
    exponent = torch.frexp(units.double()).exponent.long()  # bits of the number
    unit = torch.ones_like(units) << (exponent - 3).clamp_min(0)
    return -(-units // unit) * unit * step


def _members(ids: Tensor, counts: Tensor, buckets: Tensor, sizes: Tensor, tokens: int) -> Members:
    """Positions for the flat memberships ``ids (M·P,)``, given the members of each bucket and the sizes of the kept ones."""
    slots = len(ids) // max(tokens, 1)
    ordered, order = ids.sort(stable=True)
    shift = torch.full((len(counts) + 1,), -1, device=ids.device)
    shift[buckets] = sizes.cumsum(0) - sizes  # first position of each bucket
    first_member = counts.cumsum(0) - counts
    kept = (shift[ordered] >= 0).nonzero().squeeze(-1)
    ordered, order = ordered[kept], order[kept]
    at = shift[ordered] + kept - first_member[ordered]
    positions = torch.full_like(ids, -1)
    positions[order] = at
    on_position = torch.full((int(sizes.sum()), 1), -1, device=ids.device)
    on_position[at, 0] = order // max(slots, 1)
    return Members(on_position, positions.view(tokens, slots))


def _blocks(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = x.split([count * size for count, size in shapes])
    return [part.view(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
