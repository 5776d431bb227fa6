"""A layout on a GPU: a plan of blocks, walked through by Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.triton.plan import plan
from sparsefinder.executors.workload import Work
from sparsefinder.graphs import QK, Layout
from sparsefinder.numerics.normalizers import Normalizer

INTERPRET = "TRITON_INTERPRET"  # of the environment: 1 where Triton interprets its kernels, on the CPU


def why_not(work: Work | None) -> str:
    """Why no kernel of ours can do this work here; empty where one can. None: whatever the work."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed: pip install 'sparsefinder[gpu]'"
    if work is None:
        return ""
    interpreted = work.device.type == "cpu" and os.environ.get(INTERPRET) == "1"
    if work.device.type != "cuda" and not interpreted:
        return f"needs a GPU with CUDA, the queries are on {work.device}"
    if work.crosses:
        return "has no kernel for cross-attention, where queries and keys are tokens of two texts"
    if len(set(work.dtypes)) > 1 or torch.float64 in work.dtypes:
        got = ", ".join(str(dtype).removeprefix("torch.") for dtype in work.dtypes)
        return f"needs queries, keys and values of one precision, float32 or half, got {got}"
    if interpreted and torch.bfloat16 in work.dtypes:  # it multiplies their bits as whole numbers
        return "Triton's interpreter (TRITON_INTERPRET=1) does not multiply bfloat16, float16 or float32 it does"
    return ""


def check_block(block: int) -> None:
    """Refuse a size of blocks that the kernels do not have."""
    if block < 16 or block & (block - 1):
        raise UserError(f"block must be a power of two of 16 or more, got {block}")


UNMEASURED = "only where it is asked for: it has not been measured on a GPU"


@dataclass(frozen=True)
class TritonExecutor:
    """A layout in blocks of ``block`` queries by ``block`` keys, whose scores are never in memory.

    Scores are recomputed in every sweep over the blocks (one for the maximum, about five for the threshold of entmax, one for
    the output) instead of kept. Half-precision queries and keys are multiplied as they are, with float32 sums.
    ``computed_pairs`` counts the pairs in the blocks, filling included; each is multiplied once in every sweep.
    """

    block: int = 64  # queries and keys of a block: a power of two, 16 or more
    name = "triton"
    never_automatic = UNMEASURED

    def __post_init__(self) -> None:
        check_block(self.block)

    def why_not(self, work: Work | None) -> str:
        """Why this work cannot be done here; empty where it can. None: whatever the work."""
        if work is not None and work.tail:
            return "multiplies the keys of a layout, not its tail"
        return why_not(work)

    def attend(self, qk: QK, v: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """``v (B, H, N, D)`` and vectors without what padding contained → ``(B, H, N, D)`` in the dtype of ``v``."""
        # imported here: Triton is not needed to import the package, and decides at its import whether it interprets
        from sparsefinder.executors.triton.block_sparse import block_sparse

        keys, values = qk.a_key_each.k, v.repeat_interleave(qk.group, dim=1)
        return block_sparse(qk.q, keys, values, plan(layout, qk, self.block), normalizer.alpha, self.block)

    def computed_pairs(self, qk: QK, layout: Layout) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64."""
        return plan(layout, qk, self.block).pairs
