"""The stage ``project``: train the projections in which queries lie near the keys they attend to.

For a query ``i`` with positives ``P_i = {j : p_ij > 0}`` and as many negatives ``N_i`` drawn from the allowed zeros of its row,
the contrastive hinge with margin m is either

- ``pair``: ``mean over pairs of relu(m + d(q'_i, k'_j⁺) − d(q'_i, k'_j⁻))``, what the paper's text states, or
- ``row``: ``mean over queries of relu(m + Σ_{P_i} d(q'_i, k'_j) − Σ_{N_i} d(q'_i, k'_j))``, what the published code computes,

with ``d`` the squared L2 distance or ``min``, the smallest squared coordinate difference (Treviso et al. 2022, "Predicting
Attention Sparsity in Transformers", https://arxiv.org/abs/2109.12188). The default is ``pair``, which recalled more on
held-out samples in every layer we tried (docs/explanation/measured.md).

Differences from the published code: (1) all layers and heads are trained at once, each as if alone (the loss is a sum over
layers and gradients are clipped for each layer); (2) gold graphs are computed once and kept as lists of positives; (3)
negatives are drawn with replacement by a binary search, not by sorting a random N × N matrix, so a row with more positives
than zeros still has as many negatives as positives, and never its own positives; a row without zeros is left out.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from sparsefinder.errors import UserError, check_counts, one_of
from sparsefinder.graphs import QK
from sparsefinder.metrics import Counts, Gold, count
from sparsefinder.numerics.distances import PAIRWISE
from sparsefinder.predictors.all_layers import (
    Trained,
    check_one_model,
    clip_each_layer,
    mean_recall,
    per_layer,
    sample_plan,
    stacked_sample,
)
from sparsefinder.predictors.contrastive import Contrast, contrastive_loss
from sparsefinder.predictors.gold_pairs import GoldPairs, PairsOnDisk, gold_pairs
from sparsefinder.predictors.projections import Hidden, Identity, LayerProjections, Linear, Projection, Projections
from sparsefinder.storage.files import remove
from sparsefinder.storage.held_out import training_samples, validation_samples
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

KINDS = ("linear", "hidden", "concat", "none")


@dataclass(frozen=True)
class ProjectSettings(Contrast):
    """Settings of the stage ``project``."""

    rounds: int = 4  # R, the size of the projected space
    kind: str = "linear"  # linear; hidden: one hidden tanh layer; concat: one projection of [q; k]; none: no projection
    hidden_size: int = 32  # E, of the hidden layer
    share_projectors: bool = True  # one projection for queries and keys
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    batch_size: int = 4  # samples in a step
    accumulation: int = 1  # batches in a step
    epochs: int = 10
    steps: int | None = None  # stop after so many steps instead of after the epochs
    clip: Annotated[float, "or infinite"] = 1.0  # largest norm of a layer's gradient
    causal: bool = False
    eval_every: int = 20  # steps between two measurements on held-out samples; 0: only at the end
    eval_samples: int = 8  # held-out samples to measure on
    eval_density: float = 0.2  # share of pairs predicted when measuring recall
    seed: int = 0
    # heads that share their keys are learned for as one, with the mean of their queries
    share_in_group: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise UserError(f"project.kind={self.kind} is unknown; {one_of(KINDS, self.kind)}")
        check_counts("project", self, "rounds", "hidden_size", "batch_size", "accumulation", "epochs", "eval_samples")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"project.steps must be 1 or more, or null to count epochs, got {self.steps}")
        if not 0 < self.eval_density < 1:
            raise UserError(f"project.eval_density must lie between 0 and 1, got {self.eval_density}")
        if self.learning_rate <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise UserError("project needs learning_rate > 0, clip > 0 and weight_decay >= 0")

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk", "qk_validation")


def run(settings: ProjectSettings, store: Store) -> None:
    """Make ``projections`` from ``qk``, measuring on ``qk_validation``."""
    scratch = store.scratch("gold")
    try:
        training, held_out = (take(store, settings.share_in_group) for take in (training_samples, validation_samples))
        trained = train_projections(training, held_out, settings, scratch)
    finally:
        remove(scratch)
    with store.writing("projections") as path:
        trained.projections.save(path)
    store.note("projections", history=trained.history)


def train_projections(
    training: Samples, held_out: Samples, settings: ProjectSettings, scratch: Path | None = None
) -> Trained:
    """Train the projections of all layers and heads at once; deterministic in ``settings.seed`` on one machine.

    Gold graphs are computed once and kept in files of the folder ``scratch``; in memory without one.
    """
    check_one_model(training, held_out)
    layers, heads, size = training.shape
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        stack = _initial(layers * heads, size, settings)
    held_out = held_out.part(0, settings.eval_samples)
    if settings.kind == "none":
        projections = per_layer(stack, layers)
        return Trained(projections, [{"step": 0, **recall_of_nearest(projections, held_out, settings)}])

    gold = _all_gold(training, settings, scratch)
    optimizer = torch.optim.Adam(stack.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    history: list[dict[str, float]] = []
    in_a_step = settings.batch_size * settings.accumulation
    plan = sample_plan(len(training), in_a_step, settings.epochs, settings.steps, generator)
    for step, batch in enumerate(progress(plan, "project"), start=1):
        loss = 0.0
        for index in batch:
            tokens = stacked_sample(training, index, settings.causal)
            sample_loss = layers * contrastive_loss(stack(tokens), gold[index], settings, generator) / len(batch)
            sample_loss.backward()
            loss += sample_loss.item() / layers
        clip_each_layer(stack, layers, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step == len(plan) or (settings.eval_every and step % settings.eval_every == 0):
            history.append(
                {"step": step, "loss": loss, **recall_of_nearest(per_layer(stack, layers), held_out, settings)}
            )
            log.info(
                "step %d of %d: loss %.4f, on held-out samples recall %.4f at sparsity %.4f",
                *(step, len(plan), loss, history[-1]["recall"], history[-1]["sparsity"]),
            )
    return Trained(per_layer(stack, layers), history)


def _initial(heads: int, size: int, settings: ProjectSettings) -> LayerProjections:
    def make() -> Projection:
        if settings.kind == "none":
            return Identity()
        in_size = 2 * size if settings.kind == "concat" else size
        if settings.kind == "hidden":
            return Hidden(heads, in_size, settings.hidden_size, settings.rounds)
        return Linear(heads, in_size, settings.rounds)

    q = make()
    return LayerProjections(q, q if settings.share_projectors or settings.kind == "concat" else make())


def _gold_of_all_layers(samples: Samples, index: int, settings: ProjectSettings) -> GoldPairs:
    whole = stacked_sample(samples, index, settings.causal)
    return gold_pairs(whole, settings.alpha, settings.block_size, symmetric=settings.kind == "concat")


def _all_gold(samples: Samples, settings: ProjectSettings, scratch: Path | None) -> PairsOnDisk | list[GoldPairs]:
    each = (_gold_of_all_layers(samples, index, settings) for index in progress(range(len(samples)), "gold graphs"))
    if scratch is None:
        return list(each)
    kept = PairsOnDisk(scratch)
    for index, pairs in enumerate(each):
        kept.put(index, pairs)
    return kept


def recall_of_nearest(projections: Projections, held_out: Samples, settings: ProjectSettings) -> dict[str, float]:
    """Recall when the nearest ``eval_density`` of the allowed pairs of each head are predicted, and their true sparsity."""
    return mean_recall(
        held_out, settings.causal, lambda qk, layer: _count_nearest(projections(qk, layer), qk, settings)
    )


def _count_nearest(projected: QK, qk: QK, settings: ProjectSettings) -> Counts:
    if settings.block_size > 1:
        pairs = gold_pairs(qk, settings.alpha, settings.block_size)
        qk = projected = projected.in_blocks(settings.block_size)
        shape = torch.Size((*qk.q.shape[:3], pairs.tokens))
        gold = Gold(pairs.rows, pairs.columns, torch.ones(len(pairs.rows)), shape)
    else:
        gold = Gold.of(qk, settings.alpha)
    distance = PAIRWISE[settings.distance](projected.q, projected.k, 2.0).masked_fill(~qk.allowed, math.inf)
    wanted = max(1, round(settings.eval_density * int(qk.allowed.sum())))
    threshold = distance.flatten(2).kthvalue(wanted, dim=-1).values[..., None, None]
    return count((distance <= threshold) & qk.allowed, gold, qk)
