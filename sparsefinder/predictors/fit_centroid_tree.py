"""k-means of k-means: the members of each cluster are clustered again, all clusters of a head at once.

A tree of clusters fits texts of any length: its levels are clusterings with more and more clusters, and those of a level lie
inside those of the one before. Children of a cluster stand side by side: cluster ``c`` of one level has the children
``c·b … c·b + b − 1`` in the next, ``b`` times as large, one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-20  # squared distance of points that are the same


def nested_centroids(
    points: Tensor, coarsest: Tensor, sizes: Sequence[int], iterations: int, seed: int
) -> list[Tensor]:
    """The centroids of one head on every level.

    Args:
        points: What is clustered, ``(M, R)``.
        coarsest: Centroids of the first level, ``(C, R)``.
        sizes: Clusters on each level, the coarsest first; each is a multiple of the one before.
        iterations: Most rounds of Lloyd's algorithm inside each cluster.
        seed: Of the first children of each cluster, drawn by k-means++.

    Returns:
        ``(C, R)`` for each of ``sizes``. A cluster with fewer points than children has some children that are the same.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = [coarsest]
    owner = torch.cdist(points, coarsest).argmin(-1)
    for coarse, fine in itertools.pairwise(sizes):
        branching = fine // coarse
        children = _first(points, owner, levels[-1], branching, generator)
        owner, children = _moved(points, owner, children, iterations)
        levels.append(children.flatten(0, 1))
    return levels


def _first(points: Tensor, owner: Tensor, parents: Tensor, branching: int, generator: torch.Generator) -> Tensor:
    """Children ``(C, b, R)`` by k-means++: drawn with a probability that grows with the squared distance to those drawn."""
    children = list[Tensor]()
    distance = torch.ones(len(points))
    for _ in range(branching):
        uniform = torch.rand(len(points), generator=generator).clamp_(1e-9, 1 - 1e-7)
        luck = distance.clamp_min(_TINY).log() - (-uniform.log()).log()  # the largest is drawn by these weights
        most = torch.full((len(parents),), -torch.inf).scatter_reduce_(0, owner, luck, "amax")
        drawn = (luck == most[owner]).nonzero().flatten()
        child = parents.clone()  # where a cluster has no point
        child[owner[drawn]] = points[drawn]
        away = (points - child[owner]).square().sum(-1)
        distance = away if not children else torch.minimum(distance, away)
        children.append(child)
    return torch.stack(children, 1)


def _moved(points: Tensor, owner: Tensor, children: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The child that owns each point, and the children ``(C, b, R)`` moved to the means of what they own."""
    parents, branching, size = children.shape
    own = torch.full_like(owner, -1)
    for step in range(iterations + 1):
        before = own
        # nearest child: |x − c|² without |x|²
        products = torch.einsum("pr,pbr->pb", points, children[owner])
        own = owner * branching + (products - children.square().sum(-1)[owner] / 2).argmax(-1)
        if step == iterations or torch.equal(own, before):
            break
        count = torch.bincount(own, minlength=parents * branching).to(points.dtype)[:, None]
        sums = points.new_zeros(parents * branching, size).index_add_(0, own, points)
        children = torch.where(count > 0, sums / count.clamp_min(1), children.flatten(0, 1)).view_as(children)
    return own, children
