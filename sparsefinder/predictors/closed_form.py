"""Projections in closed form whose inner product is nearest to the scores: see `sparsefinder.lowrank` for the formula."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from sparsefinder.predictors.projections import LayerProjections, Linear, Projections
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import progress

log = logging.getLogger(__name__)


_NEGLIGIBLE = 1e-9  # share of the largest variance below which a direction counts as empty


def fit_lowrank(samples: Samples, rank: int) -> Projections:
    """The closed form for every layer and head.

    Args:
        samples: Queries and keys, one sample in memory at a time.
        rank: ``R``, cut to the head size.

    Returns:
        Linear projections without biases, float32.
    """
    layers, _, size = samples.shape
    if rank > size:
        log.info("rank %d is more than the head size: %d, where nothing is lost", rank, size)
    scores = torch.eye(size, dtype=torch.float64)
    fitted = [
        _of_matrix(*_moments(samples, layer), scores, min(rank, size))
        for layer in progress(range(layers), "lowrank", layers)
    ]
    return Projections(fitted)


def normal_form(samples: Samples, projections: Projections) -> Projections:
    """Linear projections without biases that give the same ``q'·k'``, with queries as white as the closed form has them.

    An inner product is the same for ``q' A⁻¹`` and ``k' Aᵀ``, but the distance of keys, by which they are clustered, is not.

    Args:
        samples: Queries and keys whose moments make the queries white.
        projections: Linear, without biases.

    Returns:
        Projections of the same rank.

    Raises:
        TypeError: Where a projection is not linear, or has a bias.
    """
    made = []
    for layer, each in enumerate(projections.layers):
        q, k = each.q, each.k
        if not isinstance(q, Linear) or not isinstance(k, Linear) or q.b.any() or k.b.any():
            raise TypeError("the inner product has a matrix where both projections are linear and without biases")
        matrix = math.sqrt(q.in_size / q.out_size) * q.w.double() @ k.w.double().mT  # q'·k' / √R = qᵀ M k / √D
        made.append(_of_matrix(*_moments(samples, layer), matrix, q.out_size))
    return Projections(made, projections.source)


def _moments(samples: Samples, layer: int) -> tuple[Tensor, Tensor]:
    """``E[q qᵀ]`` and ``Cov[k]`` of all tokens, ``(H, D, D)`` float64; one sample in memory at a time."""
    _, heads, size = samples.shape
    queries = keys = 0
    q_sum, k_sum, k_mean = (
        torch.zeros(heads, *rest, dtype=torch.float64) for rest in ((size, size), (size, size), (size,))
    )
    for index in range(len(samples)):
        qk = samples.layer(index, layer)
        q, k = qk.q[0].double(), qk.k[0].double()
        queries, keys = queries + q.shape[1], keys + k.shape[1]
        q_sum, k_sum = q_sum + q.mT @ q, k_sum + k.mT @ k
        k_mean = k_mean + k.sum(1)
    mean = k_mean / keys
    return q_sum / queries, k_sum / keys - mean[:, :, None] * mean[:, None, :]


def _of_matrix(q_moment: Tensor, k_moment: Tensor, matrix: Tensor, rank: int) -> LayerProjections:
    """The projections of that rank whose ``q'·k' / √R`` is nearest to ``qᵀ M k / √D``; ``matrix``: ``(D, D)``, or a head each."""
    heads, size, _ = q_moment.shape
    (q_root, q_inverse), (k_root, k_inverse) = _roots(q_moment), _roots(k_moment)
    left, values, right = torch.linalg.svd(q_root @ matrix @ k_root)
    sides = []
    for weight in (
        math.sqrt(rank / size) * q_inverse @ left[..., :rank],
        k_inverse @ right.mT[..., :rank] * values[:, None, :rank],
    ):
        side = Linear(heads, size, rank)
        side.load_state_dict({"w": weight.float(), "b": torch.zeros(heads, 1, rank)})
        sides.append(side)
    return LayerProjections(*sides).requires_grad_(False)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """``C^{½}`` and ``C^{-½}`` of symmetric ``(H, D, D)``; empty directions get next to no room instead of none."""
    values, vectors = torch.linalg.eigh(moment)
    largest = values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    roots = values.clamp_min(largest * _NEGLIGIBLE).sqrt()
    return (vectors * roots[:, None]) @ vectors.mT, (vectors / roots[:, None]) @ vectors.mT
