"""Work on a few heads at a time: heads do not see each other, so memory need not grow with their number.

Tensors that fit the cache and the allocator are also faster: with all of 12 heads of 16,384 tokens at once, bucketed
attention on two CPU cores took twice as long as three heads at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout


@dataclass(frozen=True)
class HeadChunks:
    """Parts of a batch of ``heads`` heads, each of at most ``some_examples`` × ``some_heads``."""

    heads: int
    some_examples: int
    some_heads: int

    def split(self, x: Tensor) -> list[Tensor]:
        """``(B, H, ...)`` → views of the parts, head after head of the first examples, then of the next."""
        return [part for group in x.split(self.some_examples) for part in group.split(self.some_heads, dim=1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        groups = range(0, len(parts), -(-self.heads // self.some_heads))
        return torch.cat([torch.cat(list(parts[i : i + groups.step]), dim=1) for i in groups])

    def split_layout(self, layout: Layout, qk: QK) -> list[tuple[Layout, QK]]:
        """Each part's layout and tokens."""
        vectors = list(zip(self.split(qk.q), self.split(qk.k), self._split_tokens(qk.valid), strict=True))
        queries: Sequence[Tensor | None] = [None] * len(vectors)
        if qk.query_valid is not None:
            queries = self._split_tokens(qk.query_valid)
        qks = [QK(q, k, valid, qk.causal, own) for (q, k, valid), own in zip(vectors, queries, strict=True)]
        buckets: list[Buckets | None] = [None] * len(qks)
        if layout.buckets is not None:
            ids = zip(self.split(layout.buckets.q_ids), self.split(layout.buckets.k_ids), strict=True)
            buckets = [Buckets(q_ids, k_ids, layout.buckets.count) for q_ids, k_ids in ids]
        is_global: Sequence[Tensor | None] = [None] * len(qks)
        if layout.is_global is not None:
            is_global = self._split_tokens(layout.is_global)
        layouts = (Layout(b, layout.window, g, layout.tail) for b, g in zip(buckets, is_global, strict=True))
        return list(zip(layouts, qks, strict=True))

    def _split_tokens(self, x: Tensor) -> list[Tensor]:
        """``(B, N)`` → the same for each part."""
        return [part[:, 0] for part in self.split(x[:, None].expand(-1, self.heads, -1))]


def chunk_heads(qk: QK, queries: int) -> HeadChunks:
    """Parts of at most ``queries`` queries, or of one head of one example where that has more."""
    batch, heads, tokens, _ = qk.q.shape
    tokens = max(tokens, 1)
    some_examples = min(max(queries // tokens, 1), batch)
    return HeadChunks(heads, some_examples, min(max(queries // (tokens * some_examples), 1), heads))
