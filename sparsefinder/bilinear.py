"""The stage ``bilinear``: train separate projections of queries and keys whose inner product finds the support of entmax.

The closed form (`sparsefinder.lowrank`) of the same rank makes the mean squared error of the scores least. But most pairs lie
far below the threshold, where errors do no harm. Training starts from there and lowers, with ``s_ij = q'_i·k'_j / √R``,

- ``bce``: binary cross-entropy with the logit ``β ((α − 1) s_ij − τ_i)``, where ``τ_i`` is the threshold of the entmax of row
  ``i`` of the *estimates*: the number that the rule ``margin`` of `sparsefinder.numerics.selection` compares with. Gradients flow
  through ``τ_i``, so the scores learn relative to it; a shift of a row changes nothing, as for entmax itself. The mean over
  the positives ``p_ij > 0`` of a head and that over its zeros weigh the same, though zeros are many more.
- ``pair``: the hinge ``relu(m − s_ij + s_il)``, ``j`` positive and ``l`` a zero drawn from the same row: what Sparsefinder
  asks of distances (`sparsefinder.quantization`). Only the order within a row is learned.
- ``kl``: ``KL(p_i ‖ softmax(s_i))``, the distance of the estimates from the dense attention itself, as the indexers of language
  models are trained (DeepSeek-AI 2025, DeepSeek-V3.2): a key that is worth more counts more, and zeros only by what they are
  given.

Every step draws some queries of some samples and takes whole rows of them, in all layers and heads at once. In the end the
projections are brought into the normal form of the closed form (white queries; the inner products stay), where keys are
clustered for `sparsefinder.patterns.routed`. Which loss recalls how much, and what else was tried:
``docs/explanation/predictors.md``. The stage also trains index heads, one choice for all heads of a layer:
`sparsefinder.predictors.indexer`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError, check_counts, one_of
from sparsefinder.graphs import QK
from sparsefinder.metrics import Counts, Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.lowrank import LowRank
from sparsefinder.predictors.all_layers import (
    Trained,
    check_one_model,
    clip_each_layer,
    mean_recall,
    per_layer,
    sample_plan,
    stacked_linear,
    stacked_sample,
)
from sparsefinder.predictors.closed_form import fit_lowrank, normal_form
from sparsefinder.predictors.fit_centroids import KeyClusterSettings, fit_tree
from sparsefinder.predictors.gold_pairs import GoldPairs, mean_of_heads
from sparsefinder.predictors.indexer import IndexerSettings, fit_indexer
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.held_out import training_samples, validation_samples
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

LOSSES = ("bce", "pair", "kl")


@dataclass(frozen=True)
class BilinearSettings(KeyClusterSettings):
    """Settings of the stage ``bilinear``."""

    rounds: int = 4  # R, numbers that queries and keys are compared by; at most the head size
    # bce: cross-entropy around each row's own threshold; pair: a hinge for each positive; kl: divergence from the attention
    loss: str = "bce"
    sharpness: float = 4.0  # β of bce
    margin: float = 1.0  # m of pair
    steps: int = 200  # 0: the closed form
    batch_size: int = 4  # samples in a step
    queries: int = 64  # drawn from a sample in a step
    learning_rate: float = 3e-2  # falls linearly to zero
    clip: Annotated[float, "or infinite"] = 1.0  # largest norm of a layer's gradient
    alpha: float = 1.5  # of the entmax whose support is learned
    causal: bool = False
    eval_every: int = 50  # steps between two measurements on held-out samples; 0: only at the start and the end
    eval_samples: int = 8  # held-out samples to measure on
    eval_density: float = 0.2  # share of each query's keys predicted when measuring recall
    indexer_heads: int = 2  # H', index heads that choose for all heads of a layer
    indexer_size: int = 8  # numbers that an index head compares by
    indexer_steps: int = 100  # 0: the closed form
    # heads that share their keys are learned for as one, with the mean of their queries
    share_in_group: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"bilinear.loss={self.loss} is unknown; {one_of(LOSSES, self.loss)}")
        check_counts(
            "bilinear",
            self,
            "rounds",
            "batch_size",
            "queries",
            "n_clusters",
            "coarsest",
            "max_iterations",
            "eval_samples",
            "indexer_heads",
            "indexer_size",
        )
        if self.steps < 0 or self.eval_every < 0 or self.indexer_steps < 0:
            raise UserError("bilinear.steps, bilinear.indexer_steps and bilinear.eval_every must be 0 or more")
        if self.learning_rate <= 0 or self.sharpness <= 0 or self.clip <= 0 or self.margin < 0:
            raise UserError("bilinear needs learning_rate > 0, sharpness > 0, clip > 0 and margin >= 0")
        if not 0 < self.eval_density < 1:
            raise UserError(f"bilinear.eval_density must lie between 0 and 1, got {self.eval_density}")
        if not 1 < self.alpha <= 2:
            raise UserError(f"bilinear.alpha must be above 1 (softmax has no zeros) and at most 2, got {self.alpha}")

    @property
    def indexer(self) -> IndexerSettings:
        """How index heads are trained."""
        return IndexerSettings(
            *(self.indexer_heads, self.indexer_size, self.indexer_steps, self.queries),
            alpha=self.alpha,
            causal=self.causal,
            seed=self.seed,
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk", "qk_validation")


def run(settings: BilinearSettings, store: Store) -> None:
    """Make the artefacts from ``qk``, measuring on ``qk_validation``: projections, centroids there, and index heads."""
    samples = training_samples(store, settings.share_in_group)
    trained = train_bilinear(samples, validation_samples(store, settings.share_in_group), settings)
    centroids = fit_tree(samples, trained.projections, settings)
    with store.writing("bilinear_projections") as path:
        trained.projections.save(path)
    with store.writing("bilinear_centroids") as path:
        centroids.save(path)
    with store.writing("indexer") as path:
        fit_indexer(samples, settings.indexer).save(path)
    store.note("bilinear_projections", history=trained.history)


def train_bilinear(training: Samples, held_out: Samples, settings: BilinearSettings) -> Trained:
    """Train the projections of all layers and heads at once; deterministic in ``settings.seed`` on one machine."""
    check_one_model(training, held_out)
    layers = training.shape[0]
    held_out = held_out.part(0, settings.eval_samples)
    generator = torch.Generator().manual_seed(settings.seed)
    start = fit_lowrank(training, settings.rounds)
    history = [{"step": 0, **_measure(start, held_out, settings)}]
    log.info("closed form: on held-out samples recall %.4f at sparsity %.4f", *_shown(history))
    if not settings.steps:
        return Trained(start, history)

    stack = stacked_linear(start)
    weights = [weight for name, weight in stack.named_parameters() if name.endswith("w")]  # biases stay zero
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    plan = sample_plan(len(training), settings.batch_size, 1, settings.steps, generator)
    for step, batch in enumerate(progress(plan, "bilinear"), start=1):
        loss = 0.0
        for index in batch:
            whole = stacked_sample(training, index, settings.causal)
            drawn = torch.randperm(whole.q.shape[2], generator=generator)[: settings.queries]
            gold = Normalizer(settings.alpha)(_rows(whole, drawn))
            allowed = whole.allowed[0, 0, drawn]
            sample_loss = row_loss(_rows(stack(whole), drawn), gold, allowed, settings, generator) / len(batch)
            # a sum over layers: each is trained as if alone
            torch.autograd.backward(layers * sample_loss, inputs=weights)
            loss += sample_loss.item()
        clip_each_layer(stack, layers, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step < len(plan) and settings.eval_every and step % settings.eval_every == 0:
            history.append({"step": step, "loss": loss, **_measure(per_layer(stack, layers), held_out, settings)})
            log.info("step %d of %d: loss %.4f, recall %.4f at sparsity %.4f", step, len(plan), loss, *_shown(history))
    trained = normal_form(training, per_layer(stack, layers))
    history.append({"step": len(plan), "loss": loss, **_measure(trained, held_out, settings)})
    log.info("step %d of %d: loss %.4f, recall %.4f at sparsity %.4f", step, len(plan), loss, *_shown(history))
    return Trained(trained, history)


def row_loss(
    scores: Tensor, gold: Tensor, allowed: Tensor, settings: BilinearSettings, generator: torch.Generator
) -> Tensor:
    """The loss of some rows of one example, averaged over heads.

    A head without any positive, or without any zero, has no loss of that kind.

    Args:
        scores: ``(H, n, N)`` estimates, ``-inf`` on keys that are not allowed.
        gold: of that shape, the probabilities of the dense entmax attention.
        allowed: ``(n, N)`` bool.
        settings: which loss, and its constants.
        generator: draws the zeros of ``pair``.

    Returns:
        A number that can be differentiated in ``scores``.
    """
    if settings.loss == "kl":
        estimates = scores.log_softmax(-1).masked_fill(~allowed, 0.0)
        return (torch.xlogy(gold, gold) - gold * estimates).sum(-1).mean()
    gold = gold > 0
    if settings.loss == "bce":
        height = (settings.alpha - 1) * scores - row_thresholds(scores, settings.alpha)
        logits = (settings.sharpness * height).masked_fill(~allowed, 0.0)
        zeros = allowed & ~gold
        return (_mean(F.softplus(-logits), gold) + _mean(F.softplus(logits), zeros)).mean()
    pairs = GoldPairs.of(gold, allowed)
    kept, negatives = pairs.draw_negatives(generator)
    rows, flat = pairs.rows[kept], scores.flatten(0, 1)
    hinges = torch.relu(settings.margin - flat[rows, pairs.columns[kept]] + flat[rows, negatives])
    return mean_of_heads(hinges, rows // gold.shape[1], gold.shape[0])


def row_thresholds(scores: Tensor, alpha: float) -> Tensor:
    """``τ (..., 1)`` of entmax of ``(..., N)``, differentiable: ``p_j = [(α − 1) s_j − τ]₊^{1/(α−1)}`` solved for the largest."""
    probabilities = Normalizer(alpha)(scores)
    return (alpha - 1) * scores.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True) ** (alpha - 1)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of each head's chosen values, ``(H,)``."""
    return (values * chosen).sum((-2, -1)) / chosen.sum((-2, -1)).clamp_min(1)


def _rows(qk: QK, drawn: Tensor) -> Tensor:
    """Scores of the drawn queries of one example, ``(H, n, N)``; ``-inf`` on keys that are not allowed."""
    scores = qk.q[0][:, drawn] @ qk.k[0].mT / math.sqrt(qk.q.shape[-1])
    return scores.masked_fill(~qk.allowed[0, 0, drawn], -math.inf)


def _measure(projections: Projections, held_out: Samples, settings: BilinearSettings) -> dict[str, float]:
    """Recall when each query takes the best ``eval_density`` of its keys, and the true sparsity of that."""
    pattern = LowRank("budget", settings.eval_density, settings.alpha)

    def counted(qk: QK, layer: int) -> Counts:
        return count(pattern(projections(qk, layer), layer), Gold.of(qk, settings.alpha), qk)

    return mean_recall(held_out, settings.causal, counted)


def _shown(history: list[dict[str, float]]) -> tuple[float, float]:
    return history[-1]["recall"], history[-1]["sparsity"]
