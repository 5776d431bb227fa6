"""Move rows of a tensor to known positions, with the way back known as well.

Indexing is cheap forward and slow backward: autograd adds gradients up one index at a time. Where every copy's position is
listed for every source row, the backward pass is a gather too: parallel, and the same on every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather(x: Tensor, sources: Tensor, copies: Tensor, missing: float = 0.0) -> Tensor:
    """``out[a] = Σ_c x[sources[a, c]]``, where a source of -1 adds nothing; a row without any source gets ``missing``.

    Args:
        x: ``(X, D)``.
        sources: ``(A, C)`` int64, rows of ``x``.
        copies: ``(X, E)`` int64, the rows of ``out`` that each row of ``x`` was added to, -1 for none: the adjoint of
            ``sources``, which the gradient is gathered with.
        missing: other than 0 needs ``C = 1``.

    Returns:
        ``(A, D)``.
    """
    result: Tensor = _Gather.apply(x, sources, copies, missing)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, copies: Tensor, missing: float) -> Tensor:
        ctx.save_for_backward(sources, copies)
        return _sum_of_rows(x, sources, missing)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sources, copies = ctx.saved_tensors
        return gather(gradients[0], copies, sources), None, None, None


def _sum_of_rows(x: Tensor, sources: Tensor, missing: float) -> Tensor:
    if x.shape[0] == 0 or sources.shape[1] == 0:
        return x.new_full((sources.shape[0], x.shape[1]), missing)
    columns = (_rows(x, column, missing) for column in sources.unbind(-1))
    total = next(columns)
    for column in columns:
        total += column
    return total


def _rows(x: Tensor, index: Tensor, missing: float) -> Tensor:
    rows = x.index_select(0, index.clamp_min(0))
    # writing the few missing rows is much cheaper than a mask over all of them
    return rows.index_fill_(0, (index < 0).nonzero().squeeze(-1), missing)
