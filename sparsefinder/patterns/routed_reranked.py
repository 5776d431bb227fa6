"""Routing in two stages: clusters are taken generously, then their keys are ranked one by one by few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.cluster_moments import moments
from sparsefinder.numerics.padding import without_padding
from sparsefinder.numerics.selection import check_rule, select
from sparsefinder.patterns.routed import on_levels, up_to_each_query
from sparsefinder.patterns.support.ranking import as_ids, check_share
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.nearest_clusters import clusters_of_keys
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class RoutedReranked:
    """Edge iff the query looks into the cluster of the key, and ``(α − 1) s_ij ≥ τ̂_i − level``.

    With ``s_ij = q'_i·k'_j / √R`` in the space that the stage ``bilinear`` trained, a query looks into the clusters of largest
    ``q'_i·μ_c`` (``μ_c``: the mean of that sentence's keys in cluster ``c``) until they hold a share of its keys, and ``τ̂_i`` is
    the threshold of α-entmax over the keys in them. `RoutedBilinear` takes all keys of a cluster or none, and most keys of a
    cluster that it takes are not worth their attention: each costs ``2 · D``, while looking at it here costs ``R``. In causal
    attention the centroids stand for the means, and a query counts the keys up to itself.

    Source:
        Ours. Coarse cells, then the candidates one by one, is how inverted files search for nearest neighbours (Jégou, Douze,
        Schmid 2011, Product Quantization for Nearest Neighbor Search, https://doi.org/10.1109/TPAMI.2010.57). Where we differ:

        1. The last cut is the threshold of entmax instead of a number of neighbours.
        2. Candidates are scored by the trained inner product of ``R`` numbers; nothing is quantized.
    """

    level: float = 0.05  # how far below the estimated threshold a key may lie
    share: float = 0.15  # of a query's keys, looked at one by one
    alpha: float = 1.5  # of the entmax whose threshold is estimated
    keys_per_cluster: float = 16.0  # of a tree the level that has as nearly so many keys in a cluster as there is
    bilinear_centroids: Centroids | None = None  # attached by a `Configuration`

    sparsity_parameter: ClassVar[str | None] = "level"
    needs: ClassVar[tuple[str, ...]] = ("bilinear_projections", "bilinear_centroids")

    def __post_init__(self) -> None:
        check_rule("margin", self.level, self.alpha)
        check_share("share", self.share)
        if self.keys_per_cluster <= 0:
            raise UserError(f"keys_per_cluster must be above 0, got {self.keys_per_cluster}")

    @property
    def reads_ahead(self) -> str:
        """What later tokens change in causal attention: with a tree of clusters, how many there are."""
        tree = self.bilinear_centroids is not None and self.bilinear_centroids.coarser
        return "the length of the sentence chooses the level of the tree" if tree else ""

    @property
    def centroids(self) -> Centroids:
        """The clusters of keys; a `UserError` where none are attached."""
        if self.bilinear_centroids is None:
            raise missing(type(self).__name__, "bilinear_centroids")
        return self.bilinear_centroids

    def layout(self, qk: QK, layer: int) -> Layout:
        """A bucket for each key: a query is in those of the keys that it takes."""
        keys = torch.arange(qk.k.shape[2], device=qk.q.device).expand(*qk.k.shape[:2], -1)
        own = keys.masked_fill(~qk.valid[:, None], -1)
        return Layout(Buckets(as_ids(self(qk, layer)), own[..., None], keys.shape[-1]))

    def cost(self, tokens: int, size: int) -> float:
        """``(2 · C + share · n) · R``: a key and a query with each centroid, a query with the keys that it looks at.

        Of a tree a key is compared with the ``C'`` clusters of the entrance, if there is one, and the children of one.
        """
        level = self._level(tokens)
        return (level.compared + level.count + self.share * tokens) * size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """``C · R``, or in a tree what is said there: each key with centroids."""
        return self._level(tokens).compared * size

    def _level(self, tokens: int) -> Centroids:
        return self.centroids.level(tokens / self.keys_per_cluster)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        clusters = on_levels(
            qk, self.centroids, lambda tokens: tokens / self.keys_per_cluster, partial(self._clusters, layer=layer)
        )
        looked_at = clusters.graph(qk.allowed.expand(qk.graph_shape))
        scores = qk.scores().masked_fill(~looked_at, -math.inf)
        return select(scores, looked_at.to(scores.dtype), "margin", self.level, self.alpha)

    def _clusters(self, qk: QK, centroids: Centroids, layer: int) -> Buckets:
        """Of each key its own, of each query those whose keys it looks at."""
        centres = centroids(qk, layer).flatten(1, 2)  # several runs are as many clusters more
        count = centres.shape[1]
        cluster = clusters_of_keys(qk, centroids, layer).masked_fill(~qk.valid[:, None], count)
        if qk.causal:
            scores, numbers = up_to_each_query(qk, cluster, centres)
        else:
            sizes, means, _ = moments(without_padding(qk.k, qk.valid), cluster, count)
            scores, numbers = qk.q @ means.mT, sizes[:, :, None]
        taken = select(scores, numbers, "budget", self.share, self.alpha)
        return Buckets(as_ids(taken), cluster.masked_fill(cluster == count, -1)[..., None], count)
