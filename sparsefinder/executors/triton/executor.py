"""Block-sparse α-entmax attention on a GPU: the graph that `sparsefinder.attention.Bucketed` runs, in Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.triton.plan import Plan, plan
from sparsefinder.graphs import QK, HasLayout, Layout, Pattern
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.padding import without_padding

_ENTMAX15 = Normalizer(1.5)  # the normalizer of the gold graphs


@dataclass(frozen=True)
class BlockSparse:
    """Sparsefinder's attention in blocks: the same output and gradients as ``Masked`` of the same pattern, to rounding.

    The pattern must have a ``layout``, as for `Bucketed`, and shares its promises: a key met twice counts once, a query without
    keys gives zeros, nothing is of size N × N. Scores are recomputed in every sweep over the blocks (one for the maximum, about
    five for the threshold of entmax, one for the output) instead of kept. Needs CUDA and Triton (``pip install
    sparsefinder[gpu]``); on a CPU only Triton's interpreter runs it, for tests. Differs from `Bucketed` in dtype: float64
    is refused, and half-precision queries and keys are multiplied as they are, with float32 sums.
    """

    pattern: Pattern  # who may attend to whom; must have a layout
    normalizer: Normalizer = _ENTMAX15  # how the scores on the graph become probabilities
    causal: bool = False  # whether a query sees no later key
    block: int = 64  # queries and keys of a block: a power of two, 16 or more

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, HasLayout):
            raise UserError(
                f"block-sparse attention got the pattern {type(self.pattern).__name__}, which has no layout (buckets, window, "
                "global tokens): choose a pattern with buckets such as kmeans or quantize, or use attention=masked"
            )
        if self.block < 16 or self.block & (self.block - 1):
            raise UserError(f"block must be a power of two of 16 or more, got {self.block}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        """``q, k, v (B, H, N, D)`` float32 or half precision, ``valid (B, N)`` → ``(B, H, N, D)`` in the dtype of ``v``."""
        check_device(q)
        if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype == torch.float64:
            raise ValueError(
                f"q, k and v must share a dtype of float32 or less, got {q.dtype}, {k.dtype} and {v.dtype}"
            )
        # imported here: Triton is not needed to import the package, and decides at its import whether it interprets
        from sparsefinder.executors.triton.block_sparse import block_sparse

        q, k, v = without_padding(q, valid), without_padding(k, valid), without_padding(v, valid)
        return block_sparse(q, k, v, self._plan(QK(q, k, valid, self.causal), layer), self.normalizer.alpha, self.block)

    @torch.no_grad()
    def graph(self, qk: QK, layer: int) -> Tensor:
        """The graph that is executed, in its dense form: ``(B, H, N, N)`` bool."""
        return self._layout(qk, layer).graph(qk)

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs in the blocks, ``(B, H)`` int64, filling included; each is multiplied once in every sweep."""
        return self._plan(qk, layer).pairs

    def _plan(self, qk: QK, layer: int) -> Plan:
        return plan(self._layout(qk, layer), qk, self.block)

    @torch.no_grad()
    def _layout(self, qk: QK, layer: int) -> Layout:
        assert isinstance(self.pattern, HasLayout)  # checked when made
        return self.pattern.layout(qk, layer)


def check_device(x: Tensor) -> None:
    """Raise `UserError` where these kernels cannot run."""
    here = "runs on " + ("a GPU" if x.is_cuda else "the CPU")
    installed = importlib.util.find_spec("triton") is not None
    if not installed or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError(
            f"block-sparse attention needs CUDA and triton; this {here}, triton is {'' if installed else 'not '}installed: "
            "use attention=bucketed"
        )
