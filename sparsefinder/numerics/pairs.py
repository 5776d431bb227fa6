"""Which pairs of positions there are: of real tokens, without the future, or near each other."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_pairs(
    valid: Tensor, causal: bool = False, query_valid: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Pairs of real tokens, without the future where attention is causal.

    Args:
        valid: ``(B, N_k)`` bool, True on real tokens.
        causal: Whether a query sees no later key.
        query_valid: ``(B, N_q)`` bool, the queries of cross-attention; None where they are the same tokens.
        rows: ``(S,)`` int64, positions of the queries that are asked about; None for all, in their order.

    Returns:
        ``(B, 1, N_q, N_k)`` bool, or ``S`` rows of it, False on every pair with a padded token.
    """
    queries = valid if query_valid is None else query_valid
    pairs = some(queries, rows)[:, None, :, None] & valid[:, None, None, :]
    if causal:
        positions = torch.arange(valid.shape[-1], device=valid.device)
        pairs = pairs & (positions <= some(positions, rows)[:, None])
    return pairs


def some(x: Tensor, rows: Tensor | None) -> Tensor:
    """Elements of the last dimension, by their positions ``(S,)`` int64; all where None are named."""
    return x if rows is None else x[..., rows]


def band(tokens: int, window: int, device: torch.device | None = None, rows: Tensor | None = None) -> Tensor:
    """Pairs of a local window.

    Args:
        tokens: ``N``.
        window: Width in tokens.
        device: Where the result lies.
        rows: ``(S,)`` int64, positions of the queries that are asked about; None for all.

    Returns:
        ``(S or N, N)`` bool: keys at most ``window // 2`` positions away.
    """
    positions = torch.arange(tokens, device=device)
    return (some(positions, rows)[:, None] - positions[None, :]).abs() <= window // 2
