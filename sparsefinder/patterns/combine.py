"""Patterns made of patterns: a union, a pattern in a projected space, a pattern of blocks, a pattern without the future."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, HasLayout, Layout, Pattern, each_query_alone, has_tail, reads_ahead
from sparsefinder.patterns.support.cost import cost_of, cost_of_keys
from sparsefinder.predictors.projections import Projections


@dataclass(frozen=True)
class Union:
    """Edge iff any of the patterns has it.

    Args:
        patterns: What is united; a layout needs one of each.
    """

    patterns: Sequence[Pattern]

    @property
    def tail(self) -> bool:
        """Whether one of them has a tail."""
        return any(has_tail(pattern) for pattern in self.patterns)

    @property
    def reads_ahead(self) -> str:
        """What any of them reads of later tokens in causal attention."""
        return "; ".join(dict.fromkeys(filter(None, map(reads_ahead, self.patterns))))

    def layout(self, qk: QK, layer: int) -> Layout:
        """All layouts together; a `UserError` where one of the patterns has none."""
        return reduce(Layout.union, (layout_of(pattern, qk, layer) for pattern in self.patterns))

    def cost(self, tokens: int, size: int) -> float:
        """That of all patterns together."""
        return sum(cost_of(pattern, tokens, size) for pattern in self.patterns)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """That of all patterns together."""
        return sum(cost_of_keys(pattern, tokens, size) for pattern in self.patterns)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return reduce(Tensor.logical_or, (pattern(qk, layer) for pattern in self.patterns))


@dataclass(frozen=True)
class Projected:
    """Any pattern, applied to projected queries and keys.

    Args:
        pattern: Sees vectors ``(B, H, N, R)``.
        projections: From head size ``D`` to ``R``.
    """

    pattern: Pattern
    projections: Projections

    @property
    def tail(self) -> bool:
        """Whether the pattern has a tail, which is of the keys that are projected."""
        return has_tail(self.pattern)

    @property
    def each_query_alone(self) -> bool:
        """Whether the pattern looks at each query by itself, as projecting does."""
        return each_query_alone(self.pattern)

    def layout(self, qk: QK, layer: int) -> Layout:
        """That of the pattern in the projected space."""
        return layout_of(self.pattern, self.projections(qk, layer), layer)

    def cost(self, tokens: int, size: int) -> float:
        """Projecting the query and a key, and what the pattern costs there."""
        return self.projections.cost + cost_of(self.pattern, tokens, self.projections.size or size)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Projecting a key, and what the pattern costs each of them there."""
        return self.projections.cost_of_keys + cost_of_keys(self.pattern, tokens, self.projections.size or size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, D)``."""
        return self.pattern(self.projections(qk, layer), layer)


@dataclass(frozen=True)
class Blocked:
    """Any pattern, applied to chunks of consecutive tokens: an edge between two chunks is all their pairs.

    The vector of a chunk is the concatenation of its tokens' vectors, zeros for padding, as published. Chunks are counted from
    a sentence's first real token, so padding on the left moves nothing.

    Args:
        pattern: Sees chunks as tokens, ``(B, H, ⌈N/b⌉, b·D)``.
        size: ``b``, tokens in a chunk.
    """

    pattern: Pattern
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"block_size must be 1 token or more, got {self.size}")

    @property
    def tail(self) -> bool:
        """Whether the pattern has a tail, which is of the tokens in the chunks."""
        return has_tail(self.pattern)

    @property
    def reads_ahead(self) -> str:
        """What is read of later tokens in causal attention: in a chunk of more than one, those of the chunk too."""
        return "the later tokens of its own chunk" if self.size > 1 else reads_ahead(self.pattern)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Buckets of blocks, for the tokens in them; a `UserError` for a window or global tokens."""
        layout = layout_of(self.pattern, self._chunks(qk), layer)
        if layout.window or layout.is_global is not None:
            raise UserError("a window or global tokens of blocks have no bucketed form: unite them outside the blocks")
        if layout.buckets is None:
            return layout
        q_ids = self._to_tokens(layout.buckets.q_ids, 2, qk.queries_valid)
        k_ids = self._to_tokens(layout.buckets.k_ids, 2, qk.valid)
        return Layout(Buckets(q_ids, k_ids, layout.buckets.count), tail=layout.tail)

    def cost(self, tokens: int, size: int) -> float:
        """That of chunks, shared by the queries of a chunk."""
        return cost_of(self.pattern, -(-tokens // self.size), self.size * size) / self.size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """That of chunks, shared by the keys of a chunk."""
        return cost_of_keys(self.pattern, -(-tokens // self.size), self.size * size) / self.size

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        edges = self.pattern(self._chunks(qk), layer)
        return self._to_tokens(self._to_tokens(edges, 2, qk.queries_valid), 3, qk.valid) & qk.allowed

    def _chunks(self, qk: QK) -> QK:
        back, back_queries = -_first_real(qk.valid), -_first_real(qk.queries_valid)
        query_valid = None if qk.query_valid is None else _rolled(qk.query_valid, back_queries, 1)
        q, k = _rolled(qk.q, back_queries, 2), _rolled(qk.k, back, 2)
        return QK(q, k, _rolled(qk.valid, back, 1), qk.causal, query_valid).in_blocks(self.size)

    def _to_tokens(self, x: Tensor, dim: int, valid: Tensor) -> Tensor:
        """Each token gets what its chunk has, along a dimension whose tokens are ``valid (B, N)``."""
        tokens = x.repeat_interleave(self.size, dim=dim).narrow(dim, 0, valid.shape[1])
        return _rolled(tokens, _first_real(valid), dim)


@dataclass(frozen=True)
class Causal:
    """Any pattern, without the future: edge iff the pattern has it in causal attention, and ``j ≤ i``.

    In a causal model every pattern is causal (`QK.causal`) and this changes nothing. Wrapped around one part of a union it
    lets only that part look back, and wrapped around a whole pattern it shows what the past by itself would give in a
    bidirectional model. Cross-attention has no past: it is refused with a `UserError`.

    Args:
        pattern: Is asked with ``causal=True``.
    """

    pattern: Pattern

    @property
    def tail(self) -> bool:
        """Whether the pattern has a tail."""
        return has_tail(self.pattern)

    def layout(self, qk: QK, layer: int) -> Layout:
        """The pattern's layout; a `UserError` in bidirectional attention, since a layout cannot say which side to see."""
        qk.one_text(type(self).__name__)
        if not qk.causal:
            raise UserError(
                "a causal pattern in bidirectional attention has no bucketed form: use attention=masked for it"
            )
        return layout_of(self.pattern, qk, layer)

    def cost(self, tokens: int, size: int) -> float:
        """That of the pattern."""
        return cost_of(self.pattern, tokens, size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        qk.one_text(type(self).__name__)
        return self.pattern(replace(qk, causal=True), layer)


@dataclass(frozen=True)
class ShareInGroup:
    """Any pattern, asked once for the heads that share their keys: it sees the mean of their queries, and all get its graph.

    A prediction costs as much less as there are heads in a group, and what is learned for it has ``H_k`` heads.

    Args:
        pattern: Sees vectors ``(B, H_k, N, D)``.
        group: ``g``, heads of queries that share one of keys.
    """

    pattern: Pattern
    group: int

    @property
    def tail(self) -> bool:
        """Whether the pattern has a tail, which is of each head's own keys and values."""
        return has_tail(self.pattern)

    def cost(self, tokens: int, size: int) -> float:
        """That of the pattern, shared by the heads of a group."""
        return cost_of(self.pattern, tokens, size) / self.group

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """That of the pattern, shared by the heads of a group."""
        return cost_of_keys(self.pattern, tokens, size) / self.group

    def layout(self, qk: QK, layer: int) -> Layout:
        """Bucket ids of a group for each of its heads; a `UserError` where the pattern has no layout."""
        layout = layout_of(self.pattern, self._shared(qk), layer)
        if layout.buckets is None:
            return layout
        q_ids, k_ids = (
            ids.repeat_interleave(self.group, dim=1) for ids in (layout.buckets.q_ids, layout.buckets.k_ids)
        )
        return replace(layout, buckets=Buckets(q_ids, k_ids, layout.buckets.count))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.pattern(self._shared(qk), layer).repeat_interleave(self.group, dim=1)

    def _shared(self, qk: QK) -> QK:
        keys = qk.k if qk.group == self.group else qk.k[:, :: self.group]
        return qk.with_vectors(qk.q.unflatten(1, (-1, self.group)).mean(2), keys)


def layout_of(pattern: Pattern, qk: QK, layer: int) -> Layout:
    """The layout of a pattern.

    Args:
        pattern: Any pattern.
        qk: Queries and keys of the layer.
        layer: Index of the layer.

    Returns:
        The graph in its bucketed form.

    Raises:
        UserError: Where the pattern has no such form and can only be run as a mask.
    """
    if not isinstance(pattern, HasLayout):
        raise UserError(
            f"{type(pattern).__name__} compares every pair and has no bucketed form: use attention=masked for it"
        )
    return pattern.layout(qk, layer)


def _first_real(valid: Tensor) -> Tensor:
    """Index of the first real token of each example, ``(B,)``."""
    return valid.long().argmax(-1)


def _rolled(x: Tensor, by: Tensor, dim: int) -> Tensor:
    """``x (B, …)`` with each example moved ``by (B,)`` positions along ``dim``, around the end."""
    if not bool(by.any()):
        return x
    positions = (torch.arange(x.shape[dim], device=x.device) - by[:, None]) % x.shape[dim]
    shape = [size if d in (0, dim) else 1 for d, size in enumerate(x.shape)]
    return x.gather(dim, positions.view(shape).expand(x.shape))
