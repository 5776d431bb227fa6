"""Continue training a model under the attention of a variant, so that its other weights can get used to it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sparsefinder import models
from sparsefinder.errors import UserError, one_of
from sparsefinder.graphs import QK, Attention
from sparsefinder.models.masked_lm import masked_logits
from sparsefinder.models.objectives import is_causal
from sparsefinder.models.observed_attention import Recorder, Watched
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.predictors.contrastive import Contrast, contrastive_loss
from sparsefinder.predictors.gold_pairs import gold_pairs
from sparsefinder.predictors.projections import Projections
from sparsefinder.storage.store import progress

log = logging.getLogger(__name__)

PARTS = ("head", "all_but_projections", "all")


@dataclass(frozen=True)
class AdaptSettings:
    """How long, and what, to train."""

    steps: int = 0  # 0: evaluate the model as it is
    part: str = "all_but_projections"  # head: the masked-LM head alone; all: the projections of stage=project as well
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip: Annotated[float, "or infinite"] = 1.0  # largest norm of the gradient
    projection_learning_rate: float = 1e-3  # of `all`; the next four as in stage=project
    loss: str = "pair"
    distance: str = "l2"
    margin: float = 1.0
    block_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UserError(f"finetune_part={self.part} is unknown; {one_of(PARTS, self.part)}")
        if self.steps < 0 or self.batch_size < 1:
            raise UserError(
                f"adapt_steps must be 0 or more and the batch size 1 or more, got {self.steps} and {self.batch_size}"
            )
        self.contrast(Normalizer(1.5))

    def contrast(self, normalizer: Normalizer) -> Contrast:
        """The loss that projections learn from, of a model that attends by ``normalizer``."""
        own = {name: getattr(self, name) for name in ("loss", "distance", "margin", "block_size")}
        return Contrast(alpha=max(normalizer.alpha, 1.01), **own)


def adapt(
    model: Any,
    attention: Attention | None,
    batches: Sequence[dict[str, Tensor]],
    settings: AdaptSettings,
    projections: Projections | None = None,
    which: str | None = None,
) -> None:
    """Train a model under another attention, in place.

    A predicted graph is discrete, so no gradient of the model's loss reaches the projections. With ``part="all"`` they are
    trained in place beside the model on the contrastive loss of the queries and keys they are given; centroids stay.

    Args:
        model: a masked language model, or one with another head; left in evaluation mode.
        attention: what it attends with; None for its own.
        batches: inputs with labels, cycled.
        settings: how many steps, and what is trained.
        projections: those of the stage ``project``, trained too where ``part="all"``.
        which: the attention that is replaced, where the model has several.

    Raises:
        UserError: where the head alone is to be trained and shares all its weights with the encoder.
    """
    head = settings.part == "head"
    base = model.base_model
    trained = [p for p in model.parameters() if not head or not any(p is q for q in base.parameters())]
    if not trained:
        raise UserError(
            "the masked-LM head of this model shares all its weights with the encoder: use another finetune_part"
        )
    frozen = [p for p in model.parameters() if not any(p is q for q in trained)]
    groups: list[dict[str, Any]] = [{"params": trained}]
    learning = projections if settings.part == "all" else None
    recorder = Recorder()
    watched = None if attention is None else Watched(attention, recorder)
    if learning is not None:
        parameters = [p for layer in learning.layers for p in layer.requires_grad_(True).parameters()]
        groups.append({"params": parameters, "lr": settings.projection_learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with attending(model, attention if learning is None else watched, which), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for step in progress(range(settings.steps), "adapt"):
                loss = _loss(model, batches[step % len(batches)])
                if learning is not None and watched is not None:
                    contrast = settings.contrast(models.get_normalizer(model))
                    loss = loss + _projection_loss(recorder.layers, learning, contrast, generator)
                loss.backward()
                nn.utils.clip_grad_norm_(trained, settings.clip)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        if learning is not None:
            for layer in learning.layers:
                layer.requires_grad_(False)


def attending(model: Any, attention: Attention | None, which: str | None = None) -> AbstractContextManager[None]:
    """The attention plugged in for a while; None leaves the model as it is. ``which``: see `models.plugged`."""
    return contextlib.nullcontext() if attention is None else models.plugged(model, attention, which)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's own, or that of the next words, whose labels are a step ahead already."""
    if not is_causal(model):
        own: Tensor = model(**batch).loss
        return own
    return nn.functional.cross_entropy(*masked_logits(model, batch))


def _projection_loss(
    recorded: dict[int, QK], projections: Projections, settings: Contrast, generator: torch.Generator
) -> Tensor:
    losses = []
    for layer, qk in recorded.items():
        for example in range(len(qk.valid)):
            one = _without_padding(qk, example)
            gold = gold_pairs(one, settings.alpha, settings.block_size)
            losses.append(contrastive_loss(projections(one, layer), gold, settings, generator))
    return torch.stack(losses).mean()


def _without_padding(qk: QK, example: int) -> QK:
    """One of the examples by itself, its real tokens alone."""
    queries, keys = qk.queries_valid[example], qk.valid[example]
    q, k = qk.q[example : example + 1, :, queries].float(), qk.k[example : example + 1, :, keys].float()
    return QK(q, k, keys[None, keys], qk.causal, queries[None, queries] if qk.crosses else None)
