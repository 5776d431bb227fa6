"""Random queries and keys of ragged sentences, the same vectors whichever side they are padded on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsefinder.graphs import QK


def random_qk(
    lengths: Sequence[int],
    heads: int = 2,
    size: int = 8,
    causal: bool = False,
    seed: int = 0,
    padding: float = 7.0,
    left: bool = False,
) -> QK:
    """Normal queries and keys; the vectors of a sentence are the same whichever side it is padded on.

    Args:
        lengths: Tokens of each sentence.
        heads: ``H``.
        size: ``D``.
        causal: Whether a query sees no later key.
        seed: Of the vectors.
        padding: What padded positions hold.
        left: Whether sentences are padded on the left instead of the right.

    Returns:
        Vectors ``(B, H, N, D)`` float32, ``N`` the longest length.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    q, k = torch.randn(2, len(lengths), heads, longest, size, generator=generator)
    padded = ~valid[:, None, :, None]
    qk = QK(q.masked_fill(padded, padding), k.masked_fill(padded, padding), valid, causal)
    if not left:
        return qk
    order = (torch.arange(longest) + torch.tensor(lengths)[:, None]) % longest  # the last slot gets the last token
    rows = torch.arange(len(lengths))[:, None]
    q, k = (x.transpose(1, 2)[rows, order].transpose(1, 2) for x in (qk.q, qk.k))
    return QK(q, k, valid[rows, order], causal)


def random_cross(
    queries: Sequence[int], keys: Sequence[int], heads: int = 2, size: int = 8, padding: float = 7.0, left: bool = False
) -> QK:
    """Normal queries and keys of two texts, see `random_qk`.

    Args:
        queries: Tokens of each text that asks.
        keys: Tokens of each text that is looked at.
        heads: ``H``.
        size: ``D``.
        padding: What padded positions hold.
        left: Whether texts are padded on the left.
    """
    asking, asked = (random_qk(each, heads, size, False, s, padding, left) for s, each in enumerate((queries, keys)))
    return QK(asking.q, asked.k, asked.valid, query_valid=asking.valid)


def single_sentence(qk: QK, index: int) -> QK:
    """One sentence of a batch padded on the right, without its padding: vectors ``(1, H, n, D)``."""
    tokens = int(qk.lengths[index])
    part = slice(index, index + 1)
    return QK(qk.q[part, :, :tokens], qk.k[part, :, :tokens], qk.valid[part, :tokens], qk.causal)
