"""A pattern with everything around it: what one row of the tables is about."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparsefinder.graphs import QK, HasLayout, Pattern
from sparsefinder.kmeans_centroids import Centroids, load_centroids
from sparsefinder.patterns.combine import Blocked, Projected, Union
from sparsefinder.patterns.window import near_pairs, surroundings
from sparsefinder.projections import Projections, load_projections
from sparsefinder.store import Store, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Configuration:
    """A pattern, the chunks it works on, and the fixed neighbourhood that its prediction is united with."""

    name: str  # of the pattern's file in conf/pattern
    pattern: Any  # a pattern dataclass without its artefacts
    window: int | None = None  # odd; None for no window
    global_tokens: int = 0  # the first so many tokens see all and are seen by all
    last_token: bool = False  # so does the last token
    block_size: int = 1  # tokens in a chunk, for patterns that work on projections

    def __post_init__(self) -> None:
        surroundings(self.window, self.global_tokens, self.last_token)  # checks the three
        if self.block_size < 1:
            raise UserError(f"block_size must be 1 token or more, got {self.block_size}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts that the pattern works with."""
        needs: tuple[str, ...] = self.pattern.needs
        return needs

    @property
    def columns(self) -> dict[str, Any]:
        """What tells this row of a table from the others: the pattern's settings and its surroundings."""
        own = {
            field.name: getattr(self.pattern, field.name)
            for field in dataclasses.fields(self.pattern)
            if field.name not in self.needs
        }
        return {
            "pattern": self.name,
            **own,
            "window": self.window or None,
            "global_tokens": self.global_tokens,
            "last_token": self.last_token,
            "block_size": self.block_size,
        }

    @property
    def label(self) -> str:
        """One short line for logs and legends, such as ``kmeans top_clusters=2 + window 11``."""
        dial = self.pattern.dial
        parts = [self.name] + ([f"{dial}={getattr(self.pattern, dial)}"] if dial else [])
        if self.window:
            parts.append(f"+ window {self.window}")
        if self.global_tokens:
            parts.append(f"+ {self.global_tokens} global")
        return " ".join(parts + (["+ last"] if self.last_token else []))

    def near(self, qk: QK) -> Tensor | None:
        """Pairs that the window and the global tokens name, ``(B, H, N, N)`` bool; None without them."""
        return near_pairs(qk, surroundings(self.window, self.global_tokens, self.last_token))

    def build(self, projections: Projections | None = None, centroids: Centroids | None = None) -> Pattern:
        """The pattern as it is run: its artefacts attached, in its space, on its blocks, united with its surroundings."""
        whole: Pattern = self.pattern
        if "centroids" in self.needs:
            whole = replace(self.pattern, centroids=_present(centroids, self.name, "centroids", "cluster"))
        if "projections" in self.needs:
            space = _present(projections, self.name, "projections", "project")
            whole = Projected(Blocked(whole, self.block_size) if self.block_size > 1 else whole, space)
        fixed = surroundings(self.window, self.global_tokens, self.last_token)
        return Union((whole, *fixed)) if fixed else whole

    @property
    def quadratic(self) -> bool:
        """Whether predicting compares every pair: no bucketed form."""
        return not isinstance(self.pattern, HasLayout)


@dataclass(frozen=True)
class Learned:
    """The artefacts that patterns work with; None where no pattern needs them."""

    projections: Projections | None
    centroids: Centroids | None

    @classmethod
    def load(cls, store: Store, needs: tuple[str, ...]) -> Learned:
        """Read what ``needs`` names; a missing file is a `UserError` that names the stage making it."""
        return cls(
            load_projections(store.path("projections")) if "projections" in needs else None,
            load_centroids(store.path("centroids")) if "centroids" in needs else None,
        )

    @property
    def columns(self) -> dict[str, Any]:
        """Sizes for the tables."""
        return {
            "rounds": None if self.projections is None else self.projections.layers[0].q.out_size,
            "n_clusters": None if self.centroids is None else self.centroids.clusters,
        }


def buildable(configurations: tuple[Configuration, ...], learned: Learned) -> tuple[Configuration, ...]:
    """Those of several configurations that the artefacts allow; the others are left out, and the log says why.

    A single one that cannot be built is an error: it was asked for.
    """
    found = []
    for configuration in configurations:
        try:
            configuration.build(learned.projections, learned.centroids)
        except UserError as error:
            if len(configurations) == 1:
                raise
            log.warning("%s is left out: %s", configuration.label, error)
        else:
            found.append(configuration)
    return tuple(found)


def needed(configurations: tuple[Configuration, ...]) -> tuple[str, ...]:
    """The artefacts that any of the configurations works with."""
    return tuple(sorted({name for configuration in configurations for name in configuration.needs}))


def _present(artefact: Any, pattern: str, name: str, stage: str) -> Any:
    if artefact is None:
        raise UserError(f"{pattern} needs {name}: run stage={stage} first, or give a file with {name}=PATH")
    return artefact
