"""A pattern with all that it is run with: what one row of the tables is about."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.experiment.instantiate import construct
from sparsefinder.graphs import QK, HasLayout, Pattern, has_tail
from sparsefinder.patterns.combine import Blocked, Projected, ShareInGroup, Union, layout_of
from sparsefinder.patterns.per_head import PerHead
from sparsefinder.patterns.window import local_and_global, near_pairs
from sparsefinder.predictors.centroids import Centroids, load_centroids
from sparsefinder.predictors.indexer import load_indexer
from sparsefinder.predictors.projections import Projections, load_projections
from sparsefinder.storage.store import Store, missing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dials:
    """The value of the sparsity parameter for every layer and head, and what it was chosen for."""

    target: str  # such as density=0.1
    values: tuple[tuple[Any, ...], ...]  # (L, H)
    repeated: bool = False  # the one layer in `values` stands for every layer

    @classmethod
    def given(cls, pattern: Any, values: Sequence[Any]) -> Dials:
        """Those that somebody wrote down; a `UserError` where one cannot be.

        ``values``: a list over heads for all layers, or over layers of lists over heads.
        """
        parameter = pattern.sparsity_parameter
        if repeated := bool(values) and not any(isinstance(value, (list, tuple)) for value in values):
            values = [values]
        widths = {len(row) if isinstance(row, (list, tuple)) else 0 for row in values}
        if len(widths) != 1 or widths == {0}:
            raise UserError(
                f"pattern.{parameter}={list(values)}: a value for each head is a list over heads, such as [1.0,2.0], or over "
                "layers of equally long ones, such as [[1.0,2.0],[0.5,1.5]]"
            )
        for value in (value for row in values for value in row):
            construct(type(pattern), {parameter: value}, "pattern")  # checks the value
        return cls("given dials", tuple(tuple(row) for row in values), repeated)


@dataclass(frozen=True)
class Configuration:
    """A pattern, the chunks it works on, and the local and global tokens that its prediction is united with."""

    name: str  # of the pattern's file in conf/pattern
    pattern: Any  # a pattern dataclass without its artefacts
    window: int | None = None  # odd; None for no window
    global_tokens: int = 0  # the first so many tokens see all and are seen by all
    last_token: bool = False  # so does the last token
    block_size: int = 1  # tokens in a chunk, for patterns that work on the projections of stage=project
    dials: Dials | None = None  # of each layer and head, instead of the pattern's own
    # whether heads that share their keys have one prediction, that of their mean query, of a pattern that learned it so
    share_in_group: bool = False

    def __post_init__(self) -> None:
        local_and_global(self.window, self.global_tokens, self.last_token)  # checks the three
        if self.block_size < 1:
            raise UserError(f"block_size must be 1 token or more, got {self.block_size}")
        if self.dials is not None and self.share_in_group:
            raise UserError(
                "share_in_group=true gives heads that share their keys one prediction, so none can have a sparsity parameter of "
                "its own: leave out target= and values for each head, or share_in_group"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts that the pattern works with."""
        needs: tuple[str, ...] = self.pattern.needs
        return needs

    @property
    def chunk(self) -> int:
        """Tokens that the pattern takes as one: ``block_size`` in the space that is learned in chunks, else 1."""
        return self.block_size if "projections" in self.needs else 1

    @property
    def columns(self) -> dict[str, Any]:
        """What tells this row of a table from the others: the pattern's settings, and what it is united with."""
        settings = {
            field.name: getattr(self.pattern, field.name)
            for field in dataclasses.fields(self.pattern)
            if field.name not in self.needs
        }
        if self.dials is not None:
            settings[self.pattern.sparsity_parameter] = None  # differs by head: see the settings, or calibration/dials
        return {
            "pattern": self.name,
            **settings,
            "target": None if self.dials is None else self.dials.target,
            "window": self.window or None,
            "global_tokens": self.global_tokens,
            "last_token": self.last_token,
            "block_size": self.chunk,
        } | ({"share_in_group": True} if self.shares else {})

    @property
    def shares(self) -> bool:
        """Whether heads that share their keys have one prediction: only of what is learned."""
        return self.share_in_group and bool(self.needs)

    @property
    def label(self) -> str:
        """One short line for logs and legends, such as ``kmeans top_clusters=2 + window 11``."""
        parameter = self.pattern.sparsity_parameter
        at = [f"{parameter}={getattr(self.pattern, parameter)}"] if parameter else []
        parts = [self.name, *(at if self.dials is None else [f"at {self.dials.target}"])]
        if has_tail(self.pattern):
            parts.append("+ tail")
        if self.window:
            parts.append(f"+ window {self.window}")
        if self.global_tokens:
            parts.append(f"+ {self.global_tokens} global")
        return " ".join(parts + (["+ last"] if self.last_token else []))

    @property
    def without_local_and_global(self) -> Configuration:
        """The same without local and global tokens: what configurations share that differ in these alone."""
        return replace(self, window=None, global_tokens=0, last_token=False)

    @property
    def united_with(self) -> tuple[int | None, int, bool]:
        """The local and global tokens by themselves: window, global tokens, last token."""
        return self.window, self.global_tokens, self.last_token

    def near(self, qk: QK, rows: Tensor | None = None) -> Tensor | None:
        """Pairs that the window and the global tokens name, ``(B, H, S or N, N)`` bool as `near_pairs` has it; None without."""
        return near_pairs(qk, local_and_global(self.window, self.global_tokens, self.last_token), rows)

    def build(self, learned: Learned | None = None) -> Pattern:
        """The pattern as it is run: its artefacts attached, in its space, on its blocks, united with local and global tokens."""
        artefacts = {name: (learned or Learned()).get(name, self.name) for name in self.needs}
        fields = {field.name for field in dataclasses.fields(self.pattern)}
        whole: Pattern = replace(self.pattern, **{name: value for name, value in artefacts.items() if name in fields})
        if self.dials is not None:
            whole = PerHead(whole, self.dials.values)
        own = {name for name in fields if name in artefacts}  # a pattern with a field for them projects by itself
        for space in (value for name, value in artefacts.items() if isinstance(value, Projections) and name not in own):
            whole = Projected(Blocked(whole, self.chunk) if self.chunk > 1 else whole, space)
        if self.shares and learned is not None and learned.group > 1:
            whole = ShareInGroup(whole, learned.group)
        fixed = local_and_global(self.window, self.global_tokens, self.last_token)
        return Union((whole, *fixed)) if fixed else whole

    @property
    def quadratic(self) -> bool:
        """Whether predicting compares every pair: no bucketed form."""
        return not isinstance(self.pattern, HasLayout)

    def fitted(self, layers: int, heads: int) -> Configuration:
        """With a value for each of so many layers; a `UserError` where those of another number of layers or heads are given."""
        if self.dials is None:
            return self
        repeated, values = self.dials.repeated, self.dials.values
        if len(values[0]) != heads or not (repeated or len(values) == layers):
            given = f"{len(values[0])} heads" if repeated else f"{len(values)} layers of {len(values[0])} heads"
            raise UserError(
                f"pattern.{self.pattern.sparsity_parameter} has values for {given}, the model has {layers} layers of "
                f"{heads}: give a list of {heads} values, or of {layers} such lists"
            )
        return replace(self, dials=Dials(self.dials.target, values * layers if repeated else values))

    def bucketed(self, learned: Learned, head_size: int) -> bool:
        """Whether it has a bucketed form; a value for each head can take it away (`PerHead`)."""
        if self.quadratic or self.dials is None:
            return not self.quadratic
        vectors = torch.zeros(1, len(self.dials.values[0]), 64, head_size)
        qk = QK(vectors, vectors, torch.ones(1, 64, dtype=torch.bool))
        try:
            for layer in range(len(self.dials.values)):
                layout_of(self.build(learned), qk, layer)
        except UserError:
            return False
        return True


LOADERS: Mapping[str, Callable[[Path], Any]] = {
    "projections": load_projections,
    "centroids": load_centroids,
    "online_centroids": load_centroids,
    "lowrank": load_projections,
    "key_centroids": load_centroids,
    "bilinear_projections": load_projections,
    "bilinear_centroids": load_centroids,
    "indexer": load_indexer,
}


@dataclass(frozen=True)
class Learned:
    """The artefacts that patterns work with, by name; only those that some pattern needs."""

    artefacts: Mapping[str, Any] = field(default_factory=dict)
    group: int = 1  # heads of queries that were learned for as one, because they share their keys

    @classmethod
    def load(cls, store: Store, needs: tuple[str, ...], group: int = 1) -> Learned:
        """Read what ``needs`` names; a missing file is a `UserError` that names the stage making it."""
        return cls({name: LOADERS[name](store.path(name)) for name in needs}, group)

    @classmethod
    def of(cls, store: Store, configurations: tuple[Configuration, ...], group: int) -> Learned:
        """What configurations work with.

        Args:
            store: Of the run.
            configurations: Which may say that heads share a prediction.
            group: Heads of the model that share their keys.
        """
        return cls.load(store, needed(configurations), group if any(each.shares for each in configurations) else 1)

    def get(self, name: str, pattern: str) -> Any:
        """The artefact of that name; without it a `UserError` that names the pattern and the stage."""
        if name not in self.artefacts:
            raise missing(pattern, name)
        return self.artefacts[name]

    def check(self, layers: int, heads: int, size: int) -> None:
        """Raise a `UserError` where projections do not fit queries and keys of that shape."""
        for artefact in self.artefacts.values():
            if isinstance(artefact, Projections):
                artefact.check(layers, heads // self.group, size)

    def sizes(self, needs: tuple[str, ...]) -> dict[str, Any]:
        """Columns of the tables: the size of the projected space, and the number of clusters."""
        artefacts = [self.artefacts[name] for name in needs if name in self.artefacts]
        rounds = [artefact.layers[0].q.out_size for artefact in artefacts if isinstance(artefact, Projections)]
        clusters = [artefact.clusters for artefact in artefacts if isinstance(artefact, Centroids)]
        return {"rounds": rounds[0] if rounds else None, "n_clusters": clusters[0] if clusters else None}


def fitted(configurations: Iterable[Configuration], layers: int, heads: int) -> tuple[Configuration, ...]:
    """`Configuration.fitted` of each."""
    return tuple(configuration.fitted(layers, heads) for configuration in configurations)


def buildable(configurations: tuple[Configuration, ...], learned: Learned) -> tuple[Configuration, ...]:
    """Those of several configurations that the artefacts allow; the others are left out, and the log says why.

    A single one that cannot be built is an error: it was asked for.
    """
    return _possible(configurations, lambda configuration: configuration.build(learned))


def between_texts(
    configurations: tuple[Configuration, ...], learned: Learned, heads: int, size: int
) -> tuple[Configuration, ...]:
    """Those of several configurations that can choose keys of another text, as `buildable`: each is asked about two short ones.

    Args:
        configurations: That can be built.
        learned: What they work with.
        heads: ``H``.
        size: ``D``.
    """
    q, k = (torch.linspace(-1.0, 1.0, tokens * heads * size).view(1, heads, tokens, size) for tokens in (16, 24))
    valid, query_valid = (torch.ones(1, side.shape[2], dtype=torch.bool) for side in (k, q))
    qk = QK(q, k, valid, query_valid=query_valid)
    return _possible(configurations, lambda configuration: configuration.build(learned)(qk, 0))


def _possible(
    configurations: tuple[Configuration, ...], attempt: Callable[[Configuration], Any]
) -> tuple[Configuration, ...]:
    possible = []
    left_out: dict[tuple[str, str], list[str]] = {}  # labels: a sweep would say the same for each of its values
    for configuration in configurations:
        try:
            attempt(configuration)
        except UserError as error:
            if len(configurations) == 1:
                raise
            name = configuration.label.partition(" ")[0]
            left_out.setdefault((name, str(error)), []).append(configuration.label)
        else:
            possible.append(configuration)
    for (_, reason), (first, *others) in left_out.items():
        log.warning("%s%s left out: %s", first, f" and {len(others)} more are" if others else " is", reason)
    return tuple(possible)


def needed(configurations: tuple[Configuration, ...]) -> tuple[str, ...]:
    """The artefacts that any of the configurations works with."""
    return tuple(sorted({name for configuration in configurations for name in configuration.needs}))
