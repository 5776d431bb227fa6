"""The stage ``route``: projections in closed form whose inner product is nearest to the scores, and clusters of keys there.

For queries and keys with second moments ``C_q = E[q qᵀ]`` and ``C_k = E[(k − k̄)(k − k̄)ᵀ]`` the matrix ``M`` of rank R that makes
``E (qᵀ k − qᵀ M k)²`` least, over independent queries and centred keys, comes from one singular value decomposition:

    ``C_q^{½} C_k^{½} = U S Vᵀ``,   ``q' = √(R/D) · q C_q^{-½} U_R``,   ``k' = k C_k^{-½} V_R S_R``,   ``q'·k' / √R ≈ q·k / √D``

Keys are centred because the mean key adds the same number to all scores of a query, which no normalizer sees. Nothing is
trained, so it takes seconds; with ``R = D`` the projection is exact. All of the singular values go to the keys: queries are
white then, so the squared distance of two projected keys is the mean squared difference of the scores they get. In that
distance the keys (not the queries) are clustered; a query is *routed* to clusters by its scores, see
`sparsefinder.patterns.routed`.

Compared with the published Sparsefinder: an inner product instead of a distance, separate projections instead of a shared
one, clusters of keys alone. The file of the projections has the same form, biases zero. `sparsefinder.bilinear` trains on
from here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sparsefinder.errors import check_counts
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.fit_centroids import KeyClusterSettings, fit_tree
from sparsefinder.storage.held_out import training_samples
from sparsefinder.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouteSettings(KeyClusterSettings):
    """Settings of the stage ``route``."""

    rank: int = 32  # R, numbers that queries and keys are compared by; at most the head size
    # heads that share their keys are learned for as one, with the mean of their queries
    share_in_group: bool = False

    def __post_init__(self) -> None:
        check_counts("route", self, "rank", "n_clusters", "coarsest", "max_iterations")

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk",)


def run(settings: RouteSettings, store: Store) -> None:
    """Make ``lowrank`` and ``key_centroids`` from ``qk``."""
    samples = training_samples(store, settings.share_in_group)
    lowrank = fit_lowrank(samples, settings.rank)
    centroids = fit_tree(samples, lowrank, settings)
    with store.writing("lowrank") as path:
        lowrank.save(path)
    with store.writing("key_centroids") as path:
        centroids.save(path)
