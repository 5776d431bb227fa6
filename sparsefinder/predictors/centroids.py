"""Centroids of projected queries and keys: the file, and the levels of a tree (`nearest_clusters` finds the nearest).

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
from sparsefinder.graphs import QK
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


def _means(layer: Any) -> Any:
    """Of the published routing code, whose layers are state dicts, the centroids ``(H, C, R)`` as those of one run."""
    means = layer.get("kmeans.means") if isinstance(layer, dict) else None
    return means[:, None] if isinstance(means, Tensor) and means.ndim == 3 else layer
