"""Clusters of a sentence's keys, the near ones key by key and the others by their centroid (Hooper et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.selection import select
from sparsefinder.patterns.support.kmeans_per_sentence import first_centres, lloyd, nearest
from sparsefinder.patterns.support.ranking import as_ids, at_least, check_counts, check_share, vectors


@dataclass(frozen=True)
class Multipole:
    """Edge iff the key's cluster is among those of largest ``q_i·μ_c`` until they hold a share of the keys.

    ``μ_c`` is the mean of a cluster, and clusters are k-means, ``iterations`` rounds of Lloyd's algorithm, on this sentence's own
    keys. With ``tail`` each cluster that a query does not take is one entry among its scores, that of ``n_c`` keys at the mean:
    for softmax. **In causal attention the clusters read the whole sentence**; a query counts the keys up to itself.

    Source:
        Hooper et al. (2025), Multipole Attention for Efficient Long Context Reasoning, https://arxiv.org/abs/2506.13059. Where
        we differ:

        1. For every query of a sentence, not for the one that is being generated.
        2. A share of the keys instead of a number of them, and one level of clusters.
        3. An entry of the tail knows the spread of its cluster as well (see `sparsefinder.numerics.tail_normalizer`).
    """

    share: float = 0.1  # of the keys, for each query
    n_clusters: int = 32
    iterations: int = 5  # of k-means within the sentence
    seed: int = 0
    # whether each cluster that a query does not take is one entry among its scores: see `Layout`
    tail: bool = field(default=True, kw_only=True)

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()
    # in causal attention
    reads_ahead: ClassVar[str] = "clusters and their means are those of all keys of the sentence"

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_counts(n_clusters=self.n_clusters)
        at_least(0, iterations=self.iterations)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Clusters as buckets: each key in one, each query in those that it takes."""
        q, k = vectors(qk)
        first = first_centres(k, qk, self.n_clusters, self.seed, layer)
        centres = lloyd(k, qk.valid, first, self.iterations)
        cluster = nearest(k, centres)
        members = (cluster[..., None] == torch.arange(self.n_clusters, device=k.device)) & qk.valid[:, None, :, None]
        counted = members.to(q.dtype)
        numbers = counted.cumsum(2) if qk.causal else counted.sum(2, keepdim=True)
        taken = select(q @ centres.mT, numbers, "budget", self.share, 1.0)
        k_ids = cluster.masked_fill(~qk.valid[:, None], -1)[..., None]
        return Layout(Buckets(as_ids(taken), k_ids, self.n_clusters), tail=self.tail)

    def cost(self, tokens: int, size: int) -> float:
        """``C · D`` in every round of k-means and once more for keys, and once for the query."""
        return float((self.iterations + 2) * self.n_clusters * size)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """All but the products of the query: ``C · D`` in every round and once more."""
        return float((self.iterations + 1) * self.n_clusters * size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
