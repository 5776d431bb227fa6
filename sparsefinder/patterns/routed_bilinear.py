"""Routing to clusters of keys in a trained space: the sub-quadratic form of `Bilinear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsefinder.patterns.routed import ToClusters
from sparsefinder.predictors.centroids import Centroids


@dataclass(frozen=True)
class RoutedBilinear(ToClusters):
    """Routing to clusters of keys in the space that the stage ``bilinear`` trained; see `ToClusters` for the formula.

    At the same rank and density it recalls more than `Routed`: ``docs/explanation/predictors.md``.
    """

    bilinear_centroids: Centroids | None = None  # attached by a `Configuration`

    needs: ClassVar[tuple[str, ...]] = ("bilinear_projections", "bilinear_centroids")
