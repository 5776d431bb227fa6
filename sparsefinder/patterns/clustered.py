"""Clusters of queries: all queries of a cluster take the keys that their mean scores highest (Vyas et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import normal
from sparsefinder.patterns.support.kmeans_per_sentence import first_centres, lloyd, means_of, nearest
from sparsefinder.patterns.support.ranking import as_ids, check_counts, check_share, first_share, vectors


@dataclass(frozen=True)
class Clustered:
    """Edge iff ``k_j`` is among the ``⌈share · n⌉`` keys of largest ``q̄_c · k_j``, ``c`` the cluster of the query.

    ``q̄_c`` is the mean of the queries of a cluster. Clusters are k-means, ``iterations`` rounds of Lloyd's algorithm within
    this sentence, on the signs ``sign(q P) ∈ {−1, 1}^bits`` of random projections or, with ``bits=0``, on the queries. ``P``
    (standard normal) and the queries that are the first centres are fixed by seed, layer and head.

    **In causal attention the clusters and their means read the whole sentence**, later queries too, as in the authors' code.
    Keys are ranked as they arrive, a key among those before it, so which of them a mean takes does not depend on later keys.

    Source:
        Vyas, Katharopoulos, Fleuret (2020), Fast Transformers with Clustered Attention, https://arxiv.org/abs/2007.04825, the
        improved form. Where we differ:

        1. Edges are the pairs that the paper computes exactly; the other keys, to which it gives the attention of the mean
           query, have none (as in the authors' causal form).
        2. A share of the keys instead of a number of them (32).
        3. Signs without the offset of the authors' code, and their means are not rounded back to bits.
        4. What is drawn stays, instead of being drawn anew for each batch.
    """

    share: float = 0.1  # of the keys, for each cluster
    n_clusters: int = 25
    bits: int = 63  # signs that queries are clustered by; 0: cluster the queries themselves
    iterations: int = 10  # of Lloyd's algorithm
    seed: int = 0

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()
    # in causal attention
    reads_ahead: ClassVar[str] = "clusters and their means are those of all queries of the sentence"

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_counts(n_clusters=self.n_clusters)
        if self.bits < 0 or self.iterations < 0:
            raise UserError(f"bits and iterations must be 0 or more, got {self.bits} and {self.iterations}")

    def layout(self, qk: QK, layer: int) -> Layout:
        """Clusters as buckets: a query is in its own, a key in those whose mean takes it."""
        q, k = vectors(qk)
        cluster = self._clusters(q, qk, layer)
        means, _ = means_of(q, qk.queries_valid, cluster, self.n_clusters)
        taken = first_share(k @ means.transpose(-1, -2), qk, self.share)
        return Layout(Buckets(cluster[..., None], as_ids(taken), self.n_clusters))

    def cost(self, tokens: int, size: int) -> float:
        """Hashing of queries, distances to the centres in every round and once more, and the keys with each mean query."""
        hashed, numbers = (size * self.bits, self.bits) if self.bits else (0, size)
        return float(hashed + (self.iterations + 1) * self.n_clusters * numbers + self.n_clusters * size)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """``C · D``: each key with each mean query."""
        return float(self.n_clusters * size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _clusters(self, q: Tensor, qk: QK, layer: int) -> Tensor:
        """The cluster of each query, ``(B, H, N)`` int64."""
        points = self._signs(q, layer) if self.bits else q
        centres = first_centres(points, qk.swapped, self.n_clusters, self.seed, layer)
        return nearest(points, lloyd(points, qk.queries_valid, centres, self.iterations))

    def _signs(self, q: Tensor, layer: int) -> Tensor:
        head, size, bit = (torch.arange(n, device=q.device) for n in (q.shape[1], q.shape[-1], self.bits))
        planes = normal(self.seed, layer, head[:, None, None], size[:, None], bit).to(q.dtype)
        return torch.where(q @ planes > 0, 1.0, -1.0).to(q.dtype)
