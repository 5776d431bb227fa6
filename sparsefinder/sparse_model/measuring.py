"""What a pattern does to the heads of a model, and to the model, on texts that nothing was learned from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsefinder.attention import Dense
from sparsefinder.graphs import QK, Attention
from sparsefinder.metrics import Gold, count
from sparsefinder.models import plugged
from sparsefinder.models.observed_attention import Watched
from sparsefinder.numerics.normalizers import Normalizer, softmax
from sparsefinder.sparse_model.curves import Curves
from sparsefinder.storage.store import progress

LONGEST = 1024  # tokens of a text that heads are measured on: gold graphs of longer ones fill the memory


@dataclass
class HeadSums:
    """Sums over texts, ``(V, L, H)`` float64 each, and how many texts there were."""

    density: Tensor
    recall: Tensor
    error: Tensor  # squared
    output: Tensor  # squared, (L, H)
    texts: int = 0

    @classmethod
    def none(cls, candidates: int, layers: int, heads: int) -> HeadSums:
        """Before the first text."""
        density, recall, error = torch.zeros(3, candidates, layers, heads, dtype=torch.float64)
        return cls(density, recall, error, torch.zeros(layers, heads, dtype=torch.float64))


@dataclass
class _Look:
    """Watches dense attention, and lets every candidate attend to the same queries, keys and values."""

    candidates: Sequence[Any]  # attentions with a graph
    normalizer: Normalizer
    sums: HeadSums

    def __call__(self, layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
        dense = output.double()
        self.sums.output[layer] += dense.square().sum((0, 2, 3)).cpu()
        truth = _Truth.of(qk, self.normalizer)
        for index, attention in enumerate(self.candidates):
            graph = attention.graph(qk, layer)
            other = attention(qk.q, qk.k, v, qk.valid, layer).double()
            density, recall = truth.compare(graph, qk)
            self.sums.density[index, layer] += density.cpu()
            self.sums.recall[index, layer] += recall.cpu()
            self.sums.error[index, layer] += (other - dense).square().sum((0, 2, 3)).cpu()


@dataclass(frozen=True)
class _Truth:
    """What a graph is compared with: the gold graph of entmax, or the probabilities of softmax ``(1, H, N, N)``."""

    gold: Gold | None = None
    probabilities: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, qk: QK, normalizer: Normalizer) -> _Truth:
        if normalizer.sparse:
            return cls(Gold.of(qk, normalizer.alpha))
        return cls(None, softmax(qk.scores().float()))

    def compare(self, graph: Tensor, qk: QK) -> tuple[Tensor, Tensor]:
        """Density and recall of each head, ``(H,)`` float64."""
        if self.gold is not None:
            means = count(graph, self.gold, qk).macro()
            return 1 - means["sparsity"], means["recall"]
        assert self.probabilities is not None
        density = graph.double().sum((0, 2, 3)) / qk.numbers_allowed.sum()
        return density, (self.probabilities * graph).sum(-1).double().mean((0, 2))


@torch.inference_mode()
def head_sums(
    model: Any, texts: Iterable[Tensor], candidates: Sequence[Any], dense: Dense, shape: tuple[int, int]
) -> HeadSums:
    """Density, recall and error of each candidate in every head, while the model reads with its own attention.

    Args:
        model: Of one of `sparsefinder.models.families.TRAITS`.
        texts: Token ids ``(1, n)``.
        candidates: Attentions with a graph.
        dense: The model's own attention.
        shape: Layers and heads.

    Returns:
        Sums over the texts.
    """
    sums = HeadSums.none(len(candidates), *shape)
    assert isinstance(dense.normalizer, Normalizer)
    with plugged(model, Watched(dense, _Look(candidates, dense.normalizer, sums))):
        for ids in texts:
            ids = ids[:, :LONGEST].to(model.device)
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
            sums.texts += 1
    return sums


def measured_curves(
    model: Any,
    texts: Sequence[Tensor],
    attentions: Mapping[float, Attention],
    dense: Dense,
    shape: tuple[int, int],
    whole: bool,
) -> Curves:
    """The curves of all heads.

    Args:
        model: Of one of `sparsefinder.models.families.TRAITS`.
        texts: Token ids ``(1, n)``.
        attentions: What attends at each value of the sparsity parameter.
        dense: The model's own attention.
        shape: Layers and heads.
        whole: Whether the sparsity parameter is a whole number.
    """
    levels = sorted(attentions)
    sums = head_sums(model, progress(texts, "calibrating"), [attentions[v] for v in levels], dense, shape)
    tiny = torch.finfo(torch.float64).tiny
    return Curves(
        torch.tensor(levels, dtype=torch.float64),
        density=sums.density / sums.texts,
        recall=sums.recall / sums.texts,
        error=(sums.error / sums.output.clamp_min(tiny)).sqrt(),
        weight=sums.output / sums.output.sum(-1, keepdim=True).clamp_min(tiny),
        whole=whole,
    )


@torch.inference_mode()
def outputs(model: Any, texts: Iterable[Tensor]) -> list[Tensor]:
    """The last hidden states ``(n, E)`` of each text, float32, as the model attends now."""
    states = []
    for ids in texts:
        ids = ids.to(model.device)
        states.append(model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0].float().cpu())
    return states


def difference(dense: Sequence[Tensor], sparse: Sequence[Tensor]) -> float:
    """The mean of 1 − the cosine of the mean-pooled states, over texts."""
    cosines = [
        torch.nn.functional.cosine_similarity(a.double().mean(0), b.double().mean(0), dim=0).item()
        for a, b in zip(dense, sparse, strict=True)
    ]
    return max(0.0, 1.0 - math.fsum(cosines) / len(cosines))
