"""Attention graphs: who may look at whom, and the form that every pattern shares.

Letters used in the whole package: ``B`` batch, ``L`` layers, ``H`` heads (``H_k`` of the keys where they are shared), ``N``
tokens (``N_q`` and ``N_k`` where queries and keys are of two texts), ``D`` head size, ``R`` projected size, ``C`` clusters,
``W`` window. A *graph* is a bool tensor ``(B, H, N, N)``; **True means that the query (row) may
attend to the key (column)**, the sign of ``torch.nn.functional.scaled_dot_product_attention``. A graph is never True on
a pair that is not allowed: both tokens are real, and the key does not lie after the query where attention is causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.numerics.pairs import allowed_pairs, band, some


@dataclass(frozen=True)
class QK:
    """Queries and keys of one layer.

    ``q`` and ``k`` may also be projections of size ``R``: a pattern does not care which space it is given. Heads may be
    *grouped*: ``g = H / H_k`` heads of queries share one of keys. In *cross-attention* queries and keys are tokens of two
    texts; it is never causal, since no key of another text lies after a query.

    Args:
        q: Queries, ``(B, H, N_q, D)`` floating point, not rescaled (scores are ``q·k / √D``). What padded positions contain
            never matters.
        k: Keys, ``(B, H_k, N_k, D)``, ``H`` a multiple of ``H_k``; their padding never matters either.
        valid: ``(B, N_k)`` bool, True on real tokens.
        causal: Whether a query sees no later key.
        query_valid: Of cross-attention: ``(B, N_q)`` bool, True on real queries. None where queries and keys are the same
            tokens.
    """

    q: Tensor
    k: Tensor
    valid: Tensor
    causal: bool = False
    query_valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.q.ndim != 4 or self.k.ndim != 4 or self.q.shape[::3] != self.k.shape[::3]:
            raise ValueError(
                f"queries and keys must be (B, H, N_q, D) and (B, H_k, N_k, D), got {tuple(self.q.shape)} and "
                f"{tuple(self.k.shape)}"
            )
        if self.q.shape[1] % max(self.k.shape[1], 1):
            raise ValueError(f"{self.q.shape[1]} heads of queries cannot share {self.k.shape[1]} heads of keys evenly")
        if not self.crosses and self.q.shape[2] != self.k.shape[2]:
            raise ValueError(
                f"{self.q.shape[2]} queries and {self.k.shape[2]} keys are not the same tokens: cross-attention needs "
                "query_valid"
            )
        if self.crosses and self.causal:
            raise ValueError("cross-attention cannot be causal: no key lies after a query of another text")
        for name, mask, side in (("valid", self.valid, self.k), ("query_valid", self.queries_valid, self.q)):
            if mask.shape != side.shape[::2] or mask.dtype != torch.bool:
                expected = tuple(side.shape[::2])
                raise ValueError(f"{name} must be bool {expected}, got {mask.dtype} {tuple(mask.shape)}")

    @property
    def crosses(self) -> bool:
        """Whether queries and keys are tokens of two texts."""
        return self.query_valid is not None

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys, ``g``; 1 where each has its own."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    @property
    def queries_valid(self) -> Tensor:
        """``(B, N_q)`` bool, True on real queries."""
        return self.valid if self.query_valid is None else self.query_valid

    @property
    def lengths(self) -> Tensor:
        """Real keys of each example, ``(B,)`` int64."""
        return self.valid.sum(-1)

    @property
    def positions(self) -> Tensor:
        """Position of each key among the real ones of its example, ``(B, N_k)`` int64 from 0; on padding any that there is."""
        return _positions(self.valid)

    @property
    def query_positions(self) -> Tensor:
        """The same of the queries, ``(B, N_q)``."""
        return _positions(self.queries_valid)

    @property
    def allowed(self) -> Tensor:
        """Pairs that may attend at all, ``(B, 1, N_q, N_k)`` bool."""
        return self.allowed_of(None)

    def allowed_of(self, queries: Tensor | None) -> Tensor:
        """The rows of `allowed` of some queries, by their positions ``(S,)`` int64: ``(B, 1, S, N_k)``; None for all."""
        return allowed_pairs(self.valid, self.causal, self.query_valid, queries)

    @property
    def numbers_allowed(self) -> Tensor:
        """How many pairs may attend in each example, ``(B,)`` int64, without a matrix of N × N."""
        keys = self.valid.long().cumsum(-1) if self.causal else self.lengths[:, None]
        return (self.queries_valid * keys).sum(-1)

    def of_queries(self, queries: Tensor) -> QK:
        """Some of the queries, by their positions ``(S,)`` int64, beside all keys: as if they were of another text.

        For what looks at each query by itself. Not of causal attention, since a position among all tokens is lost.
        """
        if self.causal:
            raise ValueError("some queries of causal attention cannot stand alone: a key lies after them or not")
        return replace(self, q=self.q[:, :, queries], query_valid=self.queries_valid[:, queries])

    @property
    def graph_shape(self) -> torch.Size:
        """``(B, H, N_q, N_k)``."""
        return torch.Size((*self.q.shape[:3], self.k.shape[2]))

    @property
    def a_key_each(self) -> QK:
        """The same with keys repeated, so that every head of queries has its own: what patterns are shown."""
        return self if self.group == 1 else replace(self, k=self.k.repeat_interleave(self.group, dim=1))

    @property
    def swapped(self) -> QK:
        """Queries in the place of keys and the other way round, for what is done to both sides alike."""
        return replace(
            self, q=self.k, k=self.q, valid=self.queries_valid, query_valid=self.valid if self.crosses else None
        )

    def scores(self) -> Tensor:
        """``q·k / √D`` on allowed pairs, ``-inf`` elsewhere: ``(B, H, N_q, N_k)`` in the dtype of ``q``."""
        products = self.q @ self.a_key_each.k.transpose(-1, -2) / math.sqrt(self.q.shape[-1])
        return products.masked_fill(~self.allowed, -math.inf)

    def in_blocks(self, size: int) -> QK:
        """Chunks of ``size`` consecutive tokens as tokens, valid where any of theirs is.

        Args:
            size: Tokens in a chunk, ``b``.

        Returns:
            Chunks whose vector is the concatenation of their tokens' vectors, ``(B, H, ⌈N/b⌉, b·D)``, with zeros for padding.
        """
        q, query_valid = _chunks(self.q, self.queries_valid, size)
        k, valid = _chunks(self.k, self.valid, size)
        return QK(q, k, valid, self.causal, query_valid if self.crosses else None)

    def part(self, examples: Tensor) -> QK:
        """Some of the examples, by their numbers ``(b,)`` int64."""
        names = ("q", "k", "valid", *(("query_valid",) if self.crosses else ()))
        return replace(self, **{name: getattr(self, name)[examples] for name in names})

    def with_vectors(self, q: Tensor, k: Tensor) -> QK:
        """The same tokens with other vectors, for instance projected ones."""
        return replace(self, q=q, k=k)

    def one_text(self, what: str) -> None:
        """Refuse cross-attention, by a `UserError`, in the name of ``what`` has an idea that needs a diagonal."""
        if self.crosses:
            raise UserError(
                f"{what} compares positions within one text, and cross-attention has two: choose a "
                "pattern of vectors, such as kmeans, quantize, distance or routed"
            )


def _positions(valid: Tensor) -> Tensor:
    return (valid.long().cumsum(-1) - 1).clamp_min(0)


def _chunks(x: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    missing = -x.shape[2] % size
    filled = F.pad(x.masked_fill(~valid[:, None, :, None], 0.0), (0, 0, 0, missing))
    return filled.unflatten(2, (-1, size)).flatten(3), F.pad(valid, (0, missing)).unflatten(1, (-1, size)).any(-1)


@runtime_checkable
class Pattern(Protocol):
    """``(QK, layer) → graph``: a predictor and a fixed baseline are the same thing."""

    def __call__(self, qk: QK, layer: int) -> Tensor: ...


class Attention(Protocol):
    """``(q, k, v, valid, layer) → output (B, H, N, D)``; a query without an allowed key, or padded, gets zeros.

    Keys and values may have fewer heads, which are shared. An attention that can be run between two texts takes
    ``query_valid`` besides, as `QK` has it.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor: ...


@dataclass(frozen=True)
class Buckets:
    """A graph as memberships: a query and a key are joined iff they share a bucket.

    Ids are unique over rounds (round ``r`` of a method with ``m`` buckets uses ``r·m … r·m + m − 1``) and a token names a
    bucket at most once. Ids of padded tokens are arbitrary: whoever reads them masks with ``valid``.

    Args:
        q_ids: ``(B, H, N_q, P)`` int64, the buckets of each query in ``[0, count)``, or -1 where it is in fewer buckets than
            others.
        k_ids: ``(B, H, N_k, P')`` int64, the same for each key, for each head of queries where keys are shared.
        count: Number of buckets of each example and head.
    """

    q_ids: Tensor
    k_ids: Tensor
    count: int

    def graph(self, allowed: Tensor, rows: Tensor | None = None) -> Tensor:
        """The dense form: a query sees the members of its buckets, a row of the table for each.

        Args:
            allowed: Pairs that may attend, bool, of as many queries.
            rows: ``(S,)`` int64, positions of the queries that are asked about; None for all.

        Returns:
            ``(B, H, S or N_q, N_k)`` bool.
        """
        batch, heads, tokens, _ = self.k_ids.shape
        q_ids = self.q_ids if rows is None else self.q_ids[:, :, rows]
        queries = q_ids.shape[2]
        inside = torch.zeros(batch, heads, tokens, self.count + 1, dtype=torch.bool, device=allowed.device)
        inside.scatter_(-1, self._slots(self.k_ids), True)
        inside[..., self.count] = False  # where no bucket is
        members = inside.mT.reshape(-1, tokens)
        first = torch.arange(batch * heads, device=allowed.device).view(batch, heads, 1, 1) * (self.count + 1)
        lines = batch * heads * queries
        seen = torch.zeros(lines, tokens, dtype=torch.bool, device=allowed.device)
        for bucket in (self._slots(q_ids) + first).reshape(lines, -1).unbind(-1):
            seen |= members.index_select(0, bucket)
        return seen.view(batch, heads, queries, tokens) & allowed

    def _slots(self, ids: Tensor) -> Tensor:
        return torch.where(ids < 0, self.count, ids)


class ChosenBuckets(Buckets):
    """Buckets whose ``q_ids`` are found when asked for; an executor that chooses while it multiplies never does.

    Args:
        choose: Gives ``q_ids``.
        k_ids: As those of `Buckets`.
        count: The same.
        levels: ``(H,)`` float64, by which they are chosen.
        alpha: Of the normalizer by which the entries weigh; 1 for softmax.
    """

    levels: Tensor
    alpha: float
    _choose: Callable[[], Tensor]

    def __init__(self, choose: Callable[[], Tensor], k_ids: Tensor, count: int, levels: Tensor, alpha: float):
        self.__dict__.update(_choose=choose, k_ids=k_ids, count=count, levels=levels, alpha=alpha)

    @cached_property
    def q_ids(self) -> Tensor:
        """``(B, H, N, P)`` int64, -1 for none."""
        return self._choose()


@dataclass(frozen=True)
class Layout:
    """A graph in the compressed form that bucketed attention executes: buckets ∪ a local window ∪ global tokens.

    With a *tail*, the keys of a bucket that a query does not see one by one are one entry among its scores instead of absent:
    ``n_ic`` keys whose scores have the mean ``q_i·μ_c / √D`` and the variance ``Σ_r q_ir² σ²_cr / D``, and the mean of the
    bucket's values. ``μ_c``, ``σ²_c`` and that mean are over all keys of the bucket that are allowed, ``n_ic`` are those of them
    that are not in the graph. Keys in no bucket have no tail. What a normalizer makes of such an entry:
    `sparsefinder.numerics.tail_normalizer`.

    Args:
        buckets: Memberships of queries and keys; None for none.
        window: Odd width ``W`` in tokens, the query itself and ``W // 2`` keys on each side; 0 for none.
        is_global: ``(B, N)`` bool, tokens that attend to all and are attended by all; None for none.
        tail: Whether there is a tail; then every key is in one bucket at most, so that ``k_ids`` has one slot.
    """

    buckets: Buckets | None = None
    window: int = 0
    is_global: Tensor | None = None
    tail: bool = False

    def __post_init__(self) -> None:
        if self.tail and (self.buckets is None or self.buckets.k_ids.shape[-1] != 1):
            slots = 0 if self.buckets is None else self.buckets.k_ids.shape[-1]
            raise UserError(
                f"a tail needs every key in one bucket, here it may be in {slots}: unite a pattern that has a tail with a window "
                "and global tokens only, or set tail=false"
            )

    def union(self, other: Layout) -> Layout:
        """Edges of either layout, and the tail of either; only one of the two may have buckets then."""
        mine, theirs = self.is_global, other.is_global
        is_global = theirs if mine is None else mine if theirs is None else mine | theirs
        buckets = _join_buckets(self.buckets, other.buckets)
        return Layout(buckets, max(self.window, other.window), is_global, self.tail or other.tail)

    @property
    def entries(self) -> int:
        """Entries of a query besides its keys: as many as there are buckets where there is a tail."""
        return self.buckets.count if self.tail and self.buckets is not None else 0

    def graph(self, qk: QK, rows: Tensor | None = None) -> Tensor:
        """The dense form, on allowed pairs only; of a layout with a tail the part that is exact.

        Args:
            qk: Queries and keys.
            rows: ``(S,)`` int64, positions of the queries that are asked about, which then cost ``S · N``; None for all.

        Returns:
            ``(B, H, S or N_q, N_k)`` bool.
        """
        if self.window or self.is_global is not None:
            qk.one_text("a window or global tokens")
        allowed = qk.allowed_of(rows).expand(-1, qk.q.shape[1], -1, -1)
        edges = torch.zeros_like(allowed)
        if self.buckets is not None:
            edges = edges | self.buckets.graph(allowed, rows)
        if self.window:
            edges = edges | (band(qk.q.shape[2], self.window, qk.q.device, rows) & allowed)
        if self.is_global is not None:
            rows_or_columns = some(self.is_global, rows)[:, None, :, None] | self.is_global[:, None, None, :]
            edges = edges | (rows_or_columns & allowed)
        return edges


@runtime_checkable
class HasLayout(Protocol):
    """A pattern that can also say its graph without building it, so that work can be skipped for real."""

    def layout(self, qk: QK, layer: int) -> Layout:
        """Buckets, window and global tokens that give the graph of these queries and keys."""


def has_tail(pattern: Pattern) -> bool:
    """Whether the layouts of a pattern have a tail, which its graph does not show: its attribute ``tail``, if there is one."""
    return bool(getattr(pattern, "tail", False))


def each_query_alone(pattern: Pattern) -> bool:
    """Whether what a pattern predicts for a query depends on no other query and on no position of it."""
    return bool(getattr(pattern, "each_query_alone", False))


def reads_ahead(pattern: object) -> str:
    """What a pattern reads of later tokens in causal attention: its attribute ``reads_ahead``; empty where there is none.

    What is put around one ``pattern``, and has no such attribute, reads what that one does.
    """
    own: str | None = getattr(pattern, "reads_ahead", None)
    wrapped = getattr(pattern, "pattern", None)
    return own or "" if own is not None or wrapped is None else reads_ahead(wrapped)


def _join_buckets(first: Buckets | None, second: Buckets | None) -> Buckets | None:
    if first is None or second is None:
        return first or second
    q_ids, k_ids = (shifted(ids, first.count) for ids in (second.q_ids, second.k_ids))
    return Buckets(
        torch.cat([first.q_ids, q_ids], dim=-1), torch.cat([first.k_ids, k_ids], dim=-1), first.count + second.count
    )


def shifted(ids: Tensor, by: int | Tensor) -> Tensor:
    """Bucket ids moved to another range.

    Args:
        ids: Bucket ids of any shape, int64.
        by: What is added, a number or a tensor that broadcasts to ``ids``.

    Returns:
        The ids of the same shape; -1, no bucket, stays.
    """
    return torch.where(ids < 0, ids, ids + by)
