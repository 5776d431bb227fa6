"""Random numbers that belong to an index, not to a moment.

A random pattern is part of its method: for a seed, layer and head it is the same on every pass over the data, in every
batch, and for a sentence by itself or padded. So the number of a pair is a hash of ``(seed, layer, head, query, key)`` and no
generator is advanced (cf. counter-based generators, Salmon et al. 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # the multipliers of splitmix64 as signed int64


def uniform(seed: int, layer: int, *axes: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one for each combination of the broadcast ``axes``.

    For instance ``uniform(seed, layer, head[:, None, None], query[:, None], key)`` with ``key (N,)`` gives ``(H, N, N)``; a
    longer ``key`` leaves the numbers of the earlier ones as they were.

    Args:
        seed: Of the pattern.
        layer: Index of the layer.
        *axes: Integer tensors that broadcast together.

    Returns:
        float64 of the broadcast shape.

    Source:
        Counter-based generators, Salmon et al. 2011; the hash is splitmix64.
    """
    state = _mix(torch.tensor(seed, dtype=torch.int64) * 1_000_003 + layer)
    for axis in axes:
        state = _mix(state + _mix(axis.to(torch.int64) + 1))
    return ((state >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def normal(seed: int, layer: int, *axes: Tensor) -> Tensor:
    """Standard normal numbers, float64: the quantiles of `uniform`, with the same ``axes``."""
    return torch.special.ndtri(uniform(seed, layer, *axes).clamp_min(2.0**-54))


def _mix(x: Tensor) -> Tensor:
    x = x + _ODD[0]
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _ODD[1]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _ODD[2]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
