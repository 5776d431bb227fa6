"""Every cluster as one entry, and key by key only where the entry would be too coarse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.blocks.tail import entries
from sparsefinder.graphs import QK, Buckets, ChosenBuckets, Layout
from sparsefinder.numerics.tail_normalizer import with_clusters
from sparsefinder.patterns.routed import on_levels
from sparsefinder.patterns.support.ranking import as_ids, vectors
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.nearest_clusters import clusters_of_unprojected_keys
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.store import missing

_LONG = 4096  # tokens beyond which clusters grow


@dataclass(frozen=True)
class Refined:
    """All keys by the tail of their clusters, those of clusters whose entry is too coarse one by one.

    Each key joins its nearest centroid in the closed-form space, as in `sparsefinder.patterns.routed`. With all clusters as
    entries of the tail (`Layout`), a query gives cluster ``c`` the probability ``P_ic``; the scores of its ``n_c`` keys have the
    standard deviation ``s_ic``. What the entry blurs is how much these keys differ, so the cluster is taken exactly iff

        ``P_ic s_ic / n_c > level / n``,

    the weight of one of its keys times the spread of the scores, beside an equal share of the ``n`` keys. Nothing is predicted:
    the entries are multiplied anyway, and a cluster of one key, or of equal keys, is never taken.

    How much an output errs depends on the level and on the number of clusters, hardly on the length: with as many keys in a
    cluster a long text would err less than a short one, and pay for it. So beyond 4,096 tokens clusters grow with ``∛n``, and
    their number with ``∛n²``.

    Source:
        Ours.
    """

    level: float = 2.5  # weight of a key times spread, in equal shares, from which on a cluster is taken
    alpha: float = 1.0  # of the normalizer by which the entries weigh; 1 is softmax
    # of a tree the level that has as nearly so many keys in a cluster as there is; beyond 4,096 tokens their third root more
    keys_per_cluster: float = 32.0
    lowrank: Projections | None = None  # attached by a `Configuration`
    key_centroids: Centroids | None = None  # attached by a `Configuration`
    tail: bool = field(default=True, kw_only=True)  # false: what a query does not take is left out

    sparsity_parameter: ClassVar[str | None] = "level"
    needs: ClassVar[tuple[str, ...]] = ("lowrank", "key_centroids")

    def __post_init__(self) -> None:
        if self.level < 0:
            raise UserError(f"level must be 0 or more, got {self.level}")
        if self.keys_per_cluster <= 0:
            raise UserError(f"keys_per_cluster must be above 0, got {self.keys_per_cluster}")

    @property
    def reads_ahead(self) -> str:
        """What later tokens change in causal attention: with a tree of clusters, how many there are."""
        tree = self.key_centroids is not None and self.key_centroids.coarser
        return "the length of the sentence chooses the level of the tree" if tree else ""

    def layout(self, qk: QK, layer: int) -> Layout:
        """Clusters as buckets with a tail; which ones a query takes is found when it is asked for."""
        return self.layout_of_heads(qk, layer, [self.level] * qk.q.shape[1])

    def layout_of_heads(self, qk: QK, layer: int, values: Sequence[float]) -> Layout:
        """The same with a level for each head, ``H`` of them: as fast as with one."""
        if self.lowrank is None or self.key_centroids is None:
            raise missing(type(self).__name__, "lowrank" if self.lowrank is None else "key_centroids")
        levels = torch.tensor(values, dtype=torch.float64)
        members = partial(_memberships, lowrank=self.lowrank, layer=layer)
        ids = on_levels(qk, self.key_centroids, self._fitting, members)
        choose = partial(_taken, qk, ids, levels, self.alpha)
        return Layout(ChosenBuckets(choose, ids.k_ids, ids.count, levels, self.alpha), tail=self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """Projecting a key, and comparing it with the centroids: what is chosen follows from the entries."""
        if self.lowrank is None or self.key_centroids is None:
            raise missing(type(self).__name__, "lowrank" if self.lowrank is None else "key_centroids")
        level = self.key_centroids.level(self._fitting(tokens))
        return self.lowrank.cost_of_keys + level.compared * (self.lowrank.size or size)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """All of it."""
        return self.cost(tokens, size)

    def _fitting(self, tokens: int) -> float:
        """How many clusters fit so many keys."""
        return tokens / (self.keys_per_cluster * max(tokens / _LONG, 1.0) ** (1 / 3))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool, the pairs that are seen key by key."""
        return self.layout(qk, layer).graph(qk)


def _memberships(qk: QK, centroids: Centroids, lowrank: Projections, layer: int) -> Buckets:
    ids = clusters_of_unprojected_keys(qk, lowrank, centroids, layer)[..., None]
    return Buckets(ids.new_empty(*qk.q.shape[:3], 0), ids.masked_fill(~qk.valid[:, None, :, None], -1), centroids.count)


@torch.no_grad()
def _taken(qk: QK, buckets: Buckets, levels: Tensor, alpha: float) -> Tensor:
    """The clusters that each query takes, by torch's products: ``(B, H, N, P)`` int64, -1 for none."""
    q, k = vectors(qk)
    tail = entries(Layout(buckets, tail=True), qk.with_vectors(q, k), torch.zeros_like(k))
    _, weights = with_clusters(tail.mean[..., :0], tail.mean, tail.variance, tail.numbers, alpha)
    of_a_key = weights * tail.variance.clamp_min(0).sqrt() / tail.numbers.clamp_min(1)
    bound = levels.to(of_a_key)[:, None, None] / tail.numbers.sum(-1, keepdim=True).clamp_min(1)
    return as_ids((of_a_key > bound) & (tail.numbers > 0))
