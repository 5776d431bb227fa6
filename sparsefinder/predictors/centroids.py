"""Centroids of projected queries and keys: the file, and who is nearest to whom.

Centroids may be a tree: the finest level, and coarser ones around it (`sparsefinder.predictors.fit_centroid_tree`), so that a
long text can have more clusters than a short one, and the nearest one is found without looking at all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.native import nearest_centroids
from sparsefinder.executors.native import predictors as native
from sparsefinder.graphs import QK
from sparsefinder.numerics.distances import closeness
from sparsefinder.numerics.padding import at_least_float32
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.tensor_files import load_tensors, save_tensors

_CHILDREN = 32  # of a cluster of the entrance: as many as are multiplied at a time


@dataclass(frozen=True)
class Centroids:
    """Centroids of all layers.

    Args:
        layers: For each layer ``(H, runs, C, R)`` float32.
        source: Where they come from, for messages.
        coarser: The levels above, the coarsest first; cluster ``c`` of a level has the children ``c·b … c·b + b − 1`` in any
            finer one with ``b`` times as many clusters.
    """

    layers: Sequence[Tensor]
    source: str = "memory"
    coarser: tuple[Centroids, ...] = ()

    @property
    def clusters(self) -> int:
        """C, the same in every layer."""
        return self.layers[0].shape[2]

    @property
    def count(self) -> int:
        """Those of all runs of k-means together, the same in every layer."""
        return self.layers[0].shape[1] * self.layers[0].shape[2]

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """The centroids of a layer, checked against what they are asked for.

        Args:
            qk: Projected queries and keys, ``(B, H, N, R)``.
            layer: Index of the layer.

        Returns:
            ``(H, runs, C, R)`` float32 on the device of the queries.

        Raises:
            UserError: Where the layer, the heads or the size do not fit.
        """
        if not 0 <= layer < len(self.layers):
            raise UserError(
                f"{self.source} has centroids of {len(self.layers)} layers, but layer {layer} was asked for: "
                "run stage=cluster on these projections"
            )
        centres = self.layers[layer]
        heads, _, _, size = centres.shape
        if (heads, size) != (qk.q.shape[1], qk.q.shape[-1]):
            raise UserError(
                f"{self.source} has centroids of {heads} heads and size R={size}, the projected queries have "
                f"{qk.q.shape[1]} heads and size R={qk.q.shape[-1]}: run stage=cluster on these projections"
            )
        return centres.to(qk.q.device)

    def level(self, clusters: float) -> Centroids:
        """The level whose number of clusters is nearest to ``clusters``, as a ratio, with those above it."""
        levels = (*self.coarser, self)
        best = min(range(len(levels)), key=lambda i: (abs(math.log(levels[i].clusters / max(clusters, 1e-9))), i))
        return replace(levels[best], coarser=levels[:best])

    @property
    def entrance(self) -> Centroids | None:
        """The level above from which this one is reached by looking at few clusters of both; None where none saves work."""
        able = [level for level in self.coarser if level.clusters * 8 <= self.clusters]
        return min(able, key=lambda level: abs(math.log(self.clusters / level.clusters / _CHILDREN)), default=None)

    @property
    def compared(self) -> float:
        """Centroids that a key is compared with: all, or those of the entrance and the children of one."""
        entrance = self.entrance
        return self.count if entrance is None else entrance.clusters + self.clusters / entrance.clusters

    @property
    def families(self) -> int | None:
        """Clusters of the entrance for queries, where looking into some of them saves work: whole panels of children."""
        entrance = self.entrance
        return entrance.clusters if entrance and self.clusters >= _CHILDREN * entrance.clusters else None

    def content(self) -> Any:
        """The published form, the centroids of each layer; of a tree ``{"levels": [that form, …]}``, the coarsest first."""
        levels = [[centres.cpu().contiguous() for centres in level.layers] for level in (*self.coarser, self)]
        return {"levels": levels} if self.coarser else levels[0]

    def save(self, path: Path | str) -> None:
        """Write `content`."""
        save_tensors(self.content(), path)


def load_centroids(path: Path | str) -> Centroids:
    """Read a file of centroids, ours or the published Sparsefinder's; a file of one level is a tree of one level.

    Args:
        path: Of the file.

    Returns:
        The centroids of all layers, in float32.

    Raises:
        UserError: In one line, for anything else.
    """
    return centroids_of(load_tensors(path, "centroids"), str(path))


def centroids_of(content: Any, source: str) -> Centroids:
    """Centroids in the form of `Centroids.content`, looked at.

    Args:
        content: What should be a list over layers of tensors ``(H, runs, C, R)``, or a tree.
        source: Where it comes from, for messages.

    Returns:
        The centroids of all layers, in float32.

    Raises:
        UserError: In one line, for anything else.
    """
    if not isinstance(content, dict):
        return Centroids(_level(source, content), source)
    if [*content] != ["levels"] or not isinstance(content["levels"], list) or not content["levels"]:
        raise UserError(f"{source}: a tree of centroids must be a list named levels, and nothing else; run stage=route")
    levels = list[Centroids]()
    for layers in content["levels"]:
        level = Centroids(_level(source, layers), source)
        if levels:
            _check_nested(source, levels[-1], level)
        levels.append(level)
    return replace(levels[-1], coarser=tuple(levels[:-1]))


def _check_nested(source: str, coarse: Centroids, fine: Centroids) -> None:
    shapes = [[(x.shape[0], x.shape[1], x.shape[3]) for x in level.layers] for level in (coarse, fine)]
    if shapes[0] != shapes[1] or fine.clusters % coarse.clusters or fine.clusters == coarse.clusters:
        raise UserError(
            f"{source}: a level of {fine.clusters} clusters does not lie inside one of {coarse.clusters}; run stage=route again"
        )
    if shapes[0][0][1] != 1:
        raise UserError(
            f"{source}: a tree of centroids has one run of k-means, not {shapes[0][0][1]}; run stage=route again"
        )


def _level(source: str, content: Any) -> list[Tensor]:
    """The centroids ``(H, runs, C, R)`` float32 of all layers, checked."""
    if not isinstance(content, list) or not content:
        raise UserError(f"{source}: centroids must be a list over layers of tensors (H, runs, C, R); run stage=cluster")
    content = [_means(layer) for layer in content]
    for index, centres in enumerate(content):
        if (
            not isinstance(centres, Tensor)
            or centres.ndim != 4
            or not centres.is_floating_point()
            or not centres.numel()
        ):
            raise UserError(
                f"{source}: layer {index} must be a floating point tensor (H, runs, C, R); run stage=cluster"
            )
        if not torch.isfinite(centres.float()).all():
            raise UserError(f"{source}: layer {index} contains NaN or infinity; run stage=cluster again")
        if centres.shape[1:3] != content[0].shape[1:3]:
            raise UserError(
                f"{source}: layer {index} has {tuple(centres.shape[1:3])} runs and clusters, layer 0 has "
                f"{tuple(content[0].shape[1:3])}"
            )
    return [centres.float() for centres in content]


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


def _means(layer: Any) -> Any:
    """Of the published routing code, whose layers are state dicts, the centroids ``(H, C, R)`` as those of one run."""
    means = layer.get("kmeans.means") if isinstance(layer, dict) else None
    return means[:, None] if isinstance(means, Tensor) and means.ndim == 3 else layer
