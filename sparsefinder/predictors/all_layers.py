"""All layers and heads trained at once, each as if by itself: the heads of all layers are the heads of one stack.

The loss is a sum over layers, and gradients are clipped for each layer, so that no layer shrinks the step of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.metrics import Counts
from sparsefinder.predictors.projections import Hidden, Identity, LayerProjections, Linear, Projection, Projections
from sparsefinder.storage.samples import Samples


@dataclass(frozen=True)
class Trained:
    """What training returns: the projections, and one record (step, loss, recall, sparsity) for each measurement."""

    projections: Projections
    history: list[dict[str, float]]


def check_one_model(training: Samples, held_out: Samples) -> None:
    """Refuse samples of two models.

    Args:
        training: Queries and keys to learn from.
        held_out: Queries and keys to measure on.

    Raises:
        UserError: Where layers, heads or head size differ.
    """
    if held_out.shape != training.shape:
        raise UserError(
            f"{held_out.source} has (layers, heads, head size) {held_out.shape}, {training.source} has {training.shape}: "
            "give training and held-out samples of one model"
        )


def stacked_sample(samples: Samples, index: int, causal: bool) -> QK:
    """One sample, its layers side by side as heads.

    Args:
        samples: Queries and keys of a model.
        index: Of the sample.
        causal: Whether a query sees no later key.

    Returns:
        Vectors ``(1, L·H, n, D)``, without padding; of cross-attention as many queries and keys as it has.
    """
    layers = list(samples.layers(index, causal))
    q, k = (torch.cat([getattr(layer, side) for layer in layers], dim=1) for side in ("q", "k"))
    return layers[0].with_vectors(q, k)


def stacked_linear(projections: Projections) -> LayerProjections:
    """Linear projections of all layers as those of one stack of ``L·H`` heads, to be trained; copies."""

    def side(name: str) -> Linear:
        states = [getattr(layer, name).state_dict() for layer in projections.layers]
        state = {key: torch.cat([each[key] for each in states]) for key in ("w", "b")}
        made = Linear(*_sizes(state["w"]))
        made.load_state_dict(state)
        return made

    return LayerProjections(side("q"), side("k"))


def per_layer(stack: LayerProjections, layers: int) -> Projections:
    """The projections of a stack, layer by layer; copies without gradients."""

    def part(module: Projection, layer: int) -> Projection:
        if isinstance(module, Identity):
            return module
        state = {name: tensor.chunk(layers)[layer].detach().clone() for name, tensor in module.state_dict().items()}
        if isinstance(module, Linear):
            made: Projection = Linear(*_sizes(state["w"]))
        else:
            made = Hidden(*_sizes(state["w1"]), state["w2"].shape[-1])
        made.load_state_dict(state)
        return made

    def of_layer(layer: int) -> LayerProjections:
        q = part(stack.q, layer)
        return LayerProjections(q, q if stack.k is stack.q else part(stack.k, layer)).requires_grad_(False)

    return Projections([of_layer(layer) for layer in range(layers)])


def _sizes(weight: Tensor) -> tuple[int, int, int]:
    heads, rows, columns = weight.shape
    return heads, rows, columns


def clip_each_layer(stack: LayerProjections, layers: int, limit: float) -> None:
    """Shrink the gradient of each layer whose norm, over both projections, is more than the limit.

    Args:
        stack: Projections of ``L·H`` heads with gradients, which are changed in place.
        layers: ``L``.
        limit: Largest norm.
    """
    gradients = [parameter.grad for parameter in stack.parameters() if parameter.grad is not None]
    norms = sum(gradient.unflatten(0, (layers, -1)).flatten(1).square().sum(-1) for gradient in gradients)
    if isinstance(norms, Tensor):
        scale = (limit / norms.sqrt().clamp_min(1e-12)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(scale.repeat_interleave(gradient.shape[0] // layers).view(-1, 1, 1))


def sample_plan(
    samples: int, in_a_step: int, epochs: int, steps: int | None, generator: torch.Generator
) -> list[list[int]]:
    """The samples of each step: every epoch in a new order.

    Args:
        samples: How many there are.
        in_a_step: How many a step takes.
        epochs: Passes over all samples.
        steps: Number of steps instead of the epochs; None: the epochs count.
        generator: Draws the orders.

    Returns:
        Indices of samples for each step.
    """
    if steps is not None:
        epochs = math.ceil(steps * in_a_step / samples) + 1
    plan: list[list[int]] = []
    for _ in range(epochs):
        order = torch.randperm(samples, generator=generator).tolist()
        plan += [order[start : start + in_a_step] for start in range(0, samples, in_a_step)]
    return plan[:steps]


@torch.no_grad()
def mean_recall(held_out: Samples, causal: bool, counted: Callable[[QK, int], Counts]) -> dict[str, float]:
    """Recall and sparsity, averaged over samples, layers and heads.

    Args:
        held_out: Queries and keys to measure on.
        causal: Whether a query sees no later key.
        counted: ``(qk, layer)`` → the counts of a prediction.

    Returns:
        ``recall`` and ``sparsity``, each in [0, 1].
    """
    layers = (pair for index in range(len(held_out)) for pair in enumerate(held_out.layers(index, causal)))
    macro = Counts.cat([counted(qk, layer) for layer, qk in layers]).macro()
    return {name: macro[name].mean().item() for name in ("recall", "sparsity")}
