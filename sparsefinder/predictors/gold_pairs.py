"""Which keys a query attends to and which it does not: the pairs that projections learn from.

A gold graph is computed once and kept as the sorted columns of its positives, a few per row. A negative is then drawn
without ever looking at an N × N matrix: the ``u``-th zero of a row lies at ``u`` plus the number of positives before it, and
that number is found by one binary search in ``p_k − k``, which is sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefinder.executors.support_lists import support
from sparsefinder.graphs import QK
from sparsefinder.storage.tensor_files import load_tensors, save_tensors


@dataclass(frozen=True)
class GoldPairs:
    """The positives of one example as flat lists over heads and queries.

    Row ``h · n + i`` is query ``i`` of head ``h``.

    Args:
        rows: ``(P,)`` int64, the row of each pair, sorted by row and then by column.
        columns: ``(P,)`` int64, the key of each pair.
        zeros: ``(H·n,)`` int64, how many allowed keys of each row are not attended to.
        tokens: Keys, ``n``, or as many as the other text has.
    """

    rows: Tensor
    columns: Tensor
    zeros: Tensor
    tokens: int

    @classmethod
    def of(cls, graph: Tensor, allowed: Tensor) -> GoldPairs:
        """The pairs of a graph.

        Args:
            graph: ``(H, n, N)`` bool.
            allowed: ``(n, N)`` bool, all keys of a row up to some position.
        """
        heads, queries, tokens = graph.shape
        flat = graph.reshape(heads * queries, tokens)
        rows, columns = flat.nonzero(as_tuple=True)
        return cls(rows, columns, allowed.sum(-1).repeat(heads) - flat.sum(-1), tokens)

    def chances(self, generator: torch.Generator) -> Tensor:
        """A number in [0, 1) for each positive whose row has a zero, and 0 for the others: ``(P,)`` float64."""
        drawn = torch.zeros(len(self.rows), dtype=torch.float64)
        wanted = self.zeros > 0
        if bool(wanted.all()):
            return drawn.uniform_(generator=generator)
        kept = wanted[self.rows]
        drawn[kept] = torch.rand(int(kept.sum()), generator=generator, dtype=torch.float64)
        return drawn

    def draw_negatives(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A negative for each positive, uniform over the allowed zeros of its row, with replacement.

        Args:
            generator: Draws a number for each.

        Returns:
            ``(kept, columns)``, both int64: the positives (as indices into ``rows``) whose row has a zero at all, and for each
            of them a key that its query does not attend to: never padding, never the future, never a positive.
        """
        kept = (self.zeros[self.rows] > 0).nonzero().squeeze(-1)
        rows = self.rows[kept]
        order = (self.chances(generator)[kept] * self.zeros[rows]).long()
        span = self.tokens + 1
        begins = torch.searchsorted(self.rows, torch.arange(len(self.zeros)))
        rank = torch.arange(len(self.rows)) - begins[self.rows]
        before = torch.searchsorted(self.rows * span + self.columns - rank, rows * span + order, right=True)
        return kept, order + before - begins[rows]


@dataclass(frozen=True)
class PairsOnDisk:
    """The positives of many examples in a folder, a file each: read when they are asked for, so many need no more memory."""

    folder: Path

    def put(self, index: int, pairs: GoldPairs) -> None:
        """Keep those of example ``index``."""
        sides = {"rows": pairs.rows.int(), "columns": pairs.columns.int(), "zeros": pairs.zeros.int()}
        save_tensors({**sides, "tokens": pairs.tokens}, self.folder / f"{index}.pt")

    def __getitem__(self, index: int) -> GoldPairs:
        tensors = load_tensors(self.folder / f"{index}.pt", "gold pairs")
        return GoldPairs(tensors["rows"].long(), tensors["columns"].long(), tensors["zeros"].long(), tensors["tokens"])


def gold_pairs(qk: QK, alpha: float, block_size: int = 1, symmetric: bool = False) -> GoldPairs:
    """Positives of a batch of one example: ``p_ij > 0`` under α-entmax.

    Args:
        qk: One example without padding, ``(1, H, n, D)``.
        alpha: Of the entmax, 1 < α ≤ 2.
        block_size: Tokens in a chunk; above 1, pairs of chunks, positive where any of their token pairs is.
        symmetric: Positive where either direction is, which is what one projection of ``[q; k]`` for both sides can express.

    Returns:
        The pairs of all heads.

    Raises:
        ValueError: For several examples, or padding.
    """
    if qk.q.shape[0] != 1 or not qk.valid.all():
        raise ValueError("gold_pairs takes one example without padding")
    if symmetric:
        qk.one_text("one projection for both sides")
    heads = qk.q.shape[1]
    queries, keys = (-(-side.shape[2] // block_size) for side in (qk.q, qk.k))
    found = support(qk, alpha)
    rows, columns = found.rows, found.keys
    if block_size > 1 or symmetric:
        head, query = rows // qk.q.shape[2], rows % qk.q.shape[2] // block_size
        rows, columns = _once(head, query, columns // block_size, (queries, keys), symmetric, qk.causal)
    allowed = torch.arange(1, keys + 1) if qk.causal else torch.tensor([keys]).expand(queries)
    counts = torch.bincount(rows, minlength=heads * queries)
    return GoldPairs(rows, columns, allowed.to(rows.device).repeat(heads) - counts, keys)


def _once(
    heads: Tensor, queries: Tensor, keys: Tensor, size: tuple[int, int], symmetric: bool, causal: bool
) -> tuple[Tensor, Tensor]:
    """Rows and columns of pairs that may be named several times, sorted and each once; in both directions where symmetric."""
    if symmetric:
        heads, queries, keys = heads.repeat(2), torch.cat([queries, keys]), torch.cat([keys, queries])
    pair_ids = ((heads * size[0] + queries) * size[1] + keys)[(keys <= queries) | (not causal)].unique()
    return pair_ids // size[1], pair_ids % size[1]


def mean_of_heads(values: Tensor, heads: Tensor, count: int) -> Tensor:
    """The mean over heads of the mean of each head's values; a head without any has a mean of 0.

    Args:
        values: ``(P,)``.
        heads: ``(P,)`` int64, the head of each value.
        count: ``H``.

    Returns:
        A scalar.
    """
    sums = values.new_zeros(count).index_add(0, heads, values)
    return (sums / torch.bincount(heads, minlength=count).clamp_min(1)).mean()
