"""Patterns under test by their names: files of ``conf/pattern``, and what other packages bring.

    python -m sparsefinder.testing powers another     # a line for each; status 1 where a promise is broken

What a pattern has learned is replaced by random numbers: a promise is kept whatever was learned.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from sparsefinder.experiment import named
from sparsefinder.experiment.configuration import LOADERS, Configuration, Learned
from sparsefinder.experiment.instantiate import construct
from sparsefinder.graphs import Pattern
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.indexer import Indexer
from sparsefinder.predictors.projections import LayerProjections, Linear, Projections
from sparsefinder.testing.subject import Subject

HEADS, SIZE, ROUNDS = 2, 8, 3  # of the artefacts that patterns are tested with
SPACES = {"projections", "lowrank", "bilinear_projections"}
"""Artefacts that are projections; the others are centroids, but for the index heads."""
_IN_CHUNKS = ("centroids", "online_centroids")


@cache
def learned(block_size: int = 1) -> Learned:
    """Artefacts of random numbers: spaces, and two runs of six clusters each, for two layers of `HEADS` heads.

    Args:
        block_size: Tokens in a chunk of which clusters are; those of keys are always of single ones, as their stages make
            them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [LayerProjections(Linear(HEADS, SIZE, ROUNDS), Linear(HEADS, SIZE, ROUNDS)) for _ in range(2)]
        space = Projections([layer.requires_grad_(False) for layer in layers])
        sizes = dict.fromkeys((1, block_size))
        clusters = {b: Centroids([torch.randn(HEADS, 2, 6, ROUNDS * b) / 2 for _ in range(2)]) for b in sizes}
        width = HEADS * SIZE
        shapes = {"q": (3, width, ROUNDS), "k": (width, ROUNDS), "w": (width, 3), "b": (3,)}
        indexer = Indexer([{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)])
    made = {name: space if name in SPACES else clusters[block_size if name in _IN_CHUNKS else 1] for name in LOADERS}
    return Learned(made | {"indexer": indexer})


def built(pattern: Any, **around: Any) -> Pattern:
    """The pattern with what it needs, united with what is ``around`` it: fields of a `Configuration`."""
    configuration = Configuration("tested", pattern, **around)
    return configuration.build(learned(configuration.block_size))


def subject_named(name: str) -> Subject:
    """The pattern of that name, with its own settings and sweep.

    Args:
        name: Of a file in ``conf/pattern``, or of an entry point of the group ``sparsefinder.patterns``.

    Raises:
        UserError: For a name that is not there, and for a package that cannot be used.
    """
    kind, settings, sweep = named.filled("pattern", name, {"alpha": 1.5, "seed": 0, "causal": False})
    return Subject(construct(kind, settings, "pattern"), built, sweep, heads=HEADS, size=SIZE, name=name)
