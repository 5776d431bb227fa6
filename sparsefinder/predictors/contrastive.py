"""The contrastive hinge from which projections learn: see `sparsefinder.quantization` for the formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError, one_of
from sparsefinder.executors.native import gold_pairs as native
from sparsefinder.graphs import QK
from sparsefinder.predictors.gold_pairs import GoldPairs, mean_of_heads

LOSSES = ("pair", "row")


DISTANCES = ("l2", "min")


@dataclass(frozen=True)
class Contrast:
    """What is to be near and what far, and by how much."""

    loss: str = "pair"  # pair: a hinge per pair; row: one hinge around the sums of a row, as in the published code
    distance: str = "l2"  # l2: squared; min: smallest squared coordinate difference
    margin: float = 1.0
    alpha: float = 1.5  # of the entmax whose support is learned
    block_size: int = 1  # tokens in a chunk

    def __post_init__(self) -> None:
        for name, choices in (("loss", LOSSES), ("distance", DISTANCES)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"project.{name}={getattr(self, name)} is unknown; {one_of(choices, getattr(self, name))}"
                )
        if self.block_size < 1:
            raise UserError(f"project.block_size must be 1 or more, got {self.block_size}")
        if self.margin < 0:
            raise UserError(f"project.margin must be 0 or more, got {self.margin}")
        if not 1 < self.alpha <= 2:
            raise UserError(f"project.alpha must be above 1 (softmax has no zeros) and at most 2, got {self.alpha}")


def contrastive_loss(projected: QK, gold: GoldPairs, settings: Contrast, generator: torch.Generator) -> Tensor:
    """The hinge of one example, averaged over heads.

    Args:
        projected: Projected queries and keys of one example without padding, ``(1, H, n, R)``; with ``block_size`` they are
            cut into chunks here.
        gold: The positives, of chunks with ``block_size``.
        settings: Loss, distance, margin and chunks.
        generator: Draws a negative for each positive.

    Returns:
        A scalar in the dtype of the projected vectors.
    """
    if settings.block_size > 1:
        projected = projected.in_blocks(settings.block_size)
    if settings.distance == "l2" and not projected.crosses and native.works_on(projected.q):
        pairs = native.Positives(gold.rows, gold.columns, gold.zeros, gold.chances(generator))
        return native.hinge(projected.q[0], projected.k[0], pairs, settings.margin, settings.loss == "row")
    return _contrastive_loss(projected, gold, settings, generator)


def _contrastive_loss(projected: QK, gold: GoldPairs, settings: Contrast, generator: torch.Generator) -> Tensor:
    """The same by torch's operations, for each distance and on any device."""
    heads, tokens, size = projected.q.shape[1:]
    kept, negatives = gold.draw_negatives(generator)
    rows = gold.rows[kept]
    first_key = rows // tokens * projected.k.shape[2]  # rows and keys of a head lie together
    queries = projected.q.reshape(-1, size).index_select(0, rows)
    keys = projected.k.reshape(-1, size)
    near = _distance(queries, keys.index_select(0, first_key + gold.columns[kept]), settings.distance)
    far = _distance(queries, keys.index_select(0, first_key + negatives), settings.distance)
    if settings.loss == "pair":
        pairs = torch.relu(settings.margin + near - far)
        return mean_of_heads(pairs, rows // tokens, heads)
    sums = near.new_zeros(heads * tokens).index_add(0, rows, near - far)
    learned = torch.zeros(heads * tokens, dtype=torch.bool).index_fill(0, rows, True)
    return (torch.relu(settings.margin + sums) * learned).sum() / (heads * tokens)


def _distance(queries: Tensor, keys: Tensor, name: str) -> Tensor:
    squared = (queries - keys).square()
    return squared.sum(-1) if name == "l2" else squared.amin(-1)
