"""A lightning indexer: a few small heads whose one score of a query and a key stands for all heads of a layer.

With ``x_i`` and ``y_j`` the queries and keys of all ``H`` heads side by side, ``E = H · D`` numbers each,

    ``I_ij = Σ_h w_ih relu(q_ih · k_j / √R)``,   ``q_ih = x_i U_h``,   ``k_j = y_j V``,   ``w_i = x_i W + b``,

``H'`` index heads of ``R`` numbers that share one key. Trained by ``KL(p_i ‖ softmax(I_i))`` against the dense attention of the
frozen model, ``p_i`` its mean over heads (`fit_indexer`). A file is ``torch.save`` of a list over layers of
``{"q": (H', E, R), "k": (E, R), "w": (E, H'), "b": (H',)}``.

Source:
    DeepSeek-AI (2025), DeepSeek-V3.2-Exp, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp. What differs:
    ``docs/patterns/indexer.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.padding import at_least_float32, without_padding
from sparsefinder.predictors.all_layers import sample_plan
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.storage.samples import Layers, Samples
from sparsefinder.storage.store import progress
from sparsefinder.storage.tensor_files import load_tensors, save_tensors

_NAMES = {"q": 3, "k": 2, "w": 2, "b": 1}  # tensors of a layer, and their dimensions


@dataclass(frozen=True)
class Indexer:
    """The index heads of all layers.

    Args:
        layers: For each layer the four tensors of its file, float32.
        source: Where they come from, for messages.
    """

    layers: Sequence[Mapping[str, Tensor]]
    source: str = "memory"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(H', E, R)``, the same in every layer."""
        heads, width, size = self.layers[0]["q"].shape
        return heads, width, size

    def scores(self, qk: QK, layer: int) -> Tensor:
        """``I (B, N_q, N_k)`` of the true queries and keys ``(B, H, N, D)``, ``-inf`` on pairs that are not allowed.

        Raises:
            UserError: Where the layer or the width do not fit.
        """
        width = qk.q.shape[1] * qk.q.shape[-1]
        if not 0 <= layer < len(self.layers) or width != self.sizes[1]:
            raise UserError(
                f"{self.source} has index heads for {len(self.layers)} layers of width {self.sizes[1]}, layer {layer} of width "
                f"{width} was asked for: run stage=bilinear on these queries and keys"
            )
        q, k = (at_least_float32(side) for side in (qk.q, qk.k))
        q, k = without_padding(q, qk.queries_valid), without_padding(k, qk.valid)
        x, y = (side.transpose(1, 2).flatten(2) for side in (q, k))
        found = index(x, y, self.layers[layer])
        return found.masked_fill(~qk.allowed[:, 0], -math.inf)

    def save(self, path: Path | str) -> None:
        """Write the file."""
        save_tensors([{name: x.contiguous() for name, x in layer.items()} for layer in self.layers], path)


def load_indexer(path: Path | str) -> Indexer:
    """Read a file of index heads; a `UserError` in one line for anything else."""
    content = load_tensors(path, "index heads")
    if not isinstance(content, list) or not content or not all(map(_is_layer, content)):
        raise UserError(f"{path}: index heads must be a list over layers of tensors q, k, w and b; run stage=bilinear")
    if len({layer["q"].shape for layer in content}) > 1:
        raise UserError(f"{path}: the layers have index heads of different sizes; run stage=bilinear again")
    return Indexer([{name: x.float() for name, x in layer.items()} for layer in content], str(path))


def _is_layer(layer: object) -> bool:
    if not isinstance(layer, dict) or {*layer} != {*_NAMES}:
        return False
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim == _NAMES[n] for n, x in layer.items()):
        return False
    heads, width, size = layer["q"].shape
    fits = [tuple(layer[name].shape) for name in ("k", "w", "b")] == [(width, size), (width, heads), (heads,)]
    return fits and all(bool(torch.isfinite(x).all()) for x in layer.values())


def index(x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """``I``, differentiable.

    Args:
        x: Queries of all heads side by side, ``(…, N_q, E)``.
        y: Keys, ``(…, N_k, E)``.
        weights: Of one layer.

    Returns:
        ``(…, N_q, N_k)``.
    """
    q, k, w, b = (weights[name].to(x) for name in _NAMES)
    keys, shares = (y @ k).mT / math.sqrt(k.shape[-1]), x @ w + b
    found = x.new_zeros(*x.shape[:-1], y.shape[-2])
    for head in range(len(q)):  # one at a time: no matrix of all of them
        found = found + shares[..., head, None] * torch.relu(x @ q[head] @ keys)
    return found


@dataclass(frozen=True)
class IndexerSettings:
    """How index heads are trained."""

    heads: int = 2  # H'
    size: int = 8  # R
    steps: int = 100
    queries: int = 64  # drawn from a sample in a step
    learning_rate: float = 0.03  # of each tensor in its own scale; falls linearly to zero
    alpha: float = 1.5  # of the dense attention that is learned
    causal: bool = False
    seed: int = 0


def fit_indexer(samples: Samples, settings: IndexerSettings) -> Indexer:
    """Train the index heads of every layer by KL against the mean of its heads' dense attention; deterministic in the seed.

    They start in closed form, where ``Σ_h ± relu(± x U · y V)`` is the inner product of ``R`` numbers that is nearest to the
    scores of all heads together: every other index head has the opposite sign, so that both sides of a relu are there.
    """
    q, k = ([_SideBySide(x, group) for x in side] for side, group in ((samples.q, 1), (samples.k, samples.group)))
    wide = Samples(q, k, samples.source, samples.between_texts)
    start = fit_lowrank(wide, settings.size)
    generator = torch.Generator().manual_seed(settings.seed)
    signs = torch.tensor([1.0 - 2.0 * (head % 2) for head in range(settings.heads)])
    layers = []
    for layer in progress(range(samples.shape[0]), "indexer", samples.shape[0]):
        of_q, of_k = (getattr(start.layers[layer], side).w.detach()[0] for side in ("q", "k"))
        noise = 0.1 * of_q.std() * torch.randn(settings.heads, *of_q.shape, generator=generator)
        weights = {
            "q": signs[:, None, None] * of_q + noise,
            "k": of_k.clone(),
            "w": torch.zeros(len(of_q), settings.heads),
            "b": 2 * signs / settings.heads,
        }
        layers.append(_trained(samples, wide, layer, weights, settings, generator))
    return Indexer(layers)


@dataclass(frozen=True)
class _SideBySide:
    """Vectors of all heads of a sample as those of one."""

    heads: Layers  # (L, H, n, D)
    group: int  # heads of queries that share one of these

    @property
    def shape(self) -> tuple[int, int, int, int]:
        layers, heads, tokens, size = self.heads.shape
        return layers, 1, tokens, heads * self.group * size

    def __getitem__(self, layer: int, /) -> Tensor:
        return self.heads[layer].repeat_interleave(self.group, dim=0).transpose(0, 1).flatten(1)[None]


def _trained(
    samples: Samples,
    joined: Samples,
    layer: int,
    weights: dict[str, Tensor],
    settings: IndexerSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    scales = {"q": float(weights["q"].std()), "k": float(weights["k"].std()), "w": len(weights["k"]) ** -0.5, "b": 1.0}
    groups = [{"params": [weights[x].requires_grad_(True)], "lr": settings.learning_rate * scales[x]} for x in scales]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(settings.steps, 1))
    normalizer = Normalizer(settings.alpha)
    for (number,) in sample_plan(len(samples), 1, 1, settings.steps, generator):
        qk, wide = (each.layer(number, layer, settings.causal) for each in (samples, joined))
        drawn = torch.randperm(qk.q.shape[2], generator=generator)[: settings.queries]
        allowed = qk.allowed[0, 0][drawn]
        scores = qk.q[0][:, drawn] @ qk.k[0].mT / math.sqrt(qk.q.shape[-1])
        dense = normalizer(scores.masked_fill(~allowed, -math.inf)).mean(0)
        estimates = index(wide.q[0, 0][drawn], wide.k[0, 0], weights).masked_fill(~allowed, -math.inf)
        chances = estimates.log_softmax(-1).masked_fill(~allowed, 0.0)
        loss = (torch.xlogy(dense, dense) - dense * chances).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: x.detach() for name, x in weights.items()}
