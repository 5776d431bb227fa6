"""Lloyd's k-means on the tokens of one sentence at a time: a few rounds, without chance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.numerics.counter_rng import uniform
from sparsefinder.numerics.distances import closeness


def first_centres(points: Tensor, qk: QK, clusters: int, seed: int, layer: int) -> Tensor:
    """Different tokens of each sentence and head, drawn by seed, layer, head and position.

    Args:
        points: ``(B, H, N, E)``.
        qk: Whose keys say which tokens are real; padding is never drawn.
        clusters: ``C``; a sentence with fewer tokens has some of them several times.
        seed: Of the pattern.
        layer: Index of the layer.

    Returns:
        ``(B, H, C, E)``.
    """
    heads = torch.arange(points.shape[1], device=points.device)
    drawn = uniform(seed, layer, heads[:, None], qk.positions[:, None]).masked_fill(~qk.valid[:, None], math.inf)
    order = drawn.argsort(dim=-1, stable=True)
    ranks = torch.arange(clusters, device=points.device) % qk.lengths[:, None].clamp_min(1)
    at = order.gather(2, ranks[:, None].expand(-1, points.shape[1], -1))
    return points.gather(2, at[..., None].expand(-1, -1, -1, points.shape[-1]))


def lloyd(points: Tensor, valid: Tensor, centres: Tensor, iterations: int, spherical: bool = False) -> Tensor:
    """Lloyd's rounds: each point goes to its nearest centre, each centre to the mean of its points.

    Args:
        points: ``(B, H, M, E)``.
        valid: ``(B, M)`` bool; padding moves no centre.
        centres: ``(B, H, C, E)``, where to begin.
        iterations: Number of rounds.
        spherical: Whether each mean is scaled to unit length, the k-means of directions.

    Returns:
        Centres ``(B, H, C, E)``; one without points stays where it is.
    """
    for _ in range(iterations):
        means, counts = means_of(points, valid, nearest(points, centres), centres.shape[2])
        centres = torch.where(counts > 0, F.normalize(means, dim=-1) if spherical else means, centres)
    return centres


def means_of(points: Tensor, valid: Tensor, cluster: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The mean of each cluster's real points.

    Args:
        points: ``(B, H, M, E)``.
        valid: ``(B, M)`` bool; padding is in no mean.
        cluster: ``(B, H, M)`` int64 in ``[0, clusters)``.
        clusters: ``C``.

    Returns:
        Means ``(B, H, C, E)``, zero where there are no points, and the number of points, ``(B, H, C, 1)``.
    """
    inside = F.one_hot(cluster, clusters).to(points.dtype).masked_fill(~valid[:, None, :, None], 0.0)
    counts = inside.sum(2)[..., None]
    return inside.transpose(-1, -2) @ points / counts.clamp_min(1.0), counts


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each point.

    Args:
        points: ``(B, H, M, E)``.
        centres: ``(B, H, C, E)``.

    Returns:
        Indices ``(B, H, M)`` int64, the first of equals; arbitrary on padding.
    """
    return closeness(points, centres).argmax(-1)
