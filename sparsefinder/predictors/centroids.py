"""Centroids of projected queries and keys: the file, and who is nearest to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.native import predictors as native
from sparsefinder.graphs import QK
from sparsefinder.numerics.distances import closeness
from sparsefinder.storage.tensor_files import load_tensors, save_tensors


@dataclass(frozen=True)
class Centroids:
    """Centroids of all layers.

    Args:
        layers: For each layer ``(H, runs, C, R)`` float32.
        source: Where they come from, for messages.
    """

    layers: Sequence[Tensor]
    source: str = "memory"

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

    def content(self) -> list[Tensor]:
        """The published form: the centroids of each layer."""
        return [centres.cpu().contiguous() for centres in self.layers]

    def save(self, path: Path | str) -> None:
        """Write the published form."""
        save_tensors(self.content(), path)


def load_centroids(path: Path | str) -> Centroids:
    """Read a file of centroids, ours or the published Sparsefinder's.

    Args:
        path: Of the file.

    Returns:
        The centroids of all layers, in float32.

    Raises:
        UserError: In one line, for anything else.
    """
    return centroids_of(load_tensors(path, "centroids"), str(path))


def centroids_of(content: Any, source: str) -> Centroids:
    """Centroids in the published form, looked at.

    Args:
        content: What should be a list over layers of tensors ``(H, runs, C, R)``.
        source: Where it comes from, for messages.

    Returns:
        The centroids of all layers, in float32.

    Raises:
        UserError: In one line, for anything else.
    """
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
    return Centroids([centres.float() for centres in content], source)


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
