"""A layout as a list of blocks for kernels: which query block meets which key block, and which pairs in it count.

Queries and keys are listed in the order of their buckets, once for each bucket that they are in, and again in their own order
for the window and the global tokens. A *group* is a stretch of listed queries with a stretch of listed keys: a bucket, a head's
window, a head's global keys, a head's global queries. Groups are cut into blocks, by query for the output and the gradient
of ``q``, by key for the gradients of ``k`` and ``v``. A pair that several groups hold counts in the first: global tokens are in
no bucket and no window, a bucket gives up pairs with a smaller bucket in common, a window those with any.

All is linear in N at fixed bucket size; no pair is listed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Layout, shifted

_ALL = 1 << 30  # a limit above all bucket ids, and a reach beyond all tokens


@dataclass(frozen=True)
class Side:
    """Queries or keys in the order in which kernels read them.

    ``order``: ``(places,)`` int32, the flat token ``(b·H + h)·N + n`` on each place, -1 for none. ``places``: ``(M, C)`` int64,
    the places of each of the ``M = B·H·N`` tokens, -1 for none. ``blocks``: ``(blocks, 6)`` int32: first place, number of places,
    first place and number of places of the other side, and then ``limit`` and ``reach``: pairs with a common bucket smaller than
    ``limit`` or further apart than ``reach`` do not count.
    """

    order: Tensor
    places: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Plan:
    """Both sides of a layout. ``q_ids``, ``k_ids``: ``(M, P)``, ``(M, P')`` int32, buckets of each token, -1 and -2 for none."""

    q: Side
    k: Side
    q_ids: Tensor
    k_ids: Tensor
    causal: bool
    pairs: Tensor  # (B, H) int64, pairs in the blocks, filling included


@dataclass(frozen=True)
class _Piece:
    """Groups of one kind: the tokens of either side in their order, the places of each token, and the groups.

    ``groups``: ``(G, 6)`` int64 like the blocks of `Side`, counted from the piece's own first place. ``heads``: ``(G,)``.
    """

    q_order: Tensor
    k_order: Tensor
    q_places: Tensor
    k_places: Tensor
    groups: Tensor
    heads: Tensor


@torch.no_grad()
def plan(layout: Layout, qk: QK, block: int) -> Plan:
    """The blocks of ``block`` queries by ``block`` keys that a layout touches."""
    batch, heads, tokens, _ = qk.q.shape
    count, device = batch * heads, qk.q.device
    valid = _flat(qk.valid, heads)
    is_global = torch.zeros_like(valid) if layout.is_global is None else _flat(layout.is_global, heads) & valid
    alive = valid & ~is_global
    q_ids = k_ids = torch.zeros(count * tokens, 0, dtype=torch.int64, device=device)
    pieces = []
    if layout.buckets is not None:
        own = torch.arange(count, device=device).view(batch, heads, 1, 1) * layout.buckets.count
        q_ids = shifted(layout.buckets.q_ids, own).flatten(0, 2)
        k_ids = shifted(layout.buckets.k_ids, own).flatten(0, 2)
        pieces.append(_buckets(q_ids, k_ids, alive, count * layout.buckets.count, layout.buckets.count))
    if layout.window:
        pieces.append(_strip(alive.view(count, -1), alive.view(count, -1), limit=_ALL, reach=layout.window // 2))
    if bool(is_global.any()):
        pieces += [
            _strip(alive.view(count, -1), is_global.view(count, -1), limit=0, reach=_ALL),
            _strip(is_global.view(count, -1), valid.view(count, -1), limit=0, reach=_ALL),
        ]
    groups, owners = [torch.zeros(0, 6, dtype=torch.int64, device=device)], []
    q_base = k_base = 0
    for piece in pieces:
        groups.append(piece.groups + torch.tensor([q_base, 0, k_base, 0, 0, 0], device=device))
        owners.append(piece.heads)
        q_base, k_base = q_base + len(piece.q_order), k_base + len(piece.k_order)
    all_groups, owner = torch.cat(groups), torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *owners])
    used = (all_groups[:, 1] > 0) & (all_groups[:, 3] > 0)
    all_groups, owner = all_groups[used], owner[used]
    by_query, group = _cut(all_groups, block)
    by_key, _ = _cut(all_groups[:, [2, 3, 0, 1, 4, 5]], block)
    pairs = torch.zeros(count, dtype=torch.int64, device=device)
    pairs.index_add_(0, owner[group], block * (-(-by_query[:, 3] // block) * block))
    q_side = _side([(p.q_order, p.q_places) for p in pieces], by_query, alive)
    k_side = _side([(p.k_order, p.k_places) for p in pieces], by_key, alive)
    k_ids = k_ids.masked_fill(k_ids < 0, -2)
    return Plan(q_side, k_side, q_ids.int(), k_ids.int(), qk.causal, pairs.view(batch, heads))


def _flat(tokens: Tensor, heads: int) -> Tensor:
    """``(B, N)`` → ``(B·H·N,)``."""
    return tokens[:, None, :].expand(-1, heads, -1).reshape(-1)


def _side(parts: list[tuple[Tensor, Tensor]], blocks: Tensor, alive: Tensor) -> Side:
    """Pieces one after the other."""
    orders, places, base = [alive.new_zeros(0, dtype=torch.int64)], [], 0
    for order, own_places in parts:
        orders.append(order)
        places.append(shifted(own_places, base))
        base += len(order)
    nowhere = alive.new_zeros(len(alive), 0, dtype=torch.int64)
    return Side(torch.cat(orders).int(), torch.cat([nowhere, *places], dim=1), blocks.int().contiguous())


def _buckets(q_ids: Tensor, k_ids: Tensor, alive: Tensor, count: int, of_a_head: int) -> _Piece:
    """A group for each bucket."""
    q_order, q_places, q_counts = _memberships(q_ids, alive, count)
    k_order, k_places, k_counts = _memberships(k_ids, alive, count)
    bucket = torch.arange(count, device=alive.device)
    q_first, k_first = q_counts.cumsum(0) - q_counts, k_counts.cumsum(0) - k_counts
    groups = torch.stack([q_first, q_counts, k_first, k_counts, bucket, torch.full_like(bucket, _ALL)], dim=1)
    return _Piece(q_order, k_order, q_places, k_places, groups, bucket // max(of_a_head, 1))


def _memberships(ids: Tensor, alive: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens sorted by bucket, each token's places ``(M, P)``, and the size of each bucket."""
    tokens, slots = ids.shape
    flat = ids.masked_fill(~alive[:, None] | (ids < 0), count).view(-1)
    counts = torch.bincount(flat, minlength=count + 1)[:count]
    order = flat.argsort(stable=True)[: int(counts.sum())]
    places = torch.full_like(flat, -1)
    places[order] = torch.arange(len(order), device=ids.device)
    return order // max(slots, 1), places.view(tokens, slots), counts


def _strip(q_here: Tensor, k_here: Tensor, limit: int, reach: int) -> _Piece:
    """One group for each head: its queries where ``q_here (heads, N)`` and its keys where ``k_here``.

    With a finite ``reach`` all tokens keep a place, so that neighbours in place are neighbours in the text.
    """
    q_order, q_places = _tokens_of(q_here, reach == _ALL)
    k_order, k_places = _tokens_of(k_here, reach == _ALL)
    count = len(q_here)
    head = torch.arange(count, device=q_here.device)
    q_width, k_width = len(q_order) // count, len(k_order) // count
    columns = [
        head * q_width,
        head * 0 + q_width,
        head * k_width,
        head * 0 + k_width,
        head * 0 + limit,
        head * 0 + reach,
    ]
    return _Piece(q_order, k_order, q_places, k_places, torch.stack(columns, dim=1), head)


def _tokens_of(here: Tensor, close_up: bool) -> tuple[Tensor, Tensor]:
    """``(heads, N)`` bool → flat tokens of each head on equally many places, and each token's place ``(M, 1)``."""
    heads, tokens = here.shape
    flat = torch.arange(heads * tokens, device=here.device).view(heads, tokens).masked_fill(~here, -1)
    if close_up:
        chosen = here.long().argsort(dim=1, descending=True, stable=True)[:, : int(here.sum(1).max())]
        flat = flat.gather(1, chosen)
    order = flat.reshape(-1)
    places = torch.full((heads * tokens,), -1, dtype=torch.int64, device=here.device)
    real = (order >= 0).nonzero().squeeze(-1)
    places[order[real]] = real
    return order, places[:, None]


def _cut(groups: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Groups cut into blocks of at most ``block`` places of the first side, and the group of each block.

    The other side is narrowed to what is within ``reach``: where that is finite, both sides list the same tokens in order.
    """
    numbers = -(-groups[:, 1] // block)
    group = torch.arange(len(groups), device=groups.device).repeat_interleave(numbers)
    first_block = numbers.cumsum(0) - numbers
    offset = (torch.arange(len(group), device=groups.device) - first_block[group]) * block
    start, count, other, other_count, limit, reach = groups[group].unbind(1)
    mine = (count - offset).clamp_max(block)
    low = (offset - reach).clamp_min(0)
    high = torch.minimum(offset + mine + reach, other_count)
    return torch.stack([start + offset, mine, other + low, high - low, limit, reach], dim=1), group
