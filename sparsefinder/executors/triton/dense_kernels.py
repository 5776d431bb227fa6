"""Triton kernels of dense α-entmax attention: a block of queries over all keys that it may see, or of keys over its queries.

What every kernel is given: vectors ``(B·H·N_q, D)`` and ``(B·H_k·N_k, D)``, which tokens are real (int8), α of each head, and the
band: a query ``i`` sees the keys from ``i − back`` to ``i + ahead``. CONSTANT is the α of all heads where they have one, which
makes squares of the powers, else 0. Nothing is summed by two programs, so the result is the same on every run. The
mathematics is in `sparsefinder.executors.triton.dense`.
"""

# no `from __future__ import annotations`: Triton reads the annotations, and strings would hide what is constexpr

import triton
import triton.language as tl

from sparsefinder.executors.triton.kernels import _any_powers, _numbers, _powers, _put_vectors, _vectors


@triton.jit
def _place(count, BLOCK: tl.constexpr):
    """This program's row of heads and the first of its positions, of which there are ``count`` in each row."""
    blocks = tl.cdiv(count, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _tokens(valid_ptr, at, batch, row, count):
    """Flat tokens at positions of a row of heads; -1 where there is none or where it is padding."""
    real = tl.load(valid_ptr + batch * count + at, mask=at < count, other=0) != 0
    return tl.where(real, row * count + at, -1)


@triton.jit
def _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale):
    """``q·k`` times scale where there is a pair, ``-inf`` elsewhere: ``(BLOCK, BLOCK)`` float32."""
    distance = k_at[None, :] - q_at[:, None]
    counts = (q_tokens >= 0)[:, None] & (k_tokens >= 0)[None, :] & (distance >= -back) & (distance <= ahead)
    products = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(counts, products, float("-inf"))


@triton.jit
def _probabilities(z, peak, threshold, alpha, CONSTANT: tl.constexpr):
    """``p`` and ``s = p^{2−α}``."""
    x = (z - peak[:, None]) * (alpha - 1.0) - threshold[:, None]
    if CONSTANT == 0.0:
        p, s = _any_powers(x, (2.0 - alpha) / (alpha - 1.0))
    else:
        p, s = _powers(x, CONSTANT)
    return p, s


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, q_valid_ptr, k_valid_ptr, alphas_ptr, queries, keys, back, ahead, scale, peaks_ptr,
                   thresholds_ptr, out_ptr, STILL: tl.constexpr, MOST: tl.constexpr, CONSTANT: tl.constexpr,
                   HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """Largest score, threshold and ``Σ p v`` of each query."""
    row, start = _place(queries, BLOCK)
    batch, alpha = row // HEADS, tl.load(alphas_ptr + row % HEADS)
    steps = tl.arange(0, BLOCK)
    q_at = start + steps
    q_tokens = _tokens(q_valid_ptr, q_at, batch, row, queries)
    q = _vectors(q_ptr, q_tokens, SIZE, WIDTH)
    low, high = tl.maximum(start - back, 0), tl.minimum(start + BLOCK + ahead, keys)

    peak, broken = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for first in range(low, high, BLOCK):
        k_at = first + steps
        k_tokens = _tokens(k_valid_ptr, k_at, batch, row // GROUP, keys)
        k = _vectors(k_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale)
        # a maximum passes over NaN on a GPU, and a text that has one must not look like one without keys
        broken = tl.maximum(broken, tl.max(((z != z) | (z == float("inf"))).to(tl.int32), axis=1))
        peak = tl.maximum(peak, tl.max(z, axis=1))
    peak = tl.where(peak == float("-inf"), 0.0, peak)

    threshold = tl.full((BLOCK,), -1.0, tl.float32)
    moved, taken = STILL + 1.0, 0
    while (moved > STILL) & (taken < MOST):
        total, slope = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(low, high, BLOCK):
            k_at = first + steps
            k_tokens = _tokens(k_valid_ptr, k_at, batch, row // GROUP, keys)
            k = _vectors(k_ptr, k_tokens, SIZE, WIDTH)
            z = _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale)
            p, s = _probabilities(z, peak, threshold, alpha, CONSTANT)
            total += tl.sum(p, axis=1)
            slope += tl.sum(s, axis=1)
        # `newton_step` of sparsefinder.numerics.entmax_newton; an empty row stays where it is
        root = tl.exp(tl.log(tl.where(total > 0.0, total, 1.0)) * (2.0 - alpha))
        step = tl.where(total > 0.0, (total - root) / tl.maximum(slope, 1e-30), 0.0)
        threshold += step
        moved = tl.max(step, axis=0)
        taken += 1

    out = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(low, high, BLOCK):
        k_at = first + steps
        k_tokens = _tokens(k_valid_ptr, k_at, batch, row // GROUP, keys)
        k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale)
        p, _ = _probabilities(z, peak, threshold, alpha, CONSTANT)
        out += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    out = tl.where((broken > 0)[:, None], float("nan"), out)
    tl.store(peaks_ptr + row * queries + q_at, peak, mask=q_at < queries)
    tl.store(thresholds_ptr + row * queries + q_at, threshold, mask=q_at < queries)
    _put_vectors(out_ptr, out, row * queries + start, queries - start, SIZE, WIDTH, BLOCK)


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, q_valid_ptr, k_valid_ptr, alphas_ptr, queries, keys, back, ahead, scale, peaks_ptr,
              thresholds_ptr, g_ptr, deltas_ptr, dq_ptr, CONSTANT: tl.constexpr, HEADS: tl.constexpr,
              GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``δ = Σ s (g·v) / Σ s``, then ``Σ ds k`` of each query."""
    row, start = _place(queries, BLOCK)
    batch, alpha = row // HEADS, tl.load(alphas_ptr + row % HEADS)
    steps = tl.arange(0, BLOCK)
    q_at = start + steps
    q_tokens = _tokens(q_valid_ptr, q_at, batch, row, queries)
    q, g = _vectors(q_ptr, q_tokens, SIZE, WIDTH), _vectors(g_ptr, q_tokens, SIZE, WIDTH)
    peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
    low, high = tl.maximum(start - back, 0), tl.minimum(start + BLOCK + ahead, keys)

    weighted, weights = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(low, high, BLOCK):
        k_at = first + steps
        k_tokens = _tokens(k_valid_ptr, k_at, batch, row // GROUP, keys)
        k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale)
        _, s = _probabilities(z, peak, threshold, alpha, CONSTANT)
        weighted += tl.sum(s * tl.dot(g, tl.trans(v), input_precision="ieee"), axis=1)
        weights += tl.sum(s, axis=1)
    delta = weighted / tl.maximum(weights, 1e-30)

    dq = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(low, high, BLOCK):
        k_at = first + steps
        k_tokens = _tokens(k_valid_ptr, k_at, batch, row // GROUP, keys)
        k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
        z = _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale)
        _, s = _probabilities(z, peak, threshold, alpha, CONSTANT)
        ds = s * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(deltas_ptr + row * queries + q_at, delta, mask=q_at < queries)
    _put_vectors(dq_ptr, dq * scale, row * queries + start, queries - start, SIZE, WIDTH, BLOCK)


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, q_valid_ptr, k_valid_ptr, alphas_ptr, queries, keys, back, ahead, scale, peaks_ptr,
               thresholds_ptr, g_ptr, deltas_ptr, dk_ptr, dv_ptr, CONSTANT: tl.constexpr, HEADS: tl.constexpr,
               GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``Σ ds q`` and ``Σ p g`` of each key, over the queries of all heads that share it."""
    key_row, start = _place(keys, BLOCK)
    batch = key_row * GROUP // HEADS
    steps = tl.arange(0, BLOCK)
    k_at = start + steps
    k_tokens = _tokens(k_valid_ptr, k_at, batch, key_row, keys)
    k, v = _vectors(k_ptr, k_tokens, SIZE, WIDTH), _vectors(v_ptr, k_tokens, SIZE, WIDTH)
    low, high = tl.maximum(start - ahead, 0), tl.minimum(start + BLOCK + back, queries)
    dk, dv = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for member in range(GROUP):
        row = key_row * GROUP + member
        alpha = tl.load(alphas_ptr + row % HEADS)
        for first in range(low, high, BLOCK):
            q_at = first + steps
            q_tokens = _tokens(q_valid_ptr, q_at, batch, row, queries)
            q, g = _vectors(q_ptr, q_tokens, SIZE, WIDTH), _vectors(g_ptr, q_tokens, SIZE, WIDTH)
            peak, threshold = _numbers(peaks_ptr, q_tokens), _numbers(thresholds_ptr, q_tokens)
            delta = _numbers(deltas_ptr, q_tokens)
            z = _scores(q, k, q_tokens, k_tokens, q_at, k_at, back, ahead, scale)
            p, s = _probabilities(z, peak, threshold, alpha, CONSTANT)
            ds = s * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
            dv += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
    _put_vectors(dk_ptr, dk * scale, key_row * keys + start, keys - start, SIZE, WIDTH, BLOCK)
    _put_vectors(dv_ptr, dv, key_row * keys + start, keys - start, SIZE, WIDTH, BLOCK)
