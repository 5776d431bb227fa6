"""An attention that lets another one work and looks at it: at what it was given, and at what it gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparsefinder.attention import Dense
from sparsefinder.graphs import QK, Attention
from sparsefinder.numerics.normalizers import Normalizer, PerHead

Look = Callable[[int, QK, Tensor, Tensor], None]
"""``(layer, queries and keys, values (B, H_k, N_k, D), output (B, H, N_q, D))``."""


@dataclass(frozen=True)
class OwnDense:
    """A model's own dense attention as one that can be plugged in: each layer with its normalizer (`models.normalizers`)."""

    normalizers: Sequence[Normalizer | PerHead]
    causal: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, query_valid: Tensor | None = None
    ) -> Tensor:
        """As `Dense`."""
        return Dense(self.normalizers[layer], self.causal)(q, k, v, valid, layer, query_valid)


@dataclass(frozen=True)
class Watched:
    """``attention``, whose every call is shown to ``look`` once it is done; the output stays what it is."""

    attention: Attention
    look: Look

    @property
    def causal(self) -> bool:
        """Whether a query of the attention sees no later key by itself."""
        return bool(getattr(self.attention, "causal", False))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, query_valid: Tensor | None = None
    ) -> Tensor:
        """As the attention."""
        between_texts = {} if query_valid is None else {"query_valid": query_valid}
        output = self.attention(q, k, v, valid, layer, **between_texts)
        self.look(layer, QK(q, k, valid, self.causal and query_valid is None, query_valid), v, output)
        return output


@dataclass(frozen=True)
class Recorder:
    """A look that keeps the queries and keys that each layer was given last, without their gradients."""

    layers: dict[int, QK] = field(default_factory=dict)

    def __call__(self, layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
        self.layers[layer] = qk.with_vectors(qk.q.detach(), qk.k.detach())
