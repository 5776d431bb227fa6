"""The tail of a layout by torch's products, on any device: what each query gets besides the keys of its graph.

See `sparsefinder.graphs.Layout` for what a tail is and `sparsefinder.numerics.tail_normalizer` for how a normalizer takes it.
Moments of clusters are those of the whole sentence or, where attention is causal, running sums up to each query, some queries at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsefinder.graphs import QK, Layout
from sparsefinder.numerics.cluster_moments import moments

_AT_ONCE = 1 << 21  # numbers of running sums in memory at one time


@dataclass(frozen=True)
class Entries:
    """An entry for each query and bucket.

    Args:
        numbers: ``(B, H, N, C)``, keys that the entry stands for; 0 on padding.
        mean: Of their scores, of the same shape.
        variance: Of their scores, of the same shape.
        apply: Weights of the same shape → ``(B, H, N, D)``, the sum of weight times mean value over the entries.
    """

    numbers: Tensor
    mean: Tensor
    variance: Tensor
    apply: Callable[[Tensor], Tensor]


def entries(layout: Layout, qk: QK, v: Tensor) -> Entries:
    """The entries of a layout with a tail, differentiable in queries, keys and values.

    Args:
        layout: With a tail.
        qk: The true queries and keys, float32 or float64, zeros on padding.
        v: ``(B, H, N, D)``, the same.

    Returns:
        Entries of all queries and buckets; those of buckets whose keys a query sees one by one have the number 0.
    """
    assert layout.buckets is not None  # checked when made
    count = layout.buckets.count
    cluster = layout.buckets.k_ids[..., 0].expand(*qk.q.shape[:2], qk.k.shape[2])
    cluster = cluster.masked_fill((cluster < 0) | ~qk.valid[:, None], count)
    numbers = unseen(layout, qk, cluster).to(qk.q.dtype)
    scaled = qk.q / math.sqrt(qk.q.shape[-1])
    if qk.causal:
        return Entries(
            numbers, *_running_scores(scaled, qk.k, qk.valid, cluster, count), _running_values(v, cluster, count)
        )
    _, mean, variance = moments(qk.k, cluster, count)
    values = moments(v, cluster, count)[1]
    return Entries(numbers, scaled @ mean.mT, scaled.square() @ variance.mT, lambda weights: weights @ values)


@torch.no_grad()
def unseen(layout: Layout, qk: QK, cluster: Tensor) -> Tensor:
    """How many keys of each bucket a query may see, but does not see one by one.

    Args:
        layout: With buckets.
        qk: Says which pairs are allowed.
        cluster: ``(B, H, N)``, the bucket of each key; their number where there is none.

    Returns:
        ``(B, H, N, C)`` float32.
    """
    assert layout.buckets is not None
    tokens, reach = cluster.shape[2], layout.window // 2
    inside = _inside(cluster, layout.buckets.count, torch.float32)
    hears_all = ~qk.queries_valid
    if layout.is_global is not None:
        inside = inside.masked_fill(layout.is_global[:, None, :, None], 0.0)  # everyone sees those
        hears_all = hears_all | layout.is_global
    before = F.pad(inside.cumsum(2), (0, 0, 1, 0))  # keys before a position
    at = torch.arange(qk.q.shape[2], device=cluster.device)
    last = at + 1 if qk.causal else torch.full_like(at, tokens)
    numbers = before[:, :, last]
    if layout.window:
        end = torch.minimum(at + reach + 1, last)
        numbers = numbers - before[:, :, end] + before[:, :, (at - reach).clamp_min(0)]
    q_ids = layout.buckets.q_ids.expand(*qk.q.shape[:3], -1)
    taken = torch.where(q_ids < 0, layout.buckets.count, q_ids)
    numbers = F.pad(numbers, (0, 1)).scatter(-1, taken, 0.0)[..., :-1]
    return numbers.masked_fill(hears_all[:, None, :, None], 0.0)


def _inside(cluster: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``(B, H, T)`` → ``(B, H, T, C)``: 1 where a key is in a bucket."""
    return (cluster[..., None] == torch.arange(count, device=cluster.device)).to(dtype)


def _running_scores(q: Tensor, k: Tensor, valid: Tensor, cluster: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means and variances ``(B, H, N, C)`` of the scores of the keys up to each query."""
    batch, heads, tokens, size = k.shape
    # sums of squares cancel less around a key; the first one, which is no query's future
    first = valid.long().argmax(-1)[:, None, None, None].expand(-1, heads, 1, size)
    centre = k.gather(2, first).detach()
    some = max(_AT_ONCE // max(batch * heads * count * size, 1), 1)
    state = [k.new_zeros(batch, heads, count, width) for width in (1, size, size)]
    means, variances = [], []
    for part in zip(*(x.split(some, dim=2) for x in (q, k - centre, cluster)), strict=True):
        mean, variance, *state = _again(_scores_of_some, *part, *state)
        means.append(mean)
        variances.append(variance)
    if not means:
        return (q.new_zeros(batch, heads, tokens, count),) * 2
    return torch.cat(means, dim=2) + (q * centre).sum(-1, keepdim=True), torch.cat(variances, dim=2)


def _scores_of_some(
    q: Tensor, k: Tensor, cluster: Tensor, number: Tensor, total: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means and variances of some queries in a row, and the sums ``(B, H, C, …)`` behind the last of them."""
    inside = _inside(cluster, total.shape[2], k.dtype)[..., None]
    numbers, totals, of_squares = (
        start[:, :, None] + (inside * x[..., None, :]).cumsum(2)
        for start, x in ((number, torch.ones_like(k[..., :1])), (total, k), (squares, k.square()))
    )
    mean = totals / numbers.clamp_min(1)
    variance = (of_squares / numbers.clamp_min(1) - mean.square()).clamp_min(0)
    scores, spread = ((x[..., None, :] * of).sum(-1) for x, of in ((q, mean), (q.square(), variance)))
    return scores, spread, numbers[:, :, -1], totals[:, :, -1], of_squares[:, :, -1]


def _running_values(v: Tensor, cluster: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """The mean values of the keys up to each query, as a function of the weights of the entries."""

    def apply(weights: Tensor) -> Tensor:
        some = 128
        number, total = (v.new_zeros(*v.shape[:2], count, width) for width in (1, v.shape[-1]))
        parts = []
        for part in zip(*(x.split(some, dim=2) for x in (weights, v, cluster)), strict=True):
            out, number, total = _again(_values_of_some, *part, number, total)
            parts.append(out)
        return torch.cat(parts, dim=2) if parts else torch.zeros_like(v)

    return apply


def _values_of_some(
    weights: Tensor, v: Tensor, cluster: Tensor, number: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for some queries in a row: those before by their sums, those among these by a triangle of products."""
    inside = _inside(cluster, total.shape[2], v.dtype)
    numbers = number.mT + inside.cumsum(2)
    of_each = weights / numbers.clamp_min(1)
    out = of_each @ total + (of_each @ inside.mT).tril() @ v
    return out, numbers[:, :, -1:].mT, total + inside.mT @ v


def _again(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """A function whose intermediate results are computed again for its gradients."""
    if torch.is_grad_enabled():
        return checkpoint(partial(function), *inputs, use_reentrant=False)
    return function(*inputs)
