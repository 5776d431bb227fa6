"""Balanced clusters by distance: Sparsefinder's centroids take their nearest queries and keys (Treviso et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.routing import LearnedRouting
from sparsefinder.patterns.support.ranking import as_ids, first_share, vectors


@dataclass(frozen=True)
class NearestRouting(LearnedRouting):
    """`LearnedRouting` by distance: a centroid takes the ``⌈share · n⌉`` queries, and as many keys, of smallest ``‖x − c‖``.

    With ``block_size`` these are chunks of tokens, as in the published ``extender_rhf``. In causal attention nothing reads the
    future.
    """

    def layout(self, qk: QK, layer: int) -> Layout:
        """Centroids as buckets: run ``u`` uses the ids ``u · C … u · C + C − 1``."""
        centres = self.centres(qk, layer)

        def ids(x: Tensor, side: QK) -> Tensor:
            # −‖x − c‖² without ‖c‖², which is the same for all tokens that a centroid chooses from
            closeness = 2 * x @ centres.to(x.dtype).mT - x.square().sum(-1, keepdim=True)
            return as_ids(first_share(closeness, side, self.share))

        q, k = vectors(qk)
        return Layout(Buckets(ids(q, qk.swapped), ids(k, qk), centres.shape[1]))
