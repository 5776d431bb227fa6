"""Layouts with a tail for tests, and what attention on them is: one query at a time, entry by entry, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefinder.graphs import QK, Buckets, Layout


@dataclass(frozen=True)
class Tailed:
    """A pattern whose layout was given in advance, with a tail unless ``tail`` says otherwise."""

    buckets: Buckets
    window: int = 0
    is_global: Tensor | None = field(default=None, compare=False)
    tail: bool = True

    def layout(self, qk: QK, layer: int) -> Layout:
        return Layout(self.buckets, self.window, self.is_global, self.tail)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        return self.layout(qk, layer).graph(qk)


def plain(layout: Layout, qk: QK, v: Tensor, alpha: float) -> Tensor:
    """``(B, H, N, D)`` float64, differentiable: every query with its own keys and entries.

    Args:
        layout: with a tail.
        qk: queries and keys of any floating point; padding may hold anything but NaN.
        v: values.
        alpha: 1 is softmax.
    """
    q, k, v = qk.q.double(), qk.k.double(), v.double()
    graph, root = layout.graph(qk), math.sqrt(q.shape[-1])
    bucket_of = layout.buckets.k_ids[..., 0].expand(q.shape[:3])
    rows = []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        allowed = qk.allowed.expand_as(graph)[b, h, i]
        query = q[b, h, i]
        keys = graph[b, h, i].nonzero().squeeze(-1)
        scores, values = [k[b, h, j] @ query / root for j in keys.tolist()], [v[b, h, j] for j in keys.tolist()]
        clusters, of_clusters = [], []
        for c in range(layout.buckets.count):
            members = (allowed & (bucket_of[b, h] == c)).nonzero().squeeze(-1)
            unseen = len(members) - int(graph[b, h, i][members].sum())
            if unseen:
                own = k[b, h, members]
                mean = own.mean(0)
                variance = (own - mean).square().mean(0)
                clusters.append((query @ mean / root, (query.square() * variance).sum() / root**2, unseen))
                of_clusters.append(v[b, h, members].mean(0))
        if not scores and not clusters:
            rows.append(torch.zeros_like(query))
            continue
        rows.append(torch.stack(probabilities(scores, clusters, alpha)) @ torch.stack(values + of_clusters))
    return torch.stack(rows).view_as(v)


def probabilities(keys: list[Tensor], clusters: list[tuple[Tensor, Tensor, int]], alpha: float) -> list[Tensor]:
    """Those of keys by their scores, and of clusters by mean, variance and number of theirs: two halves, ``m ± s``."""
    halves = [(m + sign * s.clamp_min(1e-12).sqrt(), n / 2) for m, s, n in clusters for sign in (1, -1)]
    scores = torch.stack([*keys, *(z for z, _ in halves)])
    copies = torch.tensor([1.0] * len(keys) + [n for _, n in halves], dtype=torch.float64)
    if alpha == 1.0:
        p = copies * scores.exp() / (copies * scores.exp()).sum()
    else:
        x, power = (alpha - 1) * scores, 1 / (alpha - 1)
        p = copies * (x - root(x, copies, power)).clamp_min(0) ** power
    return [*p[: len(keys)], *p[len(keys) :].view(-1, 2).sum(-1)]


def root(x: Tensor, copies: Tensor, power: float) -> Tensor:
    """The threshold by bisection, with the derivative of a root: -(that of the sum in all else) / (that in the root)."""
    with torch.no_grad():
        low, high = x.max() - 2, x.max()
        for _ in range(50):
            middle = (low + high) / 2
            enough = (copies * (x - middle).clamp_min(0) ** power).sum() >= 1
            low, high = (middle, high) if enough else (low, middle)
    above = (x - low).clamp_min(0)
    slope = (copies * power * above ** (power - 1) * (above > 0)).sum().detach()
    return low + ((copies * above**power).sum() - 1) / slope
