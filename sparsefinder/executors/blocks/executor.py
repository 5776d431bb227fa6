"""A layout by torch's products on any device: cut into blocks, a few heads at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.blocks.decompose import decompose
from sparsefinder.executors.blocks.head_chunks import HeadChunks, chunk_heads
from sparsefinder.executors.blocks.row_packing import PackedRows
from sparsefinder.executors.blocks.tail import Entries, entries
from sparsefinder.executors.workload import Work
from sparsefinder.graphs import QK, Layout
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.padding import at_least_float32
from sparsefinder.numerics.tail_normalizer import with_clusters

_ENTRIES_OF_A_QUERY = 64  # of a tail, that take about the memory of a query in one bucket


@dataclass(frozen=True)
class BlocksExecutor:
    """A layout in blocks: buckets of like size are one product, filled up to that size."""

    queries_at_once: int = 1 << 15  # queries (once for each bucket) whose scores are in memory at one time
    name = "blocks"
    never_automatic = ""

    def __post_init__(self) -> None:
        if self.queries_at_once < 1:
            raise UserError(f"queries_at_once must be 1 query or more, got {self.queries_at_once}")

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        return ""

    def attend(self, qk: QK, v: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """``v (B, H_k, N_k, D)`` and vectors without what padding contained → ``(B, H, N_q, D)`` in the dtype of ``v``."""
        qk, v = qk.a_key_each, v.repeat_interleave(qk.group, dim=1)
        chunks = self._chunks(qk, layout)
        vectors = (chunks.split(x) for x in (at_least_float32(qk.q), at_least_float32(qk.k), v))
        parts = zip(chunks.split_layout(layout, qk), *vectors, strict=True)
        return chunks.join([_attend(part, own, q, k, v, normalizer) for (part, own), q, k, v in parts])

    def computed_pairs(self, qk: QK, layout: Layout) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64; an entry of a tail is one too."""
        qk = qk.a_key_each
        chunks = self._chunks(qk, layout)
        pairs = chunks.join([decompose(*part).computed_pairs() for part in chunks.split_layout(layout, qk)])
        return pairs + qk.q.shape[2] * layout.entries

    @torch.no_grad()
    def _chunks(self, qk: QK, layout: Layout) -> HeadChunks:
        times = 1.0  # that a query is multiplied, once for each of its buckets
        if layout.buckets is not None and layout.buckets.q_ids.numel():
            times = max((layout.buckets.q_ids >= 0).sum(-1).double().mean().item(), 1.0)
        times = max(times, layout.entries / _ENTRIES_OF_A_QUERY)
        return chunk_heads(qk, max(int(self.queries_at_once / times), 1))


def _attend(layout: Layout, qk: QK, q: Tensor, k: Tensor, v: Tensor, normalizer: Normalizer) -> Tensor:
    blocks = decompose(layout, qk)
    tail = entries(layout, qk.with_vectors(q, k), v.to(q.dtype)) if layout.tail else None
    q = q / math.sqrt(q.shape[-1])
    rows = blocks.packed_rows()
    rectangles = rows.pack(blocks.scores(q, k))
    if tail is None:
        out = blocks.apply(rows.unpack(normalizer.each(rectangles)).to(v.dtype), v)
    else:
        probabilities, weights = _with_entries(rectangles, rows, blocks.alive, tail, normalizer)
        out = blocks.apply(rows.unpack(probabilities).to(v.dtype), v) + tail.apply(weights).to(v.dtype)
    if blocks.globals is None:
        return out
    probabilities_of_globals = normalizer(blocks.globals.query_scores(q, k))
    return blocks.globals.add(out, probabilities_of_globals.to(v.dtype) @ v)


def _with_entries(
    rectangles: list[Tensor], rows: PackedRows, alive: Tensor, tail: Entries, normalizer: Normalizer
) -> tuple[list[Tensor], Tensor]:
    """Probabilities of the keys in each rectangle, and those of the entries ``(B, H, N, C)``."""
    alone = alive.index_fill(0, rows.order, False).nonzero().squeeze(-1)  # queries that see no key, but a tail
    queries = [*rows.order.split([number for number, _ in rows.shapes]), alone]
    scores = [*rectangles, tail.mean.new_zeros(len(alone), 0)]
    mean, variance, numbers = (x.flatten(0, 2) for x in (tail.mean, tail.variance, tail.numbers))
    parts = [
        with_clusters(keys, mean[each], variance[each], numbers[each], normalizer.alpha)
        for keys, each in zip(scores, queries, strict=True)
    ]
    weights = torch.zeros_like(mean).index_copy(0, torch.cat(queries), torch.cat([each for _, each in parts]))
    return [keys for keys, _ in parts[:-1]], weights.view_as(tail.mean)
