"""A pattern whose sparsity parameter is set for each layer and head by itself, as calibration does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout, Pattern, has_tail
from sparsefinder.patterns.combine import layout_of
from sparsefinder.patterns.support.cost import cost_of, cost_of_keys

NO_BUCKET = -1


@runtime_checkable
class ForEachHead(Protocol):
    """A pattern whose layout can have a value of the sparsity parameter for each head, at the cost of one."""

    def layout_of_heads(self, qk: QK, layer: int, values: Sequence[Any]) -> Layout:
        """The layout whose head ``h`` is the pattern's at ``values[h]``."""


@dataclass(frozen=True)
class PerHead:
    """Edge of head ``h`` iff the pattern has it with its sparsity parameter at ``values[layer][h]``.

    A pattern that has ``layout_of_heads`` is asked once. Any other is asked once for each distinct value of the layer, about
    all heads, since what it knows (random numbers, centroids) belongs to the index of a head: predicting costs as many times
    more as there are distinct values.

    Args:
        pattern: A pattern dataclass with a sparsity parameter.
        values: Those of the sparsity parameter, for each layer and head.
    """

    pattern: Any  # a pattern dataclass with a sparsity parameter
    values: tuple[tuple[Any, ...], ...]  # of the sparsity parameter, for each layer and head

    def __post_init__(self) -> None:
        if self.pattern.sparsity_parameter is None:
            raise UserError(f"{type(self.pattern).__name__} has no sparsity parameter that could be set for each head")

    @property
    def tail(self) -> bool:
        """Whether the pattern has a tail."""
        return has_tail(self.pattern)

    def layout(self, qk: QK, layer: int) -> Layout:
        """The buckets of every head at its own value, -1 where another head has more slots.

        A local window and global tokens are the same for all heads in a `Layout`.

        Raises:
            UserError: Where the values change the window or the global tokens, or where the pattern has no layout.
        """
        if isinstance(self.pattern, ForEachHead):
            return self.pattern.layout_of_heads(qk, layer, self._values(qk, layer))
        kinds, taken = self._kinds(qk, layer)
        layouts = [layout_of(kind, qk, layer) for kind in kinds]
        if len({layout.window for layout in layouts}) > 1 or not _same([layout.is_global for layout in layouts]):
            raise UserError(
                "a window or global tokens that differ from head to head have no bucketed form: use attention=masked for it"
            )
        buckets_of_values = [layout.buckets for layout in layouts]
        first = layouts[0]
        return Layout(_each_head_its_own(buckets_of_values, taken), first.window, first.is_global, first.tail)

    def cost(self, tokens: int, size: int) -> float:
        """The mean over layers and heads, each at its own value."""
        return fmean(cost_of(kind, tokens, size) for kind in self._all_kinds())

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """The mean over layers and heads, each at its own value."""
        return fmean(cost_of_keys(kind, tokens, size) for kind in self._all_kinds())

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        if isinstance(self.pattern, ForEachHead):
            return self.layout(qk, layer).graph(qk)
        kinds, taken = self._kinds(qk, layer)
        return _select([kind(qk, layer) for kind in kinds], taken)

    def _all_kinds(self) -> list[Any]:
        """The pattern at the value of each layer and head."""
        return [replace(self.pattern, **{self.pattern.sparsity_parameter: v}) for row in self.values for v in row]

    def _kinds(self, qk: QK, layer: int) -> tuple[list[Pattern], list[int]]:
        """The pattern at each distinct value of the layer, and which of them each head takes."""
        values = self._values(qk, layer)
        distinct = sorted(set(values))
        kinds: list[Pattern] = [replace(self.pattern, **{self.pattern.sparsity_parameter: value}) for value in distinct]
        return kinds, [distinct.index(value) for value in values]

    def _values(self, qk: QK, layer: int) -> tuple[Any, ...]:
        heads = qk.q.shape[1]
        if not 0 <= layer < len(self.values) or len(self.values[layer]) != heads:
            raise UserError(
                f"the values are those of {len(self.values)} layers with {len(self.values[0])} heads, asked for was layer "
                f"{layer} with {heads} heads: run stage=calibrate on these queries and keys"
            )
        return self.values[layer]


def _select(parts: Sequence[Tensor], taken: Sequence[int]) -> Tensor:
    """Head ``h`` of ``parts[taken[h]]``, each ``(B, H, ...)``."""
    return torch.stack([parts[index][:, head] for head, index in enumerate(taken)], dim=1)


def _each_head_its_own(buckets_of_values: Sequence[Buckets | None], taken: Sequence[int]) -> Buckets | None:
    known = [buckets for buckets in buckets_of_values if buckets is not None]
    if not known:
        return None
    empty = known[0].q_ids.new_full((*known[0].q_ids.shape[:3], 1), NO_BUCKET)

    def joined(side: Callable[[Buckets], Tensor]) -> Tensor:
        ids = [empty if buckets is None else side(buckets) for buckets in buckets_of_values]
        slots = max(part.shape[-1] for part in ids)
        return _select([F.pad(part, (0, slots - part.shape[-1]), value=NO_BUCKET) for part in ids], taken)

    # heads never meet, so their ids may overlap
    return Buckets(joined(lambda b: b.q_ids), joined(lambda b: b.k_ids), max(buckets.count for buckets in known))


def _same(tensors: Sequence[Tensor | None]) -> bool:
    first = tensors[0]
    return all(
        (first is None and other is None) or (first is not None and other is not None and torch.equal(first, other))
        for other in tensors[1:]
    )
