"""Attention sinks: a window, and the first tokens as keys for everyone (Xiao et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, memberships, odd


@dataclass(frozen=True)
class Sinks(Free):
    """Edge iff ``j < s`` or ``|i − j| ≤ W // 2``: a sink, or a key in the window.

    Sinks are only keys: as queries they see what any token sees (a global token sees all).

    Source:
        Xiao et al. 2024 (https://arxiv.org/abs/2309.17453), StreamingLLM. Where we differ:

        1. In bidirectional attention the window has two sides; the paper is causal.
        2. Keys keep their positions; the paper counts positions inside its cache anew.
    """

    width: int = 11  # W, odd: the query's own position and W // 2 keys on each side
    sinks: int = 4  # s, the first so many real tokens

    sparsity_parameter: ClassVar[str | None] = "width"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        odd(width=self.width)
        at_least(0, sinks=self.sinks)

    def layout(self, qk: QK, layer: int) -> Layout:
        """One bucket that all queries and the sinks are in, and a window."""
        qk.one_text(type(self).__name__)
        position = qk.positions
        q_ids = memberships(qk.q.shape[1], torch.zeros_like(position))
        k_ids = memberships(qk.q.shape[1], torch.where(position < self.sinks, 0, -1))
        return Layout(Buckets(q_ids, k_ids, 1), window=self.width)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
