"""What predicting costs: multiplications for each query, of the published method and not of how this package executes it.

A pattern says it by a method ``cost(tokens, size)``. Products of vectors are counted; sums, comparisons, sorting, and what a
rule or a normalizer does with a finished score are not, and neither is what is done once for a model. Attention itself takes
``2 · D`` multiplications for each pair of its graph.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol, runtime_checkable


@runtime_checkable
class HasCost(Protocol):
    """A pattern that says what its prediction costs."""

    def cost(self, tokens: int, size: int) -> float:
        """Multiplications for each query.

        Args:
            tokens: ``n``, those of the sentence.
            size: Numbers in each query and key as the pattern is given them.

        Returns:
            Those on keys too, as many keys as there are queries; 0 where nothing is multiplied.
        """


@runtime_checkable
class HasCostOfKeys(Protocol):
    """A pattern part of whose cost is of keys, however many queries there are."""

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """The multiplications in ``cost(tokens, size)`` that are made for each key; `HasCost` has the arguments."""


class Free:
    """A pattern that looks at no vector, or only compares numbers."""

    def cost(self, tokens: int, size: int) -> float:
        """Nothing is multiplied."""
        return 0.0


class EveryPair:
    """A pattern that compares each query with each key, by as many numbers as they have, and queries with each other never."""

    each_query_alone: ClassVar[bool] = True  # see `sparsefinder.attention.Masked`

    def cost(self, tokens: int, size: int) -> float:
        """``n · R``: a product of each coordinate of each pair."""
        return float(tokens * size)


def cost_of(pattern: Any, tokens: int, size: int, queries: int | None = None) -> float:
    """Multiplications for each query that a pattern's prediction takes; NaN where it does not say so.

    Args:
        pattern: Any pattern.
        tokens: Keys.
        size: Numbers in each query and key.
        queries: Those between which the cost of the keys is divided; None: as many as keys.
    """
    if not isinstance(pattern, HasCost):
        return math.nan
    more = 0.0 if queries is None else tokens / queries - 1.0
    return pattern.cost(tokens, size) + (more * cost_of_keys(pattern, tokens, size) if more else 0.0)


def cost_of_keys(pattern: Any, tokens: int, size: int) -> float:
    """The part of `cost_of` that is of each key; 0 where a pattern says none."""
    return pattern.cost_of_keys(tokens, size) if isinstance(pattern, HasCostOfKeys) else 0.0
