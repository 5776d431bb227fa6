"""Balanced clusters: every centroid takes the same number of queries and of keys, and those meet (Roy et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import normal
from sparsefinder.patterns.support.kmeans_per_sentence import lloyd
from sparsefinder.patterns.support.ranking import as_ids, check_counts, check_share, first_share, vectors
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class Routing:
    """Edge iff some centroid takes both: ``q_i`` is one of its ``w`` nearest queries and ``k_j`` one of its ``w`` nearest keys.

    ``w = ⌈share · n⌉``, of that sentence. Tokens are scaled to mean 0 and variance 1 over their coordinates (layer
    normalization without parameters), centroids are directions, and the nearest are those of largest ``c · x``. Centroids
    start at random, fixed by seed, layer and head, and are then moved by ``iterations`` rounds of spherical k-means over the
    sentence's own queries and keys together; with ``iterations=0`` they stay at random. A token may be taken by none.

    Where attention is causal, a centroid takes a token iff that was among the ``⌈share · (j + 1)⌉`` nearest of the tokens ``0
    … j`` when it arrived, so later tokens do not change the choice. **With** ``iterations > 0`` **the centroids themselves
    still read the whole sentence**; with 0, nothing reads the future.

    Source:
        Roy, Saffar, Vaswani, Grangier (2021), Efficient Content-Based Sparse Attention with Routing Transformers,
        https://arxiv.org/abs/2003.05997. Where we differ:

        1. The paper moves its centroids by a running average over training batches; a model trained without them has none, so
           ours are computed in each sentence, or taken from Sparsefinder (`LearnedRouting`).
        2. Queries and keys are the model's own; the paper shares them in causal attention.
        3. ``w`` is a share of the sentence; the paper takes ``n / n_clusters``.
        4. The paper routes some heads only and gives the others a window; here every head is routed.
    """

    share: float = 0.1  # of the queries and of the keys, for each centroid
    n_clusters: int = 32
    iterations: int = 5  # of spherical k-means within the sentence; 0: centroids stay at random
    seed: int = 0

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()
    # in causal attention
    reads_ahead: ClassVar[str] = "centroids are moved by all tokens of the sentence"

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_counts(n_clusters=self.n_clusters)
        if self.iterations < 0:
            raise UserError(f"iterations must be 0 or more, got {self.iterations}")

    def layout(self, qk: QK, layer: int) -> Layout:
        """Centroids as buckets: a token is in those that take it."""
        q, k = (F.layer_norm(x, x.shape[-1:]) for x in vectors(qk))
        centres = self._first_centres(qk, layer).to(q.dtype).expand(q.shape[0], -1, -1, -1)
        tokens, valid = torch.cat([q, k], dim=2), torch.cat([qk.queries_valid, qk.valid], dim=1)
        return taken(q, k, lloyd(tokens, valid, centres, self.iterations, spherical=True), qk, self.share)

    def cost(self, tokens: int, size: int) -> float:
        """``2 · C · D`` in every round of k-means and once more, for queries and keys."""
        return 2.0 * (self.iterations + 1) * self.n_clusters * size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Half of it: each key with each centre."""
        return self.cost(tokens, size) / 2

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _first_centres(self, qk: QK, layer: int) -> Tensor:
        """Random directions, ``(H, C, D)`` float64."""
        head, cluster, size = (
            torch.arange(n, device=qk.q.device) for n in (qk.q.shape[1], self.n_clusters, qk.q.shape[-1])
        )
        return F.normalize(normal(self.seed, layer, head[:, None, None], cluster[:, None], size), dim=-1)


@dataclass(frozen=True)
class LearnedRouting:
    """`Routing` to Sparsefinder's centroids, in its projected space and of all runs of k-means.

    A centroid takes the ``⌈share · n⌉`` queries and as many keys of largest cosine with it, where `kmeans` lets each token choose
    its nearest centroids, however full they get. In causal attention nothing reads the future.
    """

    share: float = 0.1  # of the queries and of the keys, for each centroid
    centroids: Centroids | None = None  # attached by a `Configuration`

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ("projections", "centroids")

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def layout(self, qk: QK, layer: int) -> Layout:
        """Centroids as buckets: run ``u`` uses the ids ``u · C … u · C + C − 1``."""
        centres = F.normalize(self.centres(qk, layer), dim=-1)
        q, k = (F.normalize(x, dim=-1) for x in vectors(qk))
        return taken(q, k, centres.to(q.dtype), qk, self.share)

    def cost(self, tokens: int, size: int) -> float:
        """``2 · C · R``: queries and keys with each centroid of all runs."""
        if self.centroids is None:
            raise missing("routing_learned, routing_nearest", "centroids")
        return 2.0 * self.centroids.count * size

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """Half of it: each key with each centroid."""
        return self.cost(tokens, size) / 2

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        return self.layout(qk, layer).graph(qk)

    def centres(self, qk: QK, layer: int) -> Tensor:
        """Those of all runs one after the other, ``(H, runs · C, R)``."""
        if self.centroids is None:
            raise missing("routing_learned, routing_nearest", "centroids")
        return self.centroids(qk, layer).flatten(1, 2)


def taken(q: Tensor, k: Tensor, centres: Tensor, qk: QK, share: float) -> Layout:
    """Each of the ``centres (…, C, R)`` as a bucket of the tokens that it takes: those of largest ``c · x``."""
    sides = ((q, qk.swapped), (k, qk))
    q_ids, k_ids = (as_ids(first_share(x @ centres.transpose(-1, -2), side, share)) for x, side in sides)
    return Layout(Buckets(q_ids, k_ids, centres.shape[-2]))
