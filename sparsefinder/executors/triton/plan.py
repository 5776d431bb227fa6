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

    Args:
        order: ``(positions,)`` int32, the flat token ``(b·H + h)·N + n`` on each position, -1 for none.
        positions: ``(M, C)`` int64, the positions of each of the ``M = B·H·N`` tokens, -1 for none.
        blocks: ``(blocks, 6)`` int32: first position, number of positions, the same two of the other side, and then ``limit``
            and ``reach``: pairs with a common bucket smaller than ``limit`` or further apart than ``reach`` do not count.
    """

    order: Tensor
    positions: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Plan:
    """Both sides of a layout.

    Args:
        q: the queries.
        k: the keys.
        q_ids: ``(M, P)`` int32, buckets of each query, -1 for none.
        k_ids: ``(M, P')`` int32, buckets of each key, -2 for none.
        causal: whether a query sees no later key.
        pairs: ``(B, H)`` int64, pairs in the blocks, filling included.
    """

    q: Side
    k: Side
    q_ids: Tensor
    k_ids: Tensor
    causal: bool
    pairs: Tensor


@dataclass(frozen=True)
class _Groups:
    """Groups of one kind: the tokens of either side in their order, the positions of each token, and the groups.

    ``groups``: ``(G, 6)`` int64 like the blocks of `Side`, counted from this list's own first position. ``heads``: ``(G,)``.
    """

    q_order: Tensor
    k_order: Tensor
    q_positions: Tensor
    k_positions: Tensor
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
    kinds = []
    if layout.buckets is not None:
        own = torch.arange(count, device=device).view(batch, heads, 1, 1) * layout.buckets.count
        q_ids = shifted(layout.buckets.q_ids, own).flatten(0, 2)
        k_ids = shifted(layout.buckets.k_ids, own).flatten(0, 2)
        kinds.append(_buckets(q_ids, k_ids, alive, count * layout.buckets.count, layout.buckets.count))
    if layout.window:
        kinds.append(_strip(alive.view(count, -1), alive.view(count, -1), limit=_ALL, reach=layout.window // 2))
    if bool(is_global.any()):
        kinds += [
            _strip(alive.view(count, -1), is_global.view(count, -1), limit=0, reach=_ALL),
            _strip(is_global.view(count, -1), valid.view(count, -1), limit=0, reach=_ALL),
        ]
    groups, owners = [torch.zeros(0, 6, dtype=torch.int64, device=device)], []
    q_base = k_base = 0
    for kind in kinds:
        groups.append(kind.groups + torch.tensor([q_base, 0, k_base, 0, 0, 0], device=device))
        owners.append(kind.heads)
        q_base, k_base = q_base + len(kind.q_order), k_base + len(kind.k_order)
    all_groups, owner = torch.cat(groups), torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *owners])
    used = (all_groups[:, 1] > 0) & (all_groups[:, 3] > 0)
    all_groups, owner = all_groups[used], owner[used]
    by_query, group = _cut(all_groups, block)
    by_key, _ = _cut(all_groups[:, [2, 3, 0, 1, 4, 5]], block)
    pairs = torch.zeros(count, dtype=torch.int64, device=device)
    pairs.index_add_(0, owner[group], block * (-(-by_query[:, 3] // block) * block))
    q_side = _side([(kind.q_order, kind.q_positions) for kind in kinds], by_query, alive)
    k_side = _side([(kind.k_order, kind.k_positions) for kind in kinds], by_key, alive)
    k_ids = k_ids.masked_fill(k_ids < 0, -2)
    return Plan(q_side, k_side, q_ids.int(), k_ids.int(), qk.causal, pairs.view(batch, heads))


def _flat(tokens: Tensor, heads: int) -> Tensor:
    """``(B, N)`` → ``(B·H·N,)``."""
    return tokens[:, None, :].expand(-1, heads, -1).reshape(-1)


def _side(parts: list[tuple[Tensor, Tensor]], blocks: Tensor, alive: Tensor) -> Side:
    """Groups of all kinds one after the other."""
    orders, positions, base = [alive.new_zeros(0, dtype=torch.int64)], [], 0
    for order, own_positions in parts:
        orders.append(order)
        positions.append(shifted(own_positions, base))
        base += len(order)
    nowhere = alive.new_zeros(len(alive), 0, dtype=torch.int64)
    return Side(torch.cat(orders).int(), torch.cat([nowhere, *positions], dim=1), blocks.int().contiguous())


def _buckets(q_ids: Tensor, k_ids: Tensor, alive: Tensor, count: int, of_a_head: int) -> _Groups:
    """A group for each bucket."""
    q_order, q_positions, q_counts = _memberships(q_ids, alive, count)
    k_order, k_positions, k_counts = _memberships(k_ids, alive, count)
    bucket = torch.arange(count, device=alive.device)
    q_first, k_first = q_counts.cumsum(0) - q_counts, k_counts.cumsum(0) - k_counts
    groups = torch.stack([q_first, q_counts, k_first, k_counts, bucket, torch.full_like(bucket, _ALL)], dim=1)
    return _Groups(q_order, k_order, q_positions, k_positions, groups, bucket // max(of_a_head, 1))


def _memberships(ids: Tensor, alive: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens sorted by bucket, each token's positions ``(M, P)``, and the size of each bucket."""
    tokens, slots = ids.shape
    flat = ids.masked_fill(~alive[:, None] | (ids < 0), count).view(-1)
    counts = torch.bincount(flat, minlength=count + 1)[:count]
    order = flat.argsort(stable=True)[: int(counts.sum())]
    positions = torch.full_like(flat, -1)
    positions[order] = torch.arange(len(order), device=ids.device)
    return order // max(slots, 1), positions.view(tokens, slots), counts


def _strip(q_here: Tensor, k_here: Tensor, limit: int, reach: int) -> _Groups:
    """One group for each head: its queries where ``q_here (heads, N)`` and its keys where ``k_here``.

    With a finite ``reach`` all tokens keep a position, so that neighbours in position are neighbours in the text.
    """
    q_order, q_positions = _tokens_of(q_here, reach == _ALL)
    k_order, k_positions = _tokens_of(k_here, reach == _ALL)
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
    return _Groups(q_order, k_order, q_positions, k_positions, torch.stack(columns, dim=1), head)


def _tokens_of(here: Tensor, close_up: bool) -> tuple[Tensor, Tensor]:
    """``(heads, N)`` bool → flat tokens of each head on equally many positions, and each token's position ``(M, 1)``."""
    heads, tokens = here.shape
    flat = torch.arange(heads * tokens, device=here.device).view(heads, tokens).masked_fill(~here, -1)
    if close_up:
        chosen = here.long().argsort(dim=1, descending=True, stable=True)[:, : int(here.sum(1).max())]
        flat = flat.gather(1, chosen)
    order = flat.reshape(-1)
    positions = torch.full((heads * tokens,), -1, dtype=torch.int64, device=here.device)
    real = (order >= 0).nonzero().squeeze(-1)
    positions[order[real]] = real
    return order, positions[:, None]


def _cut(groups: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Groups cut into blocks of at most ``block`` positions of the first side, and the group of each block.

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
