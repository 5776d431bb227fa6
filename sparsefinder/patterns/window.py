"""Fixed neighbourhoods: a local window around every token, and global tokens that see all and are seen by all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Layout
from sparsefinder.patterns.support.cost import Free


@dataclass(frozen=True)
class Window(Free):
    """Edge iff ``|i − j| ≤ W // 2`` (Beltagy et al. 2020, without their dilation and global tokens)."""

    width: int = 11  # W, odd: the query's own position and W // 2 keys on each side

    sparsity_parameter: ClassVar[str | None] = "width"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % 2 == 0:
            raise UserError(
                f"a window must be an odd number of tokens, 1 or more, got {self.width}: try {max(self.width + 1, 1)}"
            )

    def layout(self, qk: QK, layer: int) -> Layout:
        """The band, unbuilt."""
        qk.one_text(type(self).__name__)
        return Layout(window=self.width)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)


@dataclass(frozen=True)
class GlobalTokens(Free):
    """Edge iff the query or the key is one of the first ``first`` real tokens, or, with ``last``, the last real one.

    In causal attention a global token still sees no later key.
    """

    first: int = 1
    last: bool = False

    sparsity_parameter: ClassVar[str | None] = "first"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.first < 0:
            raise UserError(f"global_tokens must be 0 or more, got {self.first}")

    @property
    def reads_ahead(self) -> str:
        """What later tokens change in causal attention: which one is the last."""
        return "which token is the last" if self.last else ""

    def layout(self, qk: QK, layer: int) -> Layout:
        """Which tokens are global, ``(B, N)``, without a graph."""
        qk.one_text(type(self).__name__)
        rank = qk.valid.long().cumsum(-1)
        is_global = rank <= self.first
        if self.last:
            is_global = is_global | (rank == qk.lengths[:, None])
        return Layout(is_global=is_global & qk.valid)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)


def local_and_global(window: int | None, global_tokens: int, last_token: bool) -> tuple[Window | GlobalTokens, ...]:
    """The local window and the global tokens that a prediction is united with.

    Args:
        window: Width in tokens, odd; None or 0 for no window.
        global_tokens: The first so many tokens see all and are seen by all.
        last_token: So does the last token.

    Returns:
        A pattern for each of the two that is asked for.

    Raises:
        UserError: For an even width, or fewer than 0 tokens.
    """
    fixed: list[Window | GlobalTokens] = []
    if window is not None and window != 0:
        fixed.append(Window(window))
    if global_tokens or last_token:
        fixed.append(GlobalTokens(global_tokens, last_token))
    return tuple(fixed)


def near_pairs(qk: QK, fixed: tuple[Window | GlobalTokens, ...], rows: Tensor | None = None) -> Tensor | None:
    """Pairs that the local window and the global tokens name.

    Args:
        qk: Queries and keys of any layer.
        fixed: What `local_and_global` gave.
        rows: ``(S,)`` int64, positions of the queries that are asked about; None for all.

    Returns:
        ``(B, H, S or N, N)`` bool on allowed pairs; None where there is no fixed pattern.
    """
    if not fixed:
        return None
    return reduce(Layout.union, (pattern.layout(qk, 0) for pattern in fixed)).graph(qk, rows)
