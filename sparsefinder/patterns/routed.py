"""Sub-quadratic prediction: keys are clustered, queries are routed to clusters by their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.native import predictors as native
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.cluster_moments import merged, moments
from sparsefinder.numerics.padding import without_padding
from sparsefinder.numerics.selection import check_rule, select, thresholds
from sparsefinder.patterns.support.ranking import as_ids
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.nearest_clusters import clusters_of_keys
from sparsefinder.storage.store import missing

# vectors, the cluster of each, and how many clusters there are → their numbers, means and variances
Moments = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

REACH, DOORS = 3.0, 4.0  # as in executors/native/routing.hpp, see `ToClusters`
_AT_ONCE = 1 << 20  # scores of queries and clusters in memory at one time: what fits the cache is faster


@dataclass(frozen=True)
class ToClusters:
    """Edge iff the query is routed to the cluster of the key; subclasses say whose space and centroids these are.

    Each key joins its nearest centroid ``c``; of a tree of clusters each sentence uses the level that fits its length. A
    query scores each cluster by what its best keys may be worth,

        ``s_ic = (q'_i·μ_c + √(Σ_r q'_ir² σ_cr²)) / √R``,

    the mean and spread of the scores of that sentence's keys in it (``μ_c``, ``σ_c²``: their mean and variance), and takes
    clusters by ``rule`` and ``level`` (see `sparsefinder.numerics.selection`; a cluster counts as many keys as it holds). The
    cost is ``N·C·R`` instead of ``N²·D``. Where a tree has a level with at most a 32nd of the clusters, a query looks into those
    of that level alone whose mean and three spreads reach what is kept there (budget: those of largest reach that hold four
    times the budget), about a third of them. In causal attention the mean of a sentence would show the future: there the
    centroids stand for their keys, without spread, and a query counts the keys up to itself.

    Source:
        Ours. What it owes: routing to clusters of keys to Roy et al. 2021 (https://arxiv.org/abs/2003.05997), though with a
        budget that follows the threshold of entmax instead of equal shares.
    """

    rule: str = "margin"  # margin or budget
    level: float = 0.2  # how far below the estimated threshold (margin), or which share of the keys (budget)
    alpha: float = 1.5  # of the entmax whose threshold is estimated
    # whether each cluster that a query does not take is one entry among its scores: see `Layout`
    tail: bool = field(default=False, kw_only=True)

    # of a tree of clusters each sentence uses the level that has so many of its keys in a cluster, as nearly as there is
    keys_per_cluster: float = field(default=4.0, kw_only=True)

    sparsity_parameter: ClassVar[str | None] = "level"
    needs: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.keys_per_cluster <= 0:
            raise UserError(f"keys_per_cluster must be above 0, got {self.keys_per_cluster}")
        check_rule(self.rule, self.level, self.alpha)

    @property
    def centroids(self) -> Centroids:
        """The clusters of keys, the last artefact of ``needs``; a `UserError` where none are attached."""
        name = self.needs[-1]
        centroids: Centroids | None = getattr(self, name)
        if centroids is None:
            raise missing(type(self).__name__, name)
        return centroids

    @property
    def reads_ahead(self) -> str:
        """What later tokens change in causal attention: with a tree of clusters, how many there are."""
        centroids: Centroids | None = getattr(self, self.needs[-1])
        return "the length of the sentence chooses the level of the tree" if centroids and centroids.coarser else ""

    def layout(self, qk: QK, layer: int) -> Layout:
        """Clusters as buckets: each key in one, each query in those that it is routed to."""
        return self._layout(qk, layer, self.level)

    def layout_of_heads(self, qk: QK, layer: int, values: Sequence[float]) -> Layout:
        """The same with a level for each head, ``H`` of them: as fast as with one."""
        for level in set(values):
            check_rule(self.rule, level, self.alpha)
        return self._layout(qk, layer, torch.tensor(values, dtype=torch.float64))

    def _layout(self, qk: QK, layer: int, level: float | Tensor) -> Layout:
        buckets = on_levels(
            qk,
            self.centroids,
            lambda tokens: tokens / self.keys_per_cluster,
            lambda part, centroids: self._buckets(part, layer, level, centroids),
        )
        return Layout(buckets, tail=self.tail)

    def _level(self, tokens: int) -> Centroids:
        return self.centroids.level(tokens / self.keys_per_cluster)

    def _buckets(self, qk: QK, layer: int, level: float | Tensor, centroids: Centroids) -> Buckets:
        centres = centroids(qk, layer).flatten(1, 2)  # several runs are as many clusters more
        count = centres.shape[1]
        cluster = clusters_of_keys(qk, centroids, layer).masked_fill(~qk.valid[:, None], count)  # (B, H, N)
        route = self._route_natively if native.works_on(qk.q) else self._route
        q_ids = route(qk, cluster, centres, level, centroids.families)
        return Buckets(q_ids, cluster.masked_fill(cluster == count, -1)[..., None], count)

    def _route_natively(
        self, qk: QK, cluster: Tensor, centres: Tensor, level: float | Tensor, families: int | None
    ) -> Tensor:
        """The clusters of each query ``(B, H, N, P)`` int64, -1 in slots that it does not need."""
        if qk.causal:
            scaled = centres.to(qk.q.dtype) / math.sqrt(qk.q.shape[-1])
            return native.routed_causally(qk.q, cluster, scaled, self.rule, level, self.alpha)
        of_clusters = _estimates(native.moments, qk, cluster, centres.shape[1])
        entrance = None if families is None else merged(*of_clusters, centres.shape[1] // families)
        return native.routed(qk.q, *of_clusters, self.rule, level, self.alpha, entrance)

    def _route(self, qk: QK, cluster: Tensor, centres: Tensor, level: float | Tensor, families: int | None) -> Tensor:
        """The same with torch's operations, some heads at a time."""
        some = max(_AT_ONCE // max(cluster.shape[0] * cluster.shape[2] * centres.shape[1], 1), 1)
        of_heads = torch.as_tensor(level, dtype=torch.float64).to(qk.q).expand(len(centres))[:, None, None]
        split = (*(x.split(some, dim=1) for x in (qk.q, qk.k, cluster)), centres.split(some), of_heads.split(some))
        slots = []
        for q, k, ids, own, levels in zip(*split, strict=True):
            if qk.causal:
                scores, numbers = up_to_each_query(qk.with_vectors(q, k), ids, own)
            else:
                of_clusters = _estimates(moments, qk.with_vectors(q, k), ids, own.shape[1])
                mean, spread = _scores(q, *of_clusters)
                scores, numbers = mean.add_(spread), of_clusters[0][:, :, None]
                if families is not None:
                    branching = own.shape[1] // families
                    opened = self._opened(q, merged(*of_clusters, branching), levels)
                    inside = numbers * opened.repeat_interleave(branching, -1)
                    if self.rule == "budget":  # a share of all keys, whatever is opened
                        levels = levels * numbers.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp_min(1)
                    numbers = inside
            slots.append(as_ids(select(scores, numbers, self.rule, levels, self.alpha)))
        most = max(part.shape[-1] for part in slots)
        return torch.cat([F.pad(part, (0, most - part.shape[-1]), value=-1) for part in slots], dim=1)

    def _opened(self, q: Tensor, entrance: tuple[Tensor, Tensor, Tensor], levels: Tensor) -> Tensor:
        """Clusters of the entrance that each query looks into, ``(B, H, N, C')`` bool."""
        mean, spread = _scores(q, *entrance)
        numbers, reach = entrance[0][:, :, None], mean + REACH * spread
        if self.rule == "budget":
            return select(reach, numbers, self.rule, (DOORS * levels).clamp_max(1.0), self.alpha)
        scaled = ((self.alpha - 1) * (mean + spread)).masked_fill(numbers == 0, -torch.inf)
        bound = thresholds(scaled, numbers, self.alpha) - levels
        return ((self.alpha - 1) * reach >= bound) & (numbers > 0)

    def cost(self, tokens: int, size: int) -> float:
        """``3 · C · R``: each key with each centroid, each query with the mean and the spread of each cluster.

        In a tree a key is compared with the ``C'`` clusters of the entrance and the children of one, ``C / C'``, and a query that
        descends with those of the entrance and the children of four in ten, as many as it opened on recorded vectors.
        """
        level = self._level(tokens)
        of_a_query = level.count if level.families is None else level.families + 0.4 * level.clusters
        return (level.compared + 2.0 * of_a_query) * size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """``C · R``, or in a tree what is said there: each key with centroids."""
        return self._level(tokens).compared * size

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)


@dataclass(frozen=True)
class Routed(ToClusters):
    """Routing to clusters of keys in the closed-form space of `sparsefinder.lowrank`; see `ToClusters` for the formula."""

    key_centroids: Centroids | None = None  # attached by a `Configuration`

    needs: ClassVar[tuple[str, ...]] = ("lowrank", "key_centroids")


def on_levels(
    qk: QK, centroids: Centroids, fitting: Callable[[int], float], make: Callable[[QK, Centroids], Buckets]
) -> Buckets:
    """Buckets of each sentence on the level of a tree that fits its own length.

    Args:
        qk: Queries and keys of all sentences.
        centroids: A tree, or one level for all lengths.
        fitting: Of the keys of a sentence, how many clusters fit them: it has the level with as nearly so many as there is.
        make: The buckets of some of the sentences, on one level.
    """
    levels = [centroids]
    if centroids.coarser:
        levels = [centroids.level(fitting(length)) for length in qk.lengths.tolist()]
    used = {each.clusters: each for each in levels}
    if len(used) == 1:
        return make(qk, levels[0])
    parts = []
    for clusters, level in used.items():
        own = [example for example, each in enumerate(levels) if each.clusters == clusters]
        parts.append((own, make(qk.part(torch.tensor(own, device=qk.q.device)), level)))
    return _joined(parts, len(levels))


def _joined(parts: Sequence[tuple[Sequence[int], Buckets]], examples: int) -> Buckets:
    """The buckets of all examples, from those of some each.

    Args:
        parts: Numbers of examples, and their buckets.
        examples: ``B``, how many there are in all parts together.

    Returns:
        As many slots and buckets as the part that has most of them.
    """
    together = []
    for side in ("q_ids", "k_ids"):
        each: list[Tensor] = [getattr(buckets, side) for _, buckets in parts]
        ids = each[0].new_full((examples, *each[0].shape[1:3], max(part.shape[-1] for part in each)), -1)
        for (own, _), part in zip(parts, each, strict=True):
            ids[torch.tensor(own, device=ids.device), ..., : part.shape[-1]] = part
        together.append(ids)
    q_ids, k_ids = together
    return Buckets(q_ids, k_ids, max(buckets.count for _, buckets in parts))


def _scores(q: Tensor, _numbers: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the scores of the keys in each cluster, ``(B, H, N, C)`` each."""
    return q @ mean.mT, (q.square() @ variance.mT).sqrt_()


def _estimates(moments: Moments, qk: QK, cluster: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of each cluster ``(B, H, C)``, and the mean and variance ``(B, H, C, R)`` of ``k / √R`` over them."""
    numbers, mean, variance = moments(without_padding(qk.k, qk.valid), cluster, count)
    size = qk.k.shape[-1]
    return numbers, mean / math.sqrt(size), variance / size


def up_to_each_query(qk: QK, cluster: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """What a query of causal attention may know of clusters: the centroids, and how many keys there were so far.

    Args:
        qk: Queries and keys ``(B, H, N, R)``.
        cluster: Of each key, ``(B, H, N)`` int64 in ``[0, C]``; ``C`` stands for padding.
        centres: ``(H, C, R)``.

    Returns:
        Scores of the centroids ``(B, H, N, C)``, and the keys in each up to the query, of the same shape.
    """
    members = cluster[..., None] == torch.arange(centres.shape[1], device=cluster.device)
    scores = qk.q @ centres.to(qk.q.dtype).mT / math.sqrt(qk.q.shape[-1])
    return scores, members.to(scores.dtype).cumsum(2)
