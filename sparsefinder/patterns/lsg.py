"""The graph of LSG attention, where it has one (Condevaux and Harispe 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.attention import LSGAttention, pack
from sparsefinder.executors.local_sparse_global.settings import POOLED
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.patterns.window import GlobalTokens


@dataclass(frozen=True)
class LSG:
    """With blocks ``I = ⌊(i − g) / b⌋``, ``J = ⌊(j − g) / b⌋``: edge iff ``i < g``, ``j < g``, ``|I − J| ≤ 1`` or ``j ∈ S_I``.

    The first ``g`` tokens are global, and ``S_I`` are the ``b`` sparse keys on either side of blocks ``I − 1 … I + 1``. Sparse
    keys stand for ``sparsity_factor`` tokens each and are picked by ``sparsity_type``: keys of largest norm, every f-th token
    or a run of tokens of each block (both shifted from head to head), or none. Types that pool keys (pooling, lsh,
    bos_pooling) have no graph between tokens and are refused. Up to two blocks every pair is an edge, as published.

    Source:
        Condevaux and Harispe 2022 (https://arxiv.org/abs/2210.15497), as a pattern:
        `sparsefinder.executors.local_sparse_global.attention` executes the same graph in its own way and states where it
        differs from the paper.
    """

    sparsity_type: str = "norm"  # norm, stride, block_stride or none
    block: int = 8  # b, tokens in a block, and sparse keys on each side
    sparsity_factor: int = 2  # f, tokens that a sparse key stands for
    num_global_tokens: int = 1  # g

    sparsity_parameter: ClassVar[str | None] = "block"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.sparsity_type in POOLED:
            raise UserError(
                f"sparsity_type={self.sparsity_type} pools keys and has no graph between tokens: choose norm, stride, "
                f"block_stride or none, or evaluate attention=lsg_{self.sparsity_type}"
            )
        self.attention()

    def attention(self, causal: bool = False) -> LSGAttention:
        """The attention whose graph this is."""
        return LSGAttention(
            self.sparsity_type, self.block, self.block, self.sparsity_factor, self.num_global_tokens, causal=causal
        )

    def layout(self, qk: QK, layer: int) -> Layout:
        """A bucket for each block of queries, with the keys that it sees, and the global tokens."""
        qk.one_text(type(self).__name__)
        is_global = GlobalTokens(self.num_global_tokens).layout(qk, layer)
        packed = pack(qk.valid)
        prefix = self.num_global_tokens
        tokens = packed.valid.shape[1]
        if tokens <= prefix:
            return is_global
        view = self.attention(qk.causal).view(packed.bring(qk.k), packed.valid)  # (B, H, blocks, text)
        block = torch.arange(view.shape[2], device=view.device)[:, None]
        seen_by = torch.where(view, block, -1).topk(int(view.sum(2).max()), dim=2).values.transpose(2, 3)
        k_ids = F.pad(seen_by, (0, 0, prefix, 0), value=-1)
        position = qk.positions[:, None, :, None].expand(-1, k_ids.shape[1], -1, k_ids.shape[3])
        q_ids = torch.where(position[..., :1] < prefix, -1, (position[..., :1] - prefix) // self.block)
        return Layout(Buckets(q_ids, k_ids.gather(2, position), view.shape[2])).union(is_global)

    def cost(self, tokens: int, size: int) -> float:
        """``D``, the norm of each key, where keys are picked by that."""
        return float(size) if self.sparsity_type == "norm" else 0.0

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return self.layout(qk, layer).graph(qk)
