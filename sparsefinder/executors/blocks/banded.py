"""A window as small dense products: ``T`` consecutive queries against the ``T + W − 1`` keys around them.

A *band* is a tensor ``(M, W)`` whose entry ``[i, c]`` belongs to query ``i`` and key ``i + first + c``: the diagonals
``first … last`` of an ``M × M`` matrix that is never built. Keys beyond either end count as zero vectors. Two products are
enough, since each is the other's gradient: ``band_scores`` (queries times keys) and ``band_apply`` (weights times values).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # queries multiplied at a time: of 16, 32, 64 and 128 the fastest on CPU at W = 11


@dataclass(frozen=True)
class Band:
    """The diagonals ``first … last`` (``first ≤ 0 ≤ last``) without the pairs that are ``hidden (M, W)`` bool."""

    first: int
    last: int
    hidden: Tensor

    @property
    def width(self) -> int:
        """Number of keys that a query of the band sees at most."""
        return self.last - self.first + 1

    @property
    def computed_keys(self) -> int:
        """Keys that each query is really multiplied with."""
        return TILE + self.width - 1

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``(M, W)``, ``-inf`` where hidden."""
        return band_scores(q, k, self.first, self.last).masked_fill(self.hidden, -math.inf)

    def apply(self, weights: Tensor, v: Tensor) -> Tensor:
        """``weights (M, W)``, zero where hidden, ``v (M, D)`` → ``(M, D)``."""
        return band_apply(weights, v, self.first, self.last)


def neighbours(x: Tensor, first: int, last: int, beyond: float) -> Tensor:
    """View ``(M, W)`` of ``x[i + first + c]`` for ``x (M,)``, ``beyond`` outside ``x``."""
    return F.pad(x, (-first, last), value=beyond).unfold(0, last - first + 1, 1)


def band_scores(q: Tensor, k: Tensor, first: int, last: int) -> Tensor:
    """``q, k (M, D)`` → ``(M, W)`` with ``out[i, c] = q_i · k_{i + first + c}``, ``W = last − first + 1``."""
    result: Tensor = _BandScores.apply(q, k, first, last)
    return result


def band_apply(weights: Tensor, v: Tensor, first: int, last: int) -> Tensor:
    """``weights (M, W)``, ``v (M, D)`` → ``(M, D)`` with ``out_i = Σ_c weights[i, c] · v_{i + first + c}``."""
    result: Tensor = _BandApply.apply(weights, v, first, last)
    return result


class _BandScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, first: int, last: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.band = first, last
        tiles = _whole_tiles(q).view(-1, TILE, q.shape[1])
        products = torch.bmm(tiles, _keys_of_tiles(k, first, last).transpose(1, 2))
        return _diagonals(products).reshape(-1, last - first + 1)[: q.shape[0]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k = ctx.saved_tensors
        first, last = ctx.band
        weights = gradients[0]
        return band_apply(weights, k, first, last), _apply_transposed(weights, q, first, last), None, None


class _BandApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, first: int, last: int) -> Tensor:
        ctx.save_for_backward(weights, v)
        ctx.band = first, last
        keys_of_tiles = _keys_of_tiles(v, first, last)
        matrices = weights.new_zeros(keys_of_tiles.shape[0], TILE, keys_of_tiles.shape[1])
        _diagonals(matrices).copy_(_whole_tiles(weights).view(-1, TILE, last - first + 1))
        return torch.bmm(matrices, keys_of_tiles).view(-1, v.shape[1])[: v.shape[0]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, v = ctx.saved_tensors
        first, last = ctx.band
        return (
            band_scores(gradients[0], v, first, last),
            _apply_transposed(weights, gradients[0], first, last),
            None,
            None,
        )


def _apply_transposed(weights: Tensor, x: Tensor, first: int, last: int) -> Tensor:
    """``out_j = Σ weights[i, c] · x_i`` over the queries ``i`` whose key ``i + first + c`` is ``j``."""
    return band_apply(_transposed(weights, first, last), x, -last, -first)


def _transposed(weights: Tensor, first: int, last: int) -> Tensor:
    """The band of the transposed matrix, on the diagonals ``−last … −first``."""
    rows, width = weights.shape
    padded = F.pad(weights.flip(-1), (0, 0, last, -first))
    # entry [j, c] is the flipped weights' [j − last + c, c]: one row further down for each column
    return padded.as_strided((rows, width), (width, width + 1)).contiguous()


def _diagonals(matrices: Tensor) -> Tensor:
    """View ``(tiles, T, W)`` of the band in contiguous ``(tiles, T, T + W − 1)``: row ``t`` starts at column ``t``."""
    tiles, height, width = matrices.shape
    return matrices.as_strided((tiles, height, width - height + 1), (height * width, width + 1, 1))


def _keys_of_tiles(x: Tensor, first: int, last: int) -> Tensor:
    """Overlapping views ``(tiles, T + W − 1, D)``: row ``r`` of tile ``t`` is ``x[t·T + first + r]``."""
    rows, size = x.shape
    tiles = -(-rows // TILE)
    padded = F.pad(x, (0, 0, -first, tiles * TILE - rows + last))
    return padded.as_strided((tiles, TILE + last - first, size), (TILE * size, size, 1))


def _whole_tiles(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[0] % TILE)) if x.shape[0] % TILE else x.contiguous()
