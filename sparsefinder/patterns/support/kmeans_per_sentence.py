"""Lloyd's k-means on the tokens of one sentence at a time: a few rounds, without chance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.numerics.counter_rng import uniform


def first_centres(points: Tensor, qk: QK, clusters: int, seed: int, layer: int) -> Tensor:
    """``clusters`` different tokens of each sentence and head, drawn by seed, layer, head and position: ``(B, H, C, E)``.

    ``points``: ``(B, H, N, E)``. A sentence with fewer tokens than clusters has some of them several times.
    """
    heads = torch.arange(points.shape[1], device=points.device)
    drawn = uniform(seed, layer, heads[:, None], qk.positions[:, None]).masked_fill(~qk.valid[:, None], math.inf)
    order = drawn.argsort(dim=-1, stable=True)
    ranks = torch.arange(clusters, device=points.device) % qk.lengths[:, None].clamp_min(1)
    at = order.gather(2, ranks[:, None].expand(-1, points.shape[1], -1))
    return points.gather(2, at[..., None].expand(-1, -1, -1, points.shape[-1]))


def lloyd(points: Tensor, valid: Tensor, centres: Tensor, iterations: int, spherical: bool = False) -> Tensor:
    """``iterations`` times: each point goes to its nearest centre, each centre to the mean of its points.

    ``points``: ``(B, H, M, E)``; ``valid``: ``(B, M)`` bool; ``centres``: ``(B, H, C, E)``. ``spherical`` scales each mean to
    unit length, the k-means of directions. A centre without points stays where it is. Returns centres.
    """
    for _ in range(iterations):
        means, counts = means_of(points, valid, nearest(points, centres), centres.shape[2])
        centres = torch.where(counts > 0, F.normalize(means, dim=-1) if spherical else means, centres)
    return centres


def means_of(points: Tensor, valid: Tensor, cluster: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The mean of each cluster's real points, ``(B, H, C, E)``, and their number, ``(B, H, C, 1)``; a mean of none is zero.

    ``points``: ``(B, H, M, E)``; ``valid``: ``(B, M)`` bool; ``cluster``: ``(B, H, M)`` int64 in ``[0, clusters)``.
    """
    inside = F.one_hot(cluster, clusters).to(points.dtype).masked_fill(~valid[:, None, :, None], 0.0)
    counts = inside.sum(2)[..., None]
    return inside.transpose(-1, -2) @ points / counts.clamp_min(1.0), counts


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest of ``centres (B, H, C, E)`` to each of ``points (B, H, M, E)``: ``(B, H, M)``, the first of equals."""
    # ‖x − c‖² = ‖x‖² − 2 (x·c − ‖c‖²/2): the nearest centre of a point is that of the largest bracket, one matrix product
    return (points @ centres.transpose(-1, -2) - centres.square().sum(-1)[..., None, :] / 2).argmax(-1)
