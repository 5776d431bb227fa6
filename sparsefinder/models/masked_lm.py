"""How good a language model is, of whatever kind, and how sparse its attention: loss, the entropy to beat, gold sparsity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder import models
from sparsefinder.corpora import Batch
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.executors.support_lists import support
from sparsefinder.graphs import QK
from sparsefinder.models.families import TRAITS
from sparsefinder.models.objectives import is_causal, whole_text
from sparsefinder.models.observed_attention import Look, OwnDense, Watched


def masked_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``(M, V)`` and labels ``(M,)`` of the ``M`` tokens asked for; the head is spared all the other tokens.

    A vocabulary is large, and only one token in seven is asked for: this is a third of a small model's work, and most of
    the memory of a large one.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    chosen = batch["labels"] != IGNORED

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][chosen][None]
        return output

    inner: Any = getattr(model, "module", model)  # the model inside a distributed wrapper
    if inner.base_model is inner:  # T5 has its head and its two stacks in one module
        return model(**inputs).logits[chosen], batch["labels"][chosen]
    hook = inner.base_model.register_forward_hook(keep)
    try:
        logits = model(**inputs).logits[0]
    finally:
        hook.remove()
    return logits, batch["labels"][chosen]


@torch.no_grad()
def validation_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy, in nats, over all tokens asked for."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        logits, labels = masked_logits(model, _on(batch, model.device))
        total += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        count += len(labels)
    return total / count


def loss_without_source(model: Any, batches: Sequence[Batch]) -> float:
    """The validation loss of an encoder-decoder that writes without a look at what it read: cross-attention gives zeros.

    What lies between the two is what cross-attention is good for.
    """

    def nothing(q: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(q)

    with models.plugged(model, nothing, "cross"):
        return validation_loss(model, batches)


def unigram_entropy(batches: Sequence[Batch]) -> float:
    """Entropy, in nats, of the distribution of the tokens asked for: the loss of the best guess that ignores context.

    From the counts of these tokens themselves, so it is a little too low on a small sample: a strict measure to beat.
    """
    counts = torch.cat([batch["labels"][batch["labels"] != IGNORED] for batch in batches]).bincount().double()
    return float(torch.distributions.Categorical(probs=counts).entropy())


@torch.no_grad()
def gold_sparsity(model: Any, batches: Sequence[Batch]) -> float:
    """Share of allowed pairs to which the model's own dense attention gives probability zero; the mean over examples,
    layers and heads of every attention that can be looked at, on inputs without masks."""
    model.eval()
    sparsities: list[Tensor] = []

    def looking(own: OwnDense) -> Look:
        def look(layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
            gold = support(qk.with_vectors(qk.q.float(), qk.k.float()), own.normalizers[layer].alpha).counts.sum(-1)
            queries, keys = qk.queries_valid.sum(-1)[:, None], qk.lengths[:, None]
            sparsities.append(1.0 - gold / (keys * (keys + 1) // 2 if qk.causal else queries * keys))

        return look

    with contextlib.ExitStack() as stack:
        for which in TRAITS[model.config.model_type].replaceable:
            own = OwnDense(models.normalizers(model, which), is_causal(model, which))
            stack.enter_context(models.plugged(model, Watched(own, looking(own)), which))
        for batch in batches:
            model.base_model(**whole_text(model, _on(batch, model.device)))
    return torch.cat([sparsity.flatten() for sparsity in sparsities]).mean().item()


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
