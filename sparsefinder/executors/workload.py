"""What executors are given: vectors on some device, and which pairs of them there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What decides who can do it: where the vectors are, of what precision, and what else is asked for."""

    device: torch.device  # of the queries
    dtypes: tuple[torch.dtype, ...]  # of queries, keys and, where they are at hand, values
    masked: bool = False  # whether pairs are given by a mask besides padding and a band
    dropout: bool = False  # whether some probabilities are set to zero
    learns_alpha: bool = False  # whether the normalizer's α gets a gradient
    tail: bool = False  # whether buckets are handed to the normalizer as entries beside the keys
    disjoint: bool = False  # whether a layout is known to have buckets, each key in one of them at most
    surrounded: bool = False  # whether a layout has a window or global tokens besides buckets
    causal: bool = False  # whether a query sees no later key
    alpha: float = 1.5  # of the normalizer
    crosses: bool = False  # whether queries and keys are tokens of two texts

    @classmethod
    def of(cls, q: Tensor, *others: Tensor) -> Work:
        """The work on these queries, keys and values."""
        return cls(q.device, tuple(x.dtype for x in (q, *others)))


@dataclass(frozen=True)
class Pairs:
    """Which pairs there are: ``query_valid (B, N_q)`` × ``key_valid (B, N_k)``, within a band, and where ``mask`` is True.

    Args:
        query_valid: ``(B, N_q)`` bool.
        key_valid: ``(B, N_k)`` bool.
        back: query ``i`` sees keys from ``i − back`` on; None for all of that side.
        ahead: and up to ``i + ahead``.
        mask: None, or bool ``(B, H, N_q, N_k)`` where each of the first three may be 1.
    """

    query_valid: Tensor
    key_valid: Tensor
    back: int | None = None
    ahead: int | None = None
    mask: Tensor | None = None

    def allowed(self, start: int, end: int) -> Tensor:
        """The pairs of queries ``start`` to ``end``: bool that broadcasts to ``(B, H, end − start, N_k)``."""
        pairs = self.key_valid[:, None, None, :]
        if self.mask is not None:
            pairs = pairs & (self.mask if self.mask.shape[2] == 1 else self.mask[:, :, start:end])
        if self.back is None and self.ahead is None:
            return pairs
        distance = torch.arange(self.key_valid.shape[1], device=pairs.device)
        distance = distance - torch.arange(start, end, device=pairs.device)[:, None]
        if self.back is not None:
            pairs = pairs & (distance >= -self.back)
        return pairs if self.ahead is None else pairs & (distance <= self.ahead)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse vectors that do not belong together, before anything reads beyond their ends.

    Args:
        q: ``(B, H, N_q, D)``.
        k: ``(B, H_k, N_k, D)``, ``H`` a multiple of ``H_k``.
        v: of the shape of ``k``.

    Raises:
        ValueError: the shapes are others.
    """
    if k.shape != v.shape or k.shape[::3] != q.shape[::3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be (B, H, N_q, D), k and v (B, H_k, N_k, D) with H a multiple of H_k, got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
