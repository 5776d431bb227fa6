"""Distances between projected queries and keys: ``(…, N, R)`` and ``(…, M, R)`` → ``(…, N, M)``, padding like any token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TINY = 1e-7  # a vector shorter than this has no direction


def cosine(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """``1 − cos(q_i, k_j)``."""
    return 1.0 - unit(q, 2.0) @ unit(k, 2.0).transpose(-1, -2)


def euclidean(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """``‖q_i − k_j‖₂``."""
    return minkowski(q, k, 2.0)


def squared(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """``‖q_i − k_j‖₂²``."""
    return minkowski(q, k, 2.0).square()


def direction(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """Norm-``p`` distance of the norm-``p`` unit vectors."""
    return minkowski(unit(q, p), unit(k, p), p)


def minkowski(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """``‖q_i − k_j‖_p``."""
    # torch's shortcut through a matrix product loses digits just where the vectors are near, which is where edges are
    return torch.cdist(q, k, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def smallest(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """``min_r (q_ir − k_jr)²``, one coordinate at a time to stay at the memory of two graphs."""
    least = torch.full((*q.shape[:-1], k.shape[-2]), torch.inf, dtype=q.dtype, device=q.device)
    for q_r, k_r in zip(q.unbind(-1), k.unbind(-1), strict=True):
        least = torch.minimum(least, (q_r[..., :, None] - k_r[..., None, :]).square())
    return least


def smallest_of_unit(q: Tensor, k: Tensor, p: float = 2.0) -> Tensor:
    """`smallest` on the norm-``p`` unit vectors."""
    return smallest(unit(q, p), unit(k, p))


PAIRWISE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cos": cosine,
    "euclidean": euclidean,
    "l2": squared,
    "direction": direction,
    "minkowski": minkowski,
    "min": smallest,
    "min_norm": smallest_of_unit,
}


def closeness(x: Tensor, centres: Tensor) -> Tensor:
    """``x·c − ‖c‖²/2``, the larger the nearer ``c`` is: ``x (…, M, E)``, ``centres (…, C, E)`` → ``(…, M, C)``.

    Since ``‖x − c‖² = ‖x‖² − 2 (x·c − ‖c‖²/2)``, one matrix product says which of the centres a point is nearest to.
    """
    return x @ centres.mT - centres.square().sum(-1)[..., None, :] / 2


def unit(x: Tensor, p: float) -> Tensor:
    """``x / ‖x‖_p``; a vector of almost no length stays short."""
    return x / x.norm(p=p, dim=-1, keepdim=True).clamp_min(_TINY)
