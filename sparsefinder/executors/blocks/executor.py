"""A layout by torch's products on any device: cut into blocks, a few heads at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.blocks.decompose import Blocks, decompose
from sparsefinder.executors.blocks.head_chunks import HeadChunks, chunk_heads
from sparsefinder.executors.workload import Work
from sparsefinder.graphs import QK, Layout
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.padding import at_least_float32


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
        """``v (B, H, N, D)`` and vectors without what padding contained → ``(B, H, N, D)`` in the dtype of ``v``."""
        chunks = self._chunks(qk, layout)
        vectors = (chunks.split(x) for x in (at_least_float32(qk.q), at_least_float32(qk.k), v))
        parts = zip(chunks.split_layout(layout, qk), *vectors, strict=True)
        return chunks.join([_attend(decompose(*part), q, k, v, normalizer) for part, q, k, v in parts])

    def computed_pairs(self, qk: QK, layout: Layout) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64."""
        chunks = self._chunks(qk, layout)
        return chunks.join([decompose(*part).computed_pairs() for part in chunks.split_layout(layout, qk)])

    @torch.no_grad()
    def _chunks(self, qk: QK, layout: Layout) -> HeadChunks:
        times = 1.0  # that a query is multiplied, once for each of its buckets
        if layout.buckets is not None and layout.buckets.q_ids.numel():
            times = max((layout.buckets.q_ids >= 0).sum(-1).double().mean().item(), 1.0)
        return chunk_heads(qk, max(int(self.queries_at_once / times), 1))


def _attend(blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, normalizer: Normalizer) -> Tensor:
    q = q / math.sqrt(q.shape[-1])
    rows = blocks.packed_rows()
    probabilities = normalizer.each(rows.pack(blocks.scores(q, k)))
    out = blocks.apply(rows.unpack(probabilities).to(v.dtype), v)
    if blocks.globals is None:
        return out
    probabilities_of_globals = normalizer(blocks.globals.query_scores(q, k))
    return blocks.globals.add(out, probabilities_of_globals.to(v.dtype) @ v)
