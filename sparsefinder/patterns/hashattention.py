"""Learned codes: a query takes the keys whose bits agree with its own in most places (Desai et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.patterns.support.cost import Free
from sparsefinder.patterns.support.ranking import best, check_share, share_of


@dataclass(frozen=True)
class HashAttention(Free):
    """Edge iff ``k_j`` is among the ``⌈share · n_i⌉`` allowed keys whose code agrees with that of ``q_i`` in most of ``R`` bits.

    The code of a token is the signs of its learned projection. Of keys that agree equally the earlier one comes first. Codes are
    compared pair by pair, so there is no bucketed form; but comparing them multiplies nothing, so that the cost is that of the
    projection.

    Source:
        Desai, Yang, Cuadron, Klimovic, Zaharia, Gonzalez, Stoica (2024), HashAttention: Semantic Sparsity for Faster Inference,
        https://arxiv.org/abs/2412.14468. Where we differ:

        1. The projections are those of the stage ``project``, trained by its contrastive loss, of ``rounds`` bits; the paper
           trains networks of three layers for 32 bits by cross-entropy against the keys of largest score. ``project.kind=hidden
           rounds=32`` comes nearest to it.
        2. A share of the keys instead of a number of them.
    """

    share: float = 0.1  # of the keys that a query may see

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ("projections",)

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool from vectors ``(B, H, N, R)``."""
        q, k = (torch.where(x > 0, 1.0, -1.0) for x in (qk.q, qk.k))
        agreeing = (q @ k.mT).masked_fill(~qk.allowed, -torch.inf)
        return best(agreeing, share_of(qk.allowed.sum(-1, keepdim=True), self.share)) & qk.allowed
