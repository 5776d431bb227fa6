"""Longformer: a window, dilated in a few heads, and global tokens (Beltagy et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.errors import UserError, one_of
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import uniform
from sparsefinder.patterns.dilated import dilated
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import at_least, odd
from sparsefinder.patterns.window import GlobalTokens

PLACEMENTS = ("first", "random")


@dataclass(frozen=True)
class Longformer(Free):
    """Edge iff ``i`` or ``j`` is global, or ``(i − j) mod d = 0`` and ``|i − j| ≤ d · (W // 2)``.

    The first ``dilated_heads`` heads have the dilation ``d``, the others have 1: the paper dilates two heads, and none in its
    pretrained models. Global tokens are the ``first`` ones, as in those models ([CLS]), or ``random`` ones, as in the
    published comparison (Treviso et al. 2022).

    Source:
        Beltagy et al. 2020 (https://arxiv.org/abs/2004.05150). Where we differ:

        1. Global tokens use the projections of all others; the paper's have a second set of their own.
        2. Dilation and window are the same in every layer; the paper's grow with the layer.
        3. Random global tokens are drawn for each seed, layer and head; the published comparison draws a random number of them
           anew for each batch, the same ones for all heads.
    """

    width: int = 11  # W, odd: the query's own position and W // 2 keys on each side (the paper's 512 is 513 here)
    dilation: int = 1  # d, tokens from one key to the next
    dilated_heads: int = 2  # the first so many heads; the others see the window without gaps
    num_global_tokens: int = 1  # real tokens that see all and are seen by all
    placement: str = "first"  # first or random
    seed: int = 0  # of the random placement

    sparsity_parameter: ClassVar[str | None] = "width"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        odd(width=self.width)
        at_least(1, dilation=self.dilation)
        at_least(0, dilated_heads=self.dilated_heads, num_global_tokens=self.num_global_tokens)
        if self.placement not in PLACEMENTS:
            raise UserError(f"placement={self.placement} is unknown; {one_of(PLACEMENTS, self.placement)}")

    @property
    def reads_ahead(self) -> str:
        """What later tokens change in causal attention: which tokens are global, where these are drawn."""
        drawn = self.placement == "random" and self.num_global_tokens > 0
        return "global tokens are drawn among all tokens of the sentence" if drawn else ""

    def layout(self, qk: QK, layer: int) -> Layout:
        """The window, in buckets where it has gaps, and the global tokens, in two buckets where they are random."""
        qk.one_text(type(self).__name__)
        heads = qk.q.shape[1]
        near = dilated(qk, self.width, [self.dilation if h < self.dilated_heads else 1 for h in range(heads)])
        if self.placement == "first":
            return near.union(GlobalTokens(self.num_global_tokens).layout(qk, layer))
        return near.union(self._random_globals(qk, layer))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)

    def _random_globals(self, qk: QK, layer: int) -> Layout:
        """Bucket 0: all queries and the global keys. Bucket 1: the global queries and all keys."""
        heads = torch.arange(qk.q.shape[1], device=qk.valid.device)
        drawn = uniform(self.seed, layer, heads[:, None], qk.positions[:, None])  # (B, H, N)
        lowest = drawn.masked_fill(~qk.valid[:, None], torch.inf).argsort(dim=-1, stable=True)
        is_global = lowest.argsort(-1) < self.num_global_tokens
        everyone, absent = torch.zeros_like(lowest), torch.full_like(lowest, -1)
        q_ids = torch.stack([everyone, torch.where(is_global, 1, absent)], dim=-1)
        k_ids = torch.stack([torch.where(is_global, 0, absent), everyone + 1], dim=-1)
        return Layout(Buckets(q_ids, k_ids, 2))
