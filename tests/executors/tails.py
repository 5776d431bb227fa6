"""Layouts with a tail for tests, and what attention on them is: one query at a time, entry by entry, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
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
    """Those of keys by their scores, and of clusters by mean, variance and number of theirs."""
    if alpha == 1.0:
        weights = [z.exp() for z in keys] + [n * (m + s / 2).exp() for m, s, n in clusters]
        total = torch.stack(weights).sum()
        return [w / total for w in weights]
    x = (alpha - 1) * torch.stack(keys) if keys else torch.zeros(0, dtype=torch.float64)
    some = clusters or [(x.max(), x.sum() * 0, 0)]  # one of no key where there is none
    a, b, n = (torch.stack([torch.as_tensor(each[field]).double() for each in some]) for field in range(3))
    a, b = (alpha - 1) * a if clusters else a, (alpha - 1) * b.clamp_min(1e-12).sqrt()

    def at(threshold: Tensor) -> Tensor:
        above = (x - threshold).clamp_min(0) ** (1 / (alpha - 1))
        return torch.cat([above, n * mass(a - threshold, b, 1 / (alpha - 1))])

    with torch.no_grad():
        centre = torch.cat([x, a]).max()
        low, high = centre - 1 - 9 * b.max(), centre + 9 * b.max()
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle).sum() >= 1 else (low, middle)
    # the derivative of the root of a sum: -(its derivative in all else) / (its derivative in the root)
    root = low.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(at(root).sum(), root)
    return list(at(low - (at(low).sum() - 1) / slope)[: len(keys) + len(clusters)])


NODES, WEIGHTS = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(100))


def mass(a: Tensor, b: Tensor, power: float) -> Tensor:
    """``E[(a + b ε)₊^power]`` by quadrature where ``a + b ε`` is positive."""
    a, b = a[:, None], b[:, None]
    low = (-a / b).clamp(-9, 9)
    width = (9 - low) / 2
    at = low + width * (NODES + 1)
    values = (a + b * at).clamp_min(0) ** power * (-at.square() / 2).exp()
    return (WEIGHTS * width * values).sum(-1) / math.sqrt(2 * math.pi)
