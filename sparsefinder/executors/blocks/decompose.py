"""A layout decomposed into blocks that dense products can work on, every pair in exactly one of them.

- ``Globals``: all queries × the global keys, and the global queries × all keys;
- ``Tiles`` (`sparsefinder.executors.blocks.bucket_tiles`): the queries × the keys of each bucket, for tokens that are not global;
- ``Band`` (`sparsefinder.executors.blocks.banded`): the window, without the pairs that are in one of the others.

A pair that shares several buckets stays in the one with the smallest id. Nothing here is of size N × N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sparsefinder.executors.blocks.banded import TILE, Band, neighbours
from sparsefinder.executors.blocks.bucket_tiles import STEP, Tiles, lay_out_tiles, slots_in_common
from sparsefinder.executors.blocks.row_packing import PackedRows, lay_out_rows
from sparsefinder.graphs import QK, Layout, shifted


@dataclass(frozen=True)
class Globals:
    """Tokens that attend to all and are attended by all, as two strips.

    Args:
        tokens: ``(B, G)`` int64 positions, all different; ``G`` is what the fullest example needs.
        as_keys: ``(B, 1, 1 or N, G)`` bool, allowed pairs; an example's surplus tokens have none.
        as_queries: ``(B, 1, G, N)`` bool, the same.
    """

    tokens: Tensor
    as_keys: Tensor
    as_queries: Tensor

    @property
    def width(self) -> int:
        """Number ``G`` of slots for global tokens."""
        return self.tokens.shape[1]

    def key_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """All queries with the global keys: ``(B, H, N, D)`` twice → ``(B, H, N, G)``, ``-inf`` where not allowed."""
        return (q @ self.select(k).transpose(-1, -2)).masked_fill(~self.as_keys, -math.inf)

    def query_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """The global queries with all keys: ``(B, H, N, D)`` twice → ``(B, H, G, N)``, ``-inf`` where not allowed."""
        return (self.select(q) @ k.transpose(-1, -2)).masked_fill(~self.as_queries, -math.inf)

    def select(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → ``(B, H, G, D)``."""
        return x.gather(2, self._index(x))

    def add(self, out: Tensor, rows: Tensor) -> Tensor:
        """``out (B, H, N, D)`` plus ``rows (B, H, G, D)`` at the global tokens."""
        return out.scatter_add(2, self._index(out), rows)

    def _index(self, x: Tensor) -> Tensor:
        batch, heads, _, size = x.shape
        return self.tokens[:, None, :, None].expand(batch, heads, -1, size)


@dataclass(frozen=True)
class Blocks:
    """A layout on the tokens of one batch, ready to be multiplied; ``M = B·H·N_q`` counts the queries of all heads.

    Flat scores are first a *prefix* of ``(M, F)``, global keys, then band, then filling; and then the tiles.

    Args:
        shape: of the queries, ``(B, H, N_q, D)``.
        alive: ``(M,)`` bool, queries that are real and not global: those whose scores are packed into one row.
        globals: None where no token is global.
        band: None where there is no window.
        tiles: None where there are no buckets.
    """

    shape: torch.Size  # (B, H, N_q, D)
    alive: Tensor
    globals: Globals | None
    band: Band | None
    tiles: Tiles | None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``q (B, H, N_q, D)``, ``k (B, H, N_k, D)`` → flat products of all of them, ``-inf`` on pairs that do not count."""
        flat_q, flat_k = q.flatten(0, 2), k.flatten(0, 2)
        prefix = []
        if self.globals is not None:
            prefix.append(self.globals.key_scores(q, k).flatten(0, 2))
        if self.band is not None:
            prefix.append(self.band.scores(flat_q, flat_k))
        prefix.append(
            flat_q.new_full((len(flat_q), self._prefix_width - sum(part.shape[1] for part in prefix)), -math.inf)
        )
        scores = torch.cat(prefix, dim=1).view(-1)
        return scores if self.tiles is None else torch.cat([scores, *self.tiles.scores(flat_q, flat_k)])

    def apply(self, weights: Tensor, v: Tensor) -> Tensor:
        """Flat ``weights`` (zeros on pairs that do not count), ``v (B, H, N_k, D)`` → ``(B, H, N_q, D)`` sums."""
        flat_v, queries = v.flatten(0, 2), len(self.alive)
        prefix, in_tiles = weights.split([queries * self._prefix_width, self._tile_scores])
        on_globals, on_band, _ = prefix.view(queries, self._prefix_width).split(self._prefix_widths, dim=1)
        sums = []
        if self.tiles is not None:
            sums.append(self.tiles.apply(in_tiles, flat_v).view(self.shape))
        if self.globals is not None:
            sums.append(on_globals.view(*v.shape[:3], -1) @ self.globals.select(v))
        if self.band is not None:
            sums.append(self.band.apply(on_band, flat_v).view(v.shape))
        return reduce(torch.add, sums) if sums else v.sum() * 0.0 + v.new_zeros(self.shape)

    def packed_rows(self) -> PackedRows:
        """Where the scores of each query lie in the flat products."""
        segments = self._prefix_width // STEP
        starts = torch.arange(len(self.alive), device=self.alive.device)[:, None] * segments
        counts = self.alive[:, None] * segments
        if self.tiles is not None:
            tile_starts, tile_counts = self.tiles.row_segments()
            starts = torch.cat([starts, tile_starts + len(self.alive) * segments], dim=1)
            counts = torch.cat([counts, tile_counts], dim=1)
        return lay_out_rows(starts, counts, len(self.alive) * segments + self._tile_scores // STEP)

    def computed_pairs(self) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64, filling included."""
        batch, heads, tokens, _ = self.shape
        pairs = torch.zeros(batch * heads, dtype=torch.int64, device=self.alive.device)
        if self.globals is not None:
            pairs += 2 * tokens * self.globals.width
        if self.band is not None:
            pairs += tokens * self.band.computed_keys
            pairs[-1] += -len(self.alive) % TILE * self.band.computed_keys  # the last tile's filling
        if self.tiles is not None:
            pairs.index_add_(
                0, self.tiles.buckets * len(pairs) // self.tiles.count, self.tiles.q_sizes * self.tiles.k_sizes
            )
        return pairs.view(batch, heads)

    @property
    def _prefix_widths(self) -> list[int]:
        parts = [0 if part is None else part.width for part in (self.globals, self.band)]
        return [*parts, -sum(parts) % STEP]

    @property
    def _prefix_width(self) -> int:
        return sum(self._prefix_widths)

    @property
    def _tile_scores(self) -> int:
        return 0 if self.tiles is None else self.tiles.size


@torch.no_grad()
def decompose(layout: Layout, qk: QK) -> Blocks:
    """The blocks of a layout; work and memory grow with N and with the pairs in the layout."""
    batch, heads, tokens, _ = qk.q.shape
    device = qk.q.device
    if layout.window or layout.is_global is not None:
        qk.one_text("a window or global tokens")
    is_global = None if layout.is_global is None else layout.is_global & qk.valid

    def flat(valid: Tensor) -> Tensor:
        alive = valid if is_global is None else valid & ~is_global
        return alive[:, None, :].expand(-1, heads, -1).reshape(-1)

    flat_alive = flat(qk.queries_valid)
    positions = torch.arange(tokens, device=device).repeat(batch * heads)
    tiles, band, slots = None, None, []
    if layout.buckets is not None:
        buckets = layout.buckets
        # every head has bucket ids of its own
        own = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1) * buckets.count
        q_ids, k_ids = (shifted(ids, own).flatten(0, 2) for ids in (buckets.q_ids, buckets.k_ids))
        slots = slots_in_common(buckets.q_ids, buckets.k_ids)
        k_alive = flat(qk.valid) if qk.crosses else flat_alive
        tiles = lay_out_tiles(q_ids, k_ids, flat_alive, k_alive, batch * heads * buckets.count)
        tiles = tiles.hide(q_ids, k_ids, slots, positions if qk.causal else None)
    if layout.window:
        reach = min(layout.window // 2, tokens - 1)
        first, last = -reach, 0 if qk.causal else reach
        keys = positions[:, None] + torch.arange(first, last + 1, device=device)
        hidden = ~neighbours(flat_alive, first, last, False) | (keys < 0) | (keys >= tokens)
        for q_slot, k_slot in slots:
            # a query in no bucket is -1; a key in none, or beyond either end, -2
            keys_in = k_ids[:, k_slot].masked_fill(k_ids[:, k_slot] < 0, -2)
            hidden |= q_ids[:, q_slot, None] == neighbours(keys_in, first, last, -2)
        band = Band(first, last, hidden)
    chosen = None if is_global is None or not bool(is_global.any()) else _globals(is_global, qk)
    return Blocks(qk.q.shape, flat_alive, chosen, band, tiles)


def _globals(is_global: Tensor, qk: QK) -> Globals:
    numbers = is_global.sum(-1)
    width = int(numbers.max())
    tokens = is_global.long().argsort(dim=-1, descending=True, stable=True)[:, :width]
    real = torch.arange(width, device=tokens.device) < numbers[:, None]
    as_keys, as_queries = real[:, None, None, :], real[:, None, :, None] & qk.valid[:, None, None, :]
    if qk.causal:
        positions = torch.arange(qk.q.shape[2], device=tokens.device)
        as_keys = as_keys & (tokens[:, None, None, :] <= positions[:, None])
        as_queries = as_queries & (positions <= tokens[:, None, :, None])
    return Globals(tokens, as_keys, as_queries)
