"""What predicting costs: multiplications for each query, of the published method and not of how this package executes it.

A pattern says it by a method ``cost(tokens, size)``. Products of vectors are counted; sums, comparisons, sorting, and what a
rule or a normalizer does with a finished score are not, and neither is what is done once for a model. Attention itself takes
``2 · D`` multiplications for each pair of its graph.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable


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


class Free:
    """A pattern that looks at no vector, or only compares numbers."""

    def cost(self, tokens: int, size: int) -> float:
        """Nothing is multiplied."""
        return 0.0


class EveryPair:
    """A pattern that compares each query with each key, by as many numbers as they have."""

    def cost(self, tokens: int, size: int) -> float:
        """``n · R``: a product of each coordinate of each pair."""
        return float(tokens * size)


def cost_of(pattern: Any, tokens: int, size: int) -> float:
    """Multiplications for each query that a pattern's prediction takes; NaN where it does not say so."""
    return pattern.cost(tokens, size) if isinstance(pattern, HasCost) else math.nan
