"""What an attention did inside a model: the graph that it executed, what that cost, and how far off its output is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from sparsefinder import models
from sparsefinder.attention import Dense
from sparsefinder.evaluation import tasks
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.graphs import QK
from sparsefinder.metrics import Counts, Gold, count, count_rows
from sparsefinder.models.observed_attention import Watched
from sparsefinder.numerics.counter_rng import uniform
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import distributed

Batch = dict[str, Tensor]
T = TypeVar("T")


@dataclass
class Observer:
    """Looks at what an attention does (`Watched`): the graph that it executes, what that costs, its output's error.

    The output is compared with that of dense attention with the model's own normalizer on the same queries, keys and values:
    ``‖o − o_dense‖ / ‖o_dense‖`` over the real tokens of each example and head.

    With ``most``, graph and output are looked at for so many queries of each layer, the same ones for all heads, texts and
    attentions: their rows of dense attention are computed against all keys, in ``S · N · D``, and all but ``computed_density``
    is an estimate.
    """

    attention: Any
    configuration: Configuration | None
    own: Normalizer
    most: int | None = None  # queries of a layer; None: all, and as many rows of the graph
    seed: int = 0  # of their draw
    counts: dict[int, list[Counts]] = field(default_factory=dict)
    errors: dict[int, list[Tensor]] = field(default_factory=dict)
    pairs: dict[int, list[Tensor]] = field(default_factory=dict)  # computed and allowed, each ``(B, H)``

    def __call__(self, layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
        """Measure a call of the attention: its queries and keys, values ``(B, H_k, N_k, D)`` and output ``(B, H, N_q, D)``."""
        exact = qk.with_vectors(qk.q.float(), qk.k.float())
        computed = self.attention.computed_pairs(exact, layer)
        allowed = qk.numbers_allowed[:, None].expand_as(computed)
        self.pairs.setdefault(layer, []).append(torch.stack([computed, allowed]))
        if self.most is not None:
            drawn = uniform(self.seed, layer, torch.arange(qk.q.shape[2], device=qk.q.device)).argsort()[: self.most]
            self._look_at_rows(layer, exact, v.float(), output, drawn.sort().values)
            return
        dense = Dense(self.own, causal=qk.causal)(qk.q, qk.k, v, qk.valid, layer, qk.query_valid)
        self._compare(layer, output, dense, qk.queries_valid)
        graph = self.attention.graph(exact, layer)
        if graph is not None:  # pooled keys have no token graph
            near = None if self.configuration is None else self.configuration.near(exact)
            self.counts.setdefault(layer, []).append(count(graph, Gold.of(exact, self.own.alpha), exact, near))

    def _look_at_rows(self, layer: int, qk: QK, v: Tensor, output: Tensor, rows: Tensor) -> None:
        allowed = qk.allowed_of(rows)
        scores = qk.q[:, :, rows] / math.sqrt(qk.q.shape[-1]) @ qk.a_key_each.k.mT
        probabilities = self.own(scores.masked_fill(~allowed, -math.inf))
        dense = probabilities @ v.repeat_interleave(qk.group, dim=1)
        self._compare(layer, output[:, :, rows], dense, qk.queries_valid[:, rows])
        graph = self._rows(layer, qk, rows)
        if graph is not None:
            near = None if self.configuration is None else self.configuration.near(qk, rows)
            counts = count_rows(graph, probabilities, allowed, qk.queries_valid[:, rows], near)
            self.counts.setdefault(layer, []).append(counts)

    def _compare(self, layer: int, output: Tensor, dense: Tensor, real: Tensor) -> None:
        difference = (output.float() - dense.float()).flatten(2).norm(dim=-1)
        errors = difference / dense.float().flatten(2).norm(dim=-1).clamp_min(1e-30)
        # an example none of whose queries was drawn, such as a short document in a long block, says nothing
        self.errors.setdefault(layer, []).append(errors.masked_fill(~real.any(-1)[:, None], math.nan))

    def _rows(self, layer: int, qk: QK, rows: Tensor) -> Tensor | None:
        """Of the graph; an attention of somebody else may know it only as a whole."""
        if "rows" in inspect.signature(self.attention.graph).parameters:
            found: Tensor | None = self.attention.graph(qk, layer, rows=rows)
            return found
        whole = self.attention.graph(qk, layer)
        return None if whole is None else whole[:, :, rows]

    def gather(self) -> None:
        """Take in what the observers of the other processes measured."""
        self.counts = _joined(distributed.parts(lambda: self.counts))
        self.errors = _joined(distributed.parts(lambda: self.errors))
        self.pairs = _joined(distributed.parts(lambda: self.pairs))

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer and head."""
        rows = []
        for layer in sorted(self.errors):
            # of all examples together: in a short one beside long ones, nearly everything that is computed is padding
            computed, allowed = torch.cat(self.pairs[layer], dim=1).double().sum(1)
            means = {"output_error": torch.cat(self.errors[layer]).nanmean(0), "computed_density": computed / allowed}
            if layer in self.counts:
                means |= Counts.cat(self.counts[layer]).macro()
            rows += [
                {"layer": layer, "head": head} | {name: values[head].item() for name, values in means.items()}
                for head in range(len(means["output_error"]))
            ]
        return rows

    def means(self) -> dict[str, float]:
        """Means over layers and heads; metrics of a graph only where there is one."""
        rows = pd.DataFrame(self.rows())
        means: dict[str, float] = rows.drop(columns=["layer", "head"]).mean().to_dict()
        return means


@torch.inference_mode()
def measure_graphs(
    model: Any, observer: Observer, batches: Sequence[Batch], most: int, which: str | None = None
) -> None:
    """Run the first `most` examples of `batches` through the model while `observer` counts the pairs of its graphs.

    ``which``: the attention that is looked at, where the model has several.
    """
    some: list[Batch] = []
    for batch in batches:
        wanted = most - sum(len(part["input_ids"]) for part in some)
        if wanted > 0:
            some.append({name: tensor[:wanted] for name, tensor in batch.items()})
    with models.plugged(model, Watched(observer.attention, observer), which):
        for batch in distributed.share(some):
            model(**tasks.inputs_of(on(batch, model.device)))
    observer.gather()


def _joined(parts: list[dict[int, list[T]]]) -> dict[int, list[T]]:
    return {layer: [each for part in parts for each in part.get(layer, [])] for layer in {k for p in parts for k in p}}


def on(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
