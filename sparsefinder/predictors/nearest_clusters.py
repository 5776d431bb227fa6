"""Who is nearest to whom: the clusters of projected queries and keys, each level of a tree found through the one above.

In C++ on a CPU, by torch's products anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefinder.executors.native import nearest_centroids
from sparsefinder.executors.native import predictors as native
from sparsefinder.graphs import QK
from sparsefinder.numerics.distances import closeness
from sparsefinder.numerics.padding import at_least_float32
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import Projections


def nearest(x: Tensor, centres: Tensor, top: int) -> Tensor:
    """The nearest centroids in each run, the nearest first.

    Args:
        x: Projected vectors ``(B, H, N, R)``; padding gets arbitrary ids.
        centres: ``(H, runs, C, R)``; run ``u`` uses the ids ``u · C … u · C + C − 1``.
        top: How many of each run.

    Returns:
        ``(B, H, N, runs · top)`` int64.
    """
    return native.nearest(x, centres, top) if native.works_on(x) else nearest_by_products(x, centres, top)


def clusters_of_keys(qk: QK, centroids: Centroids, layer: int) -> Tensor:
    """The cluster of each key: the nearest one, in a tree the nearest child of the nearest cluster of the entrance.

    Args:
        qk: Projected vectors, keys ``(B, H, N_k, R)``; padding gets arbitrary ids.
        centroids: One level of a tree, or any centroids; those of several runs are as many clusters more.
        layer: Index of the layer.

    Returns:
        ``(B, H, N_k)`` int64.
    """
    if nearest_centroids.works_on(qk.k):
        return nearest_centroids.nearest(qk.k, *(biased(each) for each in _levels(qk, centroids, layer)))
    centres, entrance = centroids(qk, layer).flatten(1, 2), centroids.entrance
    if entrance is None:
        return nearest_by_products(qk.k, centres[:, None], 1)[..., 0]
    parents = nearest_by_products(qk.k, entrance(qk, layer), 1)[..., 0]
    return nearest_child_by_products(qk.k, centres, parents, centres.shape[1] // entrance.clusters)


@torch.no_grad()
def clusters_of_unprojected_keys(qk: QK, lowrank: Projections, centroids: Centroids, layer: int) -> Tensor:
    """`clusters_of_keys` of the projected keys, from keys as they are.

    The nearest centroid is that of the largest ``c·k' − |c|²/2``, and with ``k' = k w + b`` that is
    ``k·(c wᵀ) + c·b − |c|²/2``: on a CPU the centroids are taken back through a linear projection, and no key is projected.

    Args:
        qk: True vectors, keys ``(B, H, N_k, D)``; padding gets arbitrary ids.
        lowrank: What projects them.
        centroids: Of projected keys, as for `clusters_of_keys`.
        layer: Index of the layer.

    Returns:
        ``(B, H, N_k)`` int64.
    """
    projection, k = lowrank.linear_of_keys(qk, layer), at_least_float32(qk.k)
    if projection is None or not nearest_centroids.works_on(k):
        projected = lowrank.keys(qk, layer)
        return clusters_of_keys(qk.with_vectors(_of_size(qk.q, projected.shape[-1]), projected), centroids, layer)
    size = projection.out_size or k.shape[-1]
    probe = qk.with_vectors(_of_size(qk.q, size), _of_size(k, size))
    levels = []
    for centres in _levels(probe, centroids, layer):
        vectors, numbers = projection.taken_back(centres)
        levels.append((vectors, numbers + biased(centres)[1]))
    return nearest_centroids.nearest(k, *levels)


def biased(centres: Tensor) -> nearest_centroids.Biased:
    """Centroids ``(H, C, R)`` with what makes the nearest one that of the largest sum."""
    return centres, centres.square().sum(-1) / -2


def _levels(qk: QK, centroids: Centroids, layer: int) -> list[Tensor]:
    """The centroids ``(H, C, R)`` that are wanted, and those of the entrance to them if there is one."""
    levels = [centroids] if centroids.entrance is None else [centroids, centroids.entrance]
    return [level(qk, layer).flatten(1, 2).to(qk.k.dtype) for level in levels]


def _of_size(x: Tensor, size: int) -> Tensor:
    """``(B, H, N, D)`` → zeros ``(B, H, N, R)`` that take no memory."""
    return x.new_zeros(()).expand(*x.shape[:3], size)


def nearest_child_by_products(x: Tensor, centres: Tensor, parents: Tensor, branching: int) -> Tensor:
    """The nearest one of some centroids, other ones for each vector: the children of its parent.

    Args:
        x: ``(B, H, N, R)``.
        centres: ``(H, C, R)``; parent ``p`` has the children ``p · b … p · b + b − 1``.
        parents: ``(B, H, N)`` int64.
        branching: ``b``.

    Returns:
        Ids of centroids ``(B, H, N)`` int64.
    """
    ids = []
    for tokens, own, parent in zip(
        x.unbind(1), centres.to(x.dtype).unflatten(1, (-1, branching)), parents.unbind(1), strict=True
    ):
        children = own[parent]  # (B, N, b, R)
        near = (children @ tokens[..., None])[..., 0] - children.square().sum(-1) / 2
        ids.append(parent * branching + near.argmax(-1))
    return torch.stack(ids, dim=1)


def nearest_by_products(x: Tensor, centres: Tensor, top: int) -> Tensor:
    """`nearest` by torch's operations, on any device."""
    runs, clusters, size = centres.shape[1:]
    first = torch.arange(runs, device=x.device)[:, None] * clusters
    ids = []
    # head by head: the products of one fit the cache
    for tokens, own in zip(x.unbind(1), centres.to(x.dtype).flatten(1, 2), strict=True):
        near = closeness(tokens.reshape(-1, size), own).view(*tokens.shape[:2], runs, clusters)
        # argmax finds the largest one twice as fast
        best = near.argmax(-1, keepdim=True) if top == 1 else near.topk(top, dim=-1).indices
        ids.append((best + first).flatten(2))
    return torch.stack(ids, dim=1)
