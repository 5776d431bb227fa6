"""Which keys a block of queries sees, laid side by side, and the product with them.

Block i of queries sees, in this order: the global tokens; `w` sparse keys left of its local blocks; `w` sparse keys right
of them; the local blocks i−1, i, i+1. With `m` sparse keys to a block, in the order of their tokens, these are the sparse
keys `[(i−1)m − w, (i−1)m)` and `[(i+2)m, (i+2)m + w)`: no key is met twice. When causal, only what lies before: the sparse
keys on the left, and the local blocks i−1 and i.

Departure from the published layer: with one sparse key to a block (`sparsity_factor == block_size`) its right window begins
two sparse keys early and counts tokens of the local blocks twice; here it begins where it should.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefinder.executors.local_sparse_global.settings import LSGSettings
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.tracing import recorded

_WORKSPACE = 1 << 25  # bytes of keys and values laid side by side at a time; a few heads at 4,096 tokens fit the cache


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, normalizer: Normalizer, dropout: float = 0.0
) -> Tensor:
    """`normalizer(q·k / √D) v` on the pairs of `mask`; a query without a key gives zeros.

    Args:
        q: `(…, Q, D)`.
        k: `(…, K, D)`.
        v: `(…, K, D)`.
        mask: `(…, 1 or Q, K)` bool, True = may attend, None for all.
        normalizer: scores to probabilities.
        dropout: share of the probabilities that are set to zero.
    """
    if normalizer.alpha != 1.0:
        # float32 also under autocast: the support and the sum of a row do not survive half precision
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            probabilities = F.dropout(normalizer(scores), dropout)
            return probabilities.to(v.dtype) @ v
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # an empty row is zero forwards, but its gradient would be NaN: let it see all, and drop what it saw
    empty = ~mask.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, dropout_p=dropout)
    return output.masked_fill(empty, 0.0)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor,
    sparse: tuple[Tensor, Tensor],
    global_prefix: tuple[Tensor, Tensor],
    settings: LSGSettings,
    normalizer: Normalizer,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Attention of every block of queries to the keys in view.

    Args:
        q: `(R, N, D)`, one row for each head of each example, N whole blocks.
        k: `(R, N, D)`.
        v: `(R, N, D)`.
        key_mask: `visible(…)`.
        sparse: keys and values `(R, S, D)`.
        global_prefix: keys and values of the global tokens `(R, G, D)`.
        settings: of the layer.
        normalizer: scores to probabilities.
        causal: whether a query sees no later key.
        dropout: share of the probabilities that are set to zero.

    Returns:
        `(R, N, D)`.
    """
    rows, tokens, size = q.shape
    block = settings.block_size
    in_view = key_mask.shape[-1]
    own = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    row_bytes = 2 * tokens // block * in_view * size * q.element_size()
    step = max(1, _WORKSPACE // max(row_bytes, 1))
    # a recorded run may be given more rows later
    parts = [slice(None)] if recorded() else [slice(start, start + step) for start in range(0, rows, step)]
    outputs = []
    for part in parts:
        keys = lay_out(k[part], sparse[0][part], global_prefix[0][part], settings, causal).flatten(0, 1)[:, None]
        values = lay_out(v[part], sparse[1][part], global_prefix[1][part], settings, causal).flatten(0, 1)[:, None]
        mask = key_mask[part].flatten(0, 1)[:, None, None]
        if causal:
            mask = torch.cat([mask[..., :-block].expand(-1, -1, block, -1), mask[..., -block:] & own], dim=-1)
        queries = q[part].reshape(-1, 1, block, size)
        outputs.append(attend(queries, keys, values, mask, normalizer, dropout).reshape(-1, tokens, size))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def visible(valid: Tensor, sparse_valid: Tensor, num_global: int, settings: LSGSettings, causal: bool) -> Tensor:
    """Which of the keys in view exist.

    Args:
        valid: `(R, N)` bool.
        sparse_valid: `(R, S)` bool.
        num_global: global tokens, all of which exist.
        settings: of the layer.
        causal: whether a query sees no later key.

    Returns:
        `(R, N / block_size, K)` bool.
    """
    global_prefix = valid.new_ones(valid.shape[0], num_global, 1)
    return lay_out(valid[..., None], sparse_valid[..., None], global_prefix, settings, causal)[..., 0]


def lay_out(local: Tensor, sparse: Tensor, global_prefix: Tensor, settings: LSGSettings, causal: bool) -> Tensor:
    """Keys (or values, or their mask) that each block sees; beyond the ends of the text there are zeros.

    Args:
        local: `(R, N, D)`.
        sparse: `(R, S, D)`.
        global_prefix: `(R, G, D)`.
        settings: of the layer.
        causal: whether a query sees no later key.

    Returns:
        `(R, blocks, K, D)`.
    """
    block, width, per_block = settings.block_size, settings.sparse_block_size, settings.sparse_per_block
    blocks = local.shape[1] // block
    parts = [global_prefix[:, None].expand(-1, blocks, -1, -1)]
    if per_block:
        margin = per_block + width
        padded = F.pad(sparse, (0, 0, margin, margin))
        parts.append(_windows(padded, width, per_block)[:, :blocks])
        if not causal:
            parts.append(_windows(padded[:, margin + 2 * per_block :], width, per_block)[:, :blocks])
    after = 0 if causal else block
    parts.append(_windows(F.pad(local, (0, 0, block, after)), 2 * block + after, block))
    return torch.cat(parts, dim=2)


def _windows(x: Tensor, size: int, step: int) -> Tensor:
    """Overlapping windows along the tokens, a view: `(R, N, D)` → `(R, windows, size, D)`."""
    return x.unfold(1, size, step).transpose(-1, -2)


def view_size(settings: LSGSettings, num_global: int, causal: bool) -> int:
    """Keys in view of each query, those that do not exist included."""
    sides = 1 if causal else 2
    sparse = sides * settings.sparse_block_size if settings.sparse_per_block else 0
    return num_global + sparse + (sides + 1) * settings.block_size
