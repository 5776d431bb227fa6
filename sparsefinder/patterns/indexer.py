"""One choice of keys for all heads of a layer, by a few small index heads (DeepSeek-AI 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefinder.graphs import QK
from sparsefinder.patterns.support.ranking import best, check_share, share_of
from sparsefinder.predictors.indexer import Indexer
from sparsefinder.storage.store import missing


@dataclass(frozen=True)
class LightningIndexer:
    """Edge iff ``k_j`` is among the ``⌈share · n_i⌉`` allowed keys of largest ``I_ij``, in all heads.

    ``I_ij = Σ_h w_ih relu(q_ih · k_j / √R)``, with few index heads ``h`` of few numbers.

    The index heads are those that the stage ``bilinear`` trained, see `sparsefinder.predictors.indexer`. Of equal keys the
    earlier one comes first; in causal attention a query ranks the keys up to itself.

    Source:
        DeepSeek-AI (2025), DeepSeek-V3.2-Exp, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp. Where we differ:

        1. Index heads read the queries and keys of the layer, not its hidden states, and nothing is rotated.
        2. 2 index heads of 8 numbers instead of 64 of 128; their weights have a constant part, from which they start.
        3. A share of the keys instead of 2,048 of them. The model stays frozen: there is no second stage of training.
    """

    share: float = 0.1  # of the keys that a query may see
    indexer: Indexer | None = None  # attached by a `Configuration`

    sparsity_parameter: ClassVar[str | None] = "share"
    needs: ClassVar[tuple[str, ...]] = ("indexer",)

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def cost(self, tokens: int, size: int) -> float:
        """``(H' R + R + H') · D + n · H' · R / H``: index heads are projected from, and serve, all ``H`` heads."""
        heads, width, numbers = self._attached.sizes
        return float((heads * numbers + numbers + heads) * size + tokens * heads * numbers * size / width)

    def cost_of_keys(self, tokens: int, size: int) -> float:
        """``R · D``: all index heads compare with the same numbers of a key."""
        return float(self._attached.sizes[2] * size)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        """``(B, H, N, N)`` bool."""
        scores = self._attached.scores(qk, layer)
        allowed = qk.allowed[:, 0]
        chosen = best(scores, share_of(allowed.sum(-1, keepdim=True), self.share)) & allowed
        return chosen[:, None].expand(qk.graph_shape).clone()

    @property
    def _attached(self) -> Indexer:
        if self.indexer is None:
            raise missing(type(self).__name__, "indexer")
        return self.indexer
