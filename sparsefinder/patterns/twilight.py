"""Top-p after a selector: of the keys that it leaves, the fewest that hold a share of the probability (Lin et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.patterns.quest import Quest
from sparsefinder.patterns.support.ranking import check_counts, check_share, fewest, vectors


@dataclass(frozen=True)
class Twilight:
    """Edge iff `Quest` takes the key's block and the key is among the fewest of those that hold a share ``p`` of ``p̂_i``.

    ``p̂_i`` is softmax of ``q_i·k̂_j / √D`` over the keys that were taken, ``k̂`` the key rounded to ``2^bits`` levels between the
    smallest and the largest of its numbers. Any selector can stand in front: `pruned` takes its graph.

    Source:
        Lin et al. (2025), Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning,
        https://arxiv.org/abs/2502.02770. Where we differ:

        1. For every query of a sentence, not for the one that is being generated.
        2. A share of the blocks in front instead of a quarter of the tokens, blocks of 4.
        3. Scores are compared key by key, so there is no bucketed form.
    """

    p: float = 0.8  # share of the estimated probability of each query
    share: float = 0.4  # of the key blocks, taken in front
    size: int = 4  # keys in a block
    bits: int = 4  # of each number of a key

    sparsity_parameter: ClassVar[str | None] = "p"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("p", self.p)
        check_counts(bits=self.bits)
        self.selector()

    def selector(self) -> Quest:
        """What chooses in front."""
        return Quest(self.share, self.size)

    def cost(self, tokens: int, size: int) -> float:
        """That of the selector, and ``D`` for each key that it leaves, though of few bits."""
        return self.selector().cost(tokens, size) + self.share * tokens * size

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        return pruned(self.selector()(qk, layer), qk, self.p, self.bits)


def pruned(graph: Tensor, qk: QK, p: float, bits: int) -> Tensor:
    """The fewest keys of each row of a graph that hold a share of its probability.

    Args:
        graph: ``(B, H, N, N)`` bool, from any selector.
        qk: Queries and keys.
        p: The share.
        bits: Of each number of a key, in the scores that say what is probable.

    Returns:
        ``(B, H, N, N)`` bool, a part of the graph.
    """
    q, k = vectors(qk)
    scores = qk.with_vectors(q, _rounded(k, bits)).scores().masked_fill(~graph, -torch.inf)
    return fewest(torch.softmax(scores, dim=-1).nan_to_num(0.0), p) & graph


def _rounded(x: Tensor, bits: int) -> Tensor:
    """``(…, D)``, each number moved to the nearest of ``2^bits`` levels between the smallest and the largest of its vector."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    return low + ((x - low) / step).round() * step
