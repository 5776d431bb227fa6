"""The sparse part of LSG attention: one function for each way of choosing keys, and the table of them.

A chooser gets the tokens after the global ones, padded to whole blocks, and returns `N // sparsity_factor` sparse keys in
the order of the tokens they stand for, so that key `s` stands for a token of block `s // (block_size // factor)`.

`norm`, `stride` and `block_stride` pick tokens (they return positions); `pooling`, `bos_pooling` and `lsh` mix them (they
return keys and values). Everything is Condevaux and Harispe 2022 (https://arxiv.org/abs/2210.15497), section 3.2, and
agrees with the models of its published converter; departures are numbered where they happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefinder.executors.local_sparse_global.settings import LSGSettings
from sparsefinder.numerics.tracing import constant


class SparseKeys(NamedTuple):
    """Sparse keys of one layer: `keys`, `values` `(B, H, S, D)`; `valid (B, H, S)` bool, False where all is padding."""

    keys: Tensor
    values: Tensor
    valid: Tensor


def choose(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, settings: LSGSettings, layer: int) -> SparseKeys:
    """The sparse keys of `settings.sparsity_type`.

    Gradients flow through keys and values, never through the choice.

    Args:
        q: `(B, H, N, D)` without global tokens, `N` a multiple of `block_size` and zeros on padding.
        k: the same.
        v: the same.
        valid: `(B, N)` bool, the keys that may be seen.
        settings: of the layer.
        layer: names the random projections of `lsh`.
    """
    if settings.sparsity_factor == 1:
        return SparseKeys(k, v, valid[:, None].expand(-1, k.shape[1], -1))
    if settings.sparsity_type in PICKERS:
        picked = PICKERS[settings.sparsity_type](k, valid, settings)
        rows = picked[..., None].expand(-1, -1, -1, k.shape[-1])
        kept = valid[:, None].expand(-1, k.shape[1], -1).gather(2, picked)
        return SparseKeys(k.gather(2, rows), v.gather(2, rows), kept)
    return POOLERS[str(settings.sparsity_type)](q, k, v, valid, settings, layer)


def pick(k: Tensor, valid: Tensor, settings: LSGSettings) -> Tensor:
    """Positions of the sparse keys, `(B, H, S)` int64, for the types that pick tokens; the tokens `choose` returns."""
    if settings.sparsity_factor == 1:
        return torch.arange(k.shape[2], device=k.device).expand(*k.shape[:3])
    return PICKERS[str(settings.sparsity_type)](k, valid, settings)


def pick_norm(k: Tensor, valid: Tensor, settings: LSGSettings) -> Tensor:
    """The keys of largest Euclidean norm in each chunk of `chunk_size` tokens, in rising order of the norm.

    The order matters where a window of sparse keys ends inside a block: it then keeps the largest on its left side.
    """
    batch, heads, tokens, _ = k.shape
    chunk = settings.chunk_size
    norms = torch.linalg.vector_norm(k.detach().float(), dim=-1)
    norms = norms.masked_fill(~valid[:, None], -1.0).view(batch, heads, -1, chunk)
    inside = norms.topk(chunk // settings.sparsity_factor, dim=-1).indices.flip(-1)
    starts = torch.arange(0, tokens, chunk, device=k.device)
    return (inside + starts[:, None]).view(batch, heads, -1)


def pick_stride(k: Tensor, valid: Tensor, settings: LSGSettings) -> Tensor:
    """Every `sparsity_factor`-th token, head h beginning at token `h mod sparsity_factor`."""
    batch, heads, tokens, _ = k.shape
    factor = settings.sparsity_factor
    first = torch.arange(heads, device=k.device) % factor
    positions = torch.arange(0, tokens, factor, device=k.device) + first[:, None]
    return positions.expand(batch, heads, -1)


def pick_block_stride(k: Tensor, valid: Tensor, settings: LSGSettings) -> Tensor:
    """A run of `block_size / sparsity_factor` tokens of each block, head h taking the h-th run (and starting over)."""
    batch, heads, tokens, _ = k.shape
    block, run = settings.block_size, settings.sparse_per_block
    first = torch.arange(heads, device=k.device) * run % block
    inside = first[:, None] + torch.arange(run, device=k.device)
    positions = torch.arange(0, tokens, block, device=k.device)[:, None] + inside[:, None, :]
    return positions.view(heads, -1).expand(batch, heads, -1)


def pool_mean(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, settings: LSGSettings, layer: int) -> SparseKeys:
    """The mean of each group of `sparsity_factor` tokens, over its real ones."""
    factor = settings.sparsity_factor
    real = valid[:, None].expand(-1, k.shape[1], -1)
    counts = _grouped(real.float()[..., None], factor).sum(3)
    weight = _grouped(real[..., None], factor) / counts.clamp_min(1.0)[:, :, :, None]
    return SparseKeys(_mix(weight, k, factor), _mix(weight, v, factor), counts[..., 0] > 0)


def pool_bos(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, settings: LSGSettings, layer: int) -> SparseKeys:
    """Each group of `sparsity_factor` tokens, weighted by the attention that the first token pays to them.

    The first token after the global ones, as in the published models. A group of nothing but padding has no key, unless
    `padding_in_pools`, when it has the mean of what is there.
    """
    factor = settings.sparsity_factor
    scores = (q[:, :, :1].float() @ k.float().transpose(-1, -2) / math.sqrt(k.shape[-1])).transpose(-1, -2)
    real = valid[:, None, :, None].expand_as(scores)
    grouped = _grouped(scores.masked_fill(~real, -math.inf), factor)
    present = _grouped(real, factor).any(3)
    weight = torch.softmax(grouped.masked_fill(~present[:, :, :, None], 0.0), dim=3)
    if settings.padding_in_pools:
        present = torch.ones_like(present)
    else:
        weight = weight * _grouped(real, factor)
    return SparseKeys(_mix(weight, k, factor), _mix(weight, v, factor), present[..., 0])


def pool_lsh(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, settings: LSGSettings, layer: int) -> SparseKeys:
    """Means of clusters of similar keys within each chunk, by random projections (Andoni et al. 2015, cross-polytope).

    `lsh_num_pre_rounds` rounds merge keys into as many clusters as there are tokens, a last one into `1/sparsity_factor`
    of them. With one cluster to a chunk there is nothing to hash, and `bos_pooling` is used, as published. Departures:

    1. Projections are fixed by (seed, layer, head); the published layer draws new ones in every forward pass.
    """
    chunk, factor = settings.chunk_size, settings.sparsity_factor
    if chunk == factor:
        return pool_bos(q, k, v, valid, settings, layer)
    batch, heads, _, size = k.shape
    real = valid[:, None, :, None].expand(-1, heads, -1, -1).float().reshape(batch, heads, -1, chunk, 1)
    merged = torch.cat([k, v], dim=-1).float().view(batch, heads, -1, chunk, 2 * size)
    merged = merged * real
    counts = (chunk,) * settings.lsh_num_pre_rounds + (chunk // factor,)
    drawn = constant(_planes, settings.seed * 1_000_003 + layer, heads, size, counts)
    for clusters, planes in zip(counts, drawn, strict=True):
        merged, real = _hash_round(merged, real, planes.to(k.device), clusters)
    means = (merged / real.clamp_min(1.0)).reshape(batch, heads, -1, 2 * size).to(k.dtype)
    keys, values = means.split(size, dim=-1)
    return SparseKeys(keys, values, real.reshape(batch, heads, -1) > 0)


def _planes(seed: int, heads: int, size: int, counts: tuple[int, ...]) -> list[Tensor]:
    """Random projections `(H, D, clusters / 2)` of each round."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, size, max(clusters // 2, 1), generator=generator) for clusters in counts]


def _hash_round(sums: Tensor, counts: Tensor, planes: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Add up `sums (B, H, chunks, T, 2D)` (keys, then values) and `counts (…, 1)` of the keys that share a bucket."""
    size = sums.shape[-1] // 2
    with torch.no_grad():
        sides = torch.nn.functional.normalize(sums[..., :size], dim=-1) @ planes[:, None]
        bucket = torch.cat([sides, -sides], dim=-1).argmax(-1, keepdim=True)
    shape = (*sums.shape[:3], clusters)
    merged = sums.new_zeros(*shape, 2 * size).scatter_add(3, bucket.expand_as(sums), sums)
    return merged, counts.new_zeros(*shape, 1).scatter_add(3, bucket, counts)


def _grouped(x: Tensor, factor: int) -> Tensor:
    """`(B, H, N, D)` → `(B, H, N // factor, factor, D)`."""
    return x.reshape(*x.shape[:2], -1, factor, x.shape[-1])


def _mix(weight: Tensor, x: Tensor, factor: int) -> Tensor:
    """Weighted sums of groups in float32: `weight (B, H, S, factor, 1)`, zero where a key is hidden."""
    grouped = _grouped(x.float(), factor)
    return (weight * grouped).sum(3).to(x.dtype)


Picker = Callable[[Tensor, Tensor, LSGSettings], Tensor]
Pooler = Callable[[Tensor, Tensor, Tensor, Tensor, LSGSettings, int], SparseKeys]

PICKERS: dict[str | None, Picker] = {"norm": pick_norm, "stride": pick_stride, "block_stride": pick_block_stride}
POOLERS: dict[str, Pooler] = {"pooling": pool_mean, "bos_pooling": pool_bos, "lsh": pool_lsh}
