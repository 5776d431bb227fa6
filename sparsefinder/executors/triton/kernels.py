"""Triton kernels: one walk of each block's queries over its keys, or of its keys over its queries.

What every kernel is given: vectors ``(M, D)``, the two orders, the blocks, the bucket ids
(`sparsefinder.executors.triton.plan`), and per token, not per position, what is known of each row: its largest score, its
threshold, its ``δ``. What a kernel computes is stored per position. ``M·P`` must stay below 2³¹, as must the number of
positions. The mathematics is in `sparsefinder.executors.triton.block_sparse`.
"""

# no `from __future__ import annotations`: Triton reads the annotations, and strings would hide what is constexpr

import triton
import triton.language as tl


@triton.jit
def _block(blocks_ptr):
    """The six numbers of this program's block."""
    at = blocks_ptr + tl.program_id(0) * 6
    start, count = tl.load(at), tl.load(at + 1)
    other, other_count = tl.load(at + 2), tl.load(at + 3)
    return start, count, other, other_count, tl.load(at + 4), tl.load(at + 5)


@triton.jit
def _tokens(order_ptr, start, first, count, BLOCK: tl.constexpr):
    """Tokens on the positions ``start + first …``, -1 beyond ``count``."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(order_ptr + start + at, mask=at < count, other=-1)


@triton.jit
def _vectors(x_ptr, tokens, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors of tokens, ``(BLOCK, WIDTH)``, zeros for no token."""
    columns = tl.arange(0, WIDTH)
    here = (tokens >= 0)[:, None] & (columns < SIZE)[None, :]
    return tl.load(x_ptr + tokens.to(tl.int64)[:, None] * SIZE + columns[None, :], mask=here, other=0.0)


@triton.jit
def _numbers(x_ptr, tokens):
    """One number of each token."""
    return tl.load(x_ptr + tokens, mask=tokens >= 0, other=0.0)


@triton.jit
def _put_vectors(x_ptr, vectors, start, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    here = (rows < count)[:, None] & (columns < SIZE)[None, :]
    tl.store(x_ptr + (start + rows).to(tl.int64)[:, None] * SIZE + columns[None, :], vectors, mask=here)


@triton.jit
def _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS: tl.constexpr,
            K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """``q·k`` times scale where the pair counts in this block, ``-inf`` elsewhere: ``(BLOCK, BLOCK)`` float32."""
    distance = k_tokens[None, :] - q_tokens[:, None]
    counts = (q_tokens >= 0)[:, None] & (k_tokens >= 0)[None, :] & (distance <= reach) & (distance >= -reach)
    if CAUSAL:
        counts = counts & (distance <= 0)
    for q_slot in tl.static_range(Q_SLOTS):
        q_id = tl.load(q_ids_ptr + q_tokens * Q_SLOTS + q_slot, mask=q_tokens >= 0, other=-1)
        q_id = tl.where(q_id < limit, q_id, -1)
        for k_slot in tl.static_range(K_SLOTS):
            k_id = tl.load(k_ids_ptr + k_tokens * K_SLOTS + k_slot, mask=k_tokens >= 0, other=-2)
            counts = counts & (q_id[:, None] != k_id[None, :])
    products = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(counts, products, float("-inf"))


@triton.jit
def _any_powers(x, exponent):
    """``p`` and ``s`` of an α > 1 that need not be known when this is compiled; ``exponent = (2−α)/(α−1)``."""
    excess = tl.maximum(x, 0.0)
    logarithm = tl.log(tl.where(excess > 0.0, excess, 1.0))
    s = tl.where(excess > 0.0, tl.exp(logarithm * exponent), 0.0)
    return s * excess, s


@triton.jit
def _powers(x, ALPHA: tl.constexpr):
    """``p`` and ``s = p^{2−α}`` from the excess ``x = (α−1)(z − max z) − τ``; for softmax from ``log p``."""
    if ALPHA == 1.0:
        p = tl.exp(x)
        s = p
    elif ALPHA == 1.5:
        s = tl.maximum(x, 0.0)
        p = s * s
    elif ALPHA == 2.0:
        p = tl.maximum(x, 0.0)
        s = (x > 0.0).to(tl.float32)
    else:
        p, s = _any_powers(x, (2.0 - ALPHA) / (ALPHA - 1.0))
    return p, s


@triton.jit
def peaks_kernel(q_ptr, k_ptr, q_order_ptr, k_order_ptr, blocks_ptr, q_ids_ptr, k_ids_ptr, scale, peaks_ptr,
                  Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr,
                  WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The largest score on each query position."""
    start, count, other, other_count, limit, reach = _block(blocks_ptr)
    q_tokens = _tokens(q_order_ptr, start, 0, count, BLOCK)
    q = _vectors(q_ptr, q_tokens, SIZE, WIDTH)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, other_count, BLOCK):
        k_tokens = _tokens(k_order_ptr, other, first, other_count, BLOCK)
        k = _vectors(k_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS, K_SLOTS, CAUSAL)
        peak = tl.maximum(peak, tl.max(z, axis=1))
    rows = tl.arange(0, BLOCK)
    tl.store(peaks_ptr + start + rows, peak, mask=rows < count)


@triton.jit
def sums_kernel(q_ptr, k_ptr, q_order_ptr, k_order_ptr, blocks_ptr, q_ids_ptr, k_ids_ptr, scale, peaks_ptr,
                 thresholds_ptr, totals_ptr, slopes_ptr, ALPHA: tl.constexpr, GAIN: tl.constexpr, Q_SLOTS: tl.constexpr,
                 K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """``Σ p`` and ``Σ p^{2−α}`` on each query position, at the present thresholds."""
    start, count, other, other_count, limit, reach = _block(blocks_ptr)
    q_tokens = _tokens(q_order_ptr, start, 0, count, BLOCK)
    q = _vectors(q_ptr, q_tokens, SIZE, WIDTH)
    peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
    total, slope = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, other_count, BLOCK):
        k_tokens = _tokens(k_order_ptr, other, first, other_count, BLOCK)
        k = _vectors(k_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS, K_SLOTS, CAUSAL)
        p, s = _powers((z - peak[:, None]) * GAIN - threshold[:, None], ALPHA)
        total += tl.sum(p, axis=1)
        slope += tl.sum(s, axis=1)
    rows = tl.arange(0, BLOCK)
    tl.store(totals_ptr + start + rows, total, mask=rows < count)
    tl.store(slopes_ptr + start + rows, slope, mask=rows < count)


@triton.jit
def output_kernel(q_ptr, k_ptr, v_ptr, q_order_ptr, k_order_ptr, blocks_ptr, q_ids_ptr, k_ids_ptr, scale, peaks_ptr,
                   thresholds_ptr, out_ptr, ALPHA: tl.constexpr, GAIN: tl.constexpr, Q_SLOTS: tl.constexpr,
                   K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """``Σ p v`` on each query position."""
    start, count, other, other_count, limit, reach = _block(blocks_ptr)
    q_tokens = _tokens(q_order_ptr, start, 0, count, BLOCK)
    q = _vectors(q_ptr, q_tokens, SIZE, WIDTH)
    peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
    out = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, other_count, BLOCK):
        k_tokens = _tokens(k_order_ptr, other, first, other_count, BLOCK)
        k = _vectors(k_ptr, k_tokens, SIZE, WIDTH)
        v = _vectors(v_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS, K_SLOTS, CAUSAL)
        p, _ = _powers((z - peak[:, None]) * GAIN - threshold[:, None], ALPHA)
        out += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    _put_vectors(out_ptr, out, start, count, SIZE, WIDTH, BLOCK)


@triton.jit
def deltas_kernel(q_ptr, k_ptr, v_ptr, g_ptr, q_order_ptr, k_order_ptr, blocks_ptr, q_ids_ptr, k_ids_ptr, scale,
                   peaks_ptr, thresholds_ptr, weighted_ptr, weights_ptr, ALPHA: tl.constexpr, GAIN: tl.constexpr,
                   Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr,
                   WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``Σ s (g·v)`` and ``Σ s`` on each query position."""
    start, count, other, other_count, limit, reach = _block(blocks_ptr)
    q_tokens = _tokens(q_order_ptr, start, 0, count, BLOCK)
    q, g = _vectors(q_ptr, q_tokens, SIZE, WIDTH), _vectors(g_ptr, q_tokens, SIZE, WIDTH)
    peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
    weighted, weights = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, other_count, BLOCK):
        k_tokens = _tokens(k_order_ptr, other, first, other_count, BLOCK)
        k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS, K_SLOTS, CAUSAL)
        _, s = _powers((z - peak[:, None]) * GAIN - threshold[:, None], ALPHA)
        weighted += tl.sum(s * tl.dot(g, tl.trans(v), input_precision="ieee"), axis=1)
        weights += tl.sum(s, axis=1)
    rows = tl.arange(0, BLOCK)
    tl.store(weighted_ptr + start + rows, weighted, mask=rows < count)
    tl.store(weights_ptr + start + rows, weights, mask=rows < count)


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, g_ptr, q_order_ptr, k_order_ptr, blocks_ptr, q_ids_ptr, k_ids_ptr, scale,
               peaks_ptr, thresholds_ptr, deltas_ptr, dq_ptr, ALPHA: tl.constexpr, GAIN: tl.constexpr,
               Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr,
               WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``Σ ds k`` on each query position."""
    start, count, other, other_count, limit, reach = _block(blocks_ptr)
    q_tokens = _tokens(q_order_ptr, start, 0, count, BLOCK)
    q, g = _vectors(q_ptr, q_tokens, SIZE, WIDTH), _vectors(g_ptr, q_tokens, SIZE, WIDTH)
    peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
    delta = _numbers(deltas_ptr, q_tokens)
    dq = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, other_count, BLOCK):
        k_tokens = _tokens(k_order_ptr, other, first, other_count, BLOCK)
        k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS, K_SLOTS, CAUSAL)
        _, s = _powers((z - peak[:, None]) * GAIN - threshold[:, None], ALPHA)
        ds = s * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    _put_vectors(dq_ptr, dq * scale, start, count, SIZE, WIDTH, BLOCK)


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, g_ptr, q_order_ptr, k_order_ptr, blocks_ptr, q_ids_ptr, k_ids_ptr, scale,
                peaks_ptr, thresholds_ptr, deltas_ptr, dk_ptr, dv_ptr, ALPHA: tl.constexpr, GAIN: tl.constexpr,
                Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``Σ ds q`` and ``Σ p g`` on each key position; here the blocks are those of the keys."""
    start, count, other, other_count, limit, reach = _block(blocks_ptr)
    k_tokens = _tokens(k_order_ptr, start, 0, count, BLOCK)
    k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
    dk, dv = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, other_count, BLOCK):
        q_tokens = _tokens(q_order_ptr, other, first, other_count, BLOCK)
        q, g = _vectors(q_ptr, q_tokens, SIZE, WIDTH), _vectors(g_ptr, q_tokens, SIZE, WIDTH)
        peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
        delta = _numbers(deltas_ptr, q_tokens)
        z = _scores(q, k, q_tokens, k_tokens, q_ids_ptr, k_ids_ptr, limit, reach, scale, Q_SLOTS, K_SLOTS, CAUSAL)
        p, s = _powers((z - peak[:, None]) * GAIN - threshold[:, None], ALPHA)
        ds = s * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
        dv += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
    _put_vectors(dk_ptr, dk * scale, start, count, SIZE, WIDTH, BLOCK)
    _put_vectors(dv_ptr, dv, start, count, SIZE, WIDTH, BLOCK)
