"""What every attention does to its inputs first: padding becomes zeros, scores are float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def without_padding(x: Tensor, valid: Tensor) -> Tensor:
    """Vectors with zeros on padding: a NaN there would survive a product with probability 0.

    Args:
        x: ``(B, H, N, D)``.
        valid: ``(B, N)`` bool, True on real tokens.

    Returns:
        ``x`` itself where no token is padded, else a copy.
    """
    return x if bool(valid.all()) else x.masked_fill(~valid[:, None, :, None], 0.0)


def right_padded(valid: Tensor) -> list[int] | None:
    """Real tokens of each example of ``valid (B, N)`` where all padding is on the right; None where it is not."""
    batch, tokens = valid.shape
    if bool(valid.all()):
        return [tokens] * batch
    lengths = valid.sum(-1)
    in_front = torch.arange(tokens, device=valid.device) < lengths[:, None]
    return lengths.tolist() if torch.equal(in_front, valid) else None


def at_least_float32(x: Tensor) -> Tensor:
    """The dtype that scores are computed in: half precision becomes float32, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def exactly(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they are multiplied where half precision is not: ``v`` in the dtype of ``q``."""
    exact = at_least_float32(q)
    return exact, at_least_float32(k), v.to(exact.dtype)
