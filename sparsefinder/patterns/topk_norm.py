"""Keys of largest norm, the same for all queries of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.support.ranking import check_share, first_share, vectors


@dataclass(frozen=True)
class TopKNorm:
    """Edge iff ``‖k_j‖₂`` is among the ``⌈share · n⌉`` largest of its sentence, whoever asks.

    Where attention is causal, a key is kept iff it was among the ``⌈share · (j + 1)⌉`` largest of the keys ``0 … j`` when it
    came: later keys neither push it out nor let it in, so a choice never reads the future.

    Source:
        The sparse keys of LSG attention by norm (Condevaux and Harispe 2022, https://arxiv.org/abs/2210.15497). Devoto et al.
        (2024, https://arxiv.org/abs/2406.11430) find the opposite in decoders, where keys of *small* norm matter. Where we
        differ:

        1. The largest of the whole sentence, not of each chunk.
        2. For all queries, not for those of the neighbouring blocks.
    """

    share: float = 0.1  # of the keys

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def layout(self, qk: QK, layer: int) -> Layout:
        """One bucket: all queries and the kept keys."""
        norms = torch.linalg.vector_norm(vectors(qk)[1], dim=-1, keepdim=True)
        k_ids = torch.where(first_share(norms, qk, self.share), 0, -1)
        return Layout(Buckets(k_ids.new_zeros(*qk.q.shape[:3], 1), k_ids, 1))

    def cost(self, tokens: int, size: int) -> float:
        """``D``: the norm of each key."""
        return float(size)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """All of it."""
        return self.cost(tokens, size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
