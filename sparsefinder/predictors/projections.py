"""Projections of queries and keys to a few numbers, head by head, and their files.

``q'_i = q_i w_q + b_q`` and ``k'_j = k_j w_k + b_k`` in R^R, or with one hidden tanh layer, or one projection of ``[q; k]``
for both. A file is ``torch.save`` of a list over layers of ``{"q": state_dict, "k": state_dict}``, the form of the published
Sparsefinder: linear ``w (H, D, R)``, ``b (H, 1, R)``; hidden ``w1 (H, D, E)``, ``b1 (H, 1, E)``, ``w2 (H, E, R)``,
``b2 (H, 1, R)``; no projection at all: an empty ``state_dict``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.numerics.padding import at_least_float32
from sparsefinder.storage.tensor_files import load_tensors, save_tensors

_NARROW = 8  # columns: measured with 256 to 32,768 tokens, forward and backward


class Identity(nn.Module):
    """No projection: patterns work on the queries and keys themselves."""

    in_size: int | None = None
    out_size: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → a copy, as of any projection: `LayerProjections` blanks padding in place."""
        return x.clone()

    def taken_back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Linear.taken_back`: ``x`` itself, and zeros."""
        return x, x.new_zeros(x.shape[:2])


class Linear(nn.Module):
    """``x w + b`` with its own ``w (H, D, R)`` and ``b (H, 1, R)`` for every head.

    Args:
        heads: ``H``.
        in_size: ``D``.
        out_size: ``R``.
    """

    def __init__(self, heads: int, in_size: int, out_size: int):
        super().__init__()
        self.w = nn.Parameter(_uniform(heads, in_size, out_size))
        self.b = nn.Parameter(torch.zeros(heads, 1, out_size))

    @property
    def in_size(self) -> int:
        """Head size ``D``."""
        return self.w.shape[1]

    @property
    def out_size(self) -> int:
        """Projected size ``R``."""
        return self.w.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → ``(B, H, N, R)``."""
        batch, heads, tokens, _ = x.shape
        w, b = (own.to(x).expand(batch, -1, -1, -1).flatten(0, 1) for own in (self.w, self.b))
        x = x.flatten(0, 1)
        # one pass, product and bias; of few columns BLAS makes less than half the speed that it makes of as many rows
        narrow = self.out_size <= _NARROW
        projected = torch.baddbmm(b.mT, w.mT, x.mT).mT.contiguous() if narrow else torch.baddbmm(b, x, w)
        return projected.view(batch, heads, tokens, self.out_size)

    def taken_back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and numbers that say the products of ``x`` with projected vectors: ``x·(k w + b) = k·(x wᵀ) + x·b``.

        Args:
            x: ``(H, C, R)``.

        Returns:
            ``(H, C, D)`` and ``(H, C)``.
        """
        return x @ self.w.to(x).mT, (x @ self.b.to(x).mT)[..., 0]


class Hidden(nn.Module):
    """``tanh(x w1 + b1) w2 + b2`` for every head.

    Args:
        heads: ``H``.
        in_size: ``D``.
        hidden_size: Units between.
        out_size: ``R``.
    """

    def __init__(self, heads: int, in_size: int, hidden_size: int, out_size: int):
        super().__init__()
        self.w1 = nn.Parameter(_uniform(heads, in_size, hidden_size))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, hidden_size))
        self.w2 = nn.Parameter(_uniform(heads, hidden_size, out_size))
        self.b2 = nn.Parameter(torch.zeros(heads, 1, out_size))

    @property
    def in_size(self) -> int:
        """Head size ``D``."""
        return self.w1.shape[1]

    @property
    def out_size(self) -> int:
        """Projected size ``R``."""
        return self.w2.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → ``(B, H, N, R)``."""
        hidden = torch.tanh(x @ self.w1.to(x) + self.b1.to(x))
        return hidden @ self.w2.to(x) + self.b2.to(x)


Projection = Identity | Linear | Hidden


class LayerProjections(nn.Module):
    """The projections of one layer.

    A projection whose input is twice the head size takes ``[q; k]`` of a token, once for both sides.

    Args:
        q: Of the queries.
        k: Of the keys; the same module where they are shared.
    """

    def __init__(self, q: Projection, k: Projection):
        super().__init__()
        self.q = q
        self.k = k

    def forward(self, qk: QK) -> QK:
        """The same tokens with projected vectors. Half precision becomes float32 first, float64 stays.

        Args:
            qk: Vectors ``(B, H, N, D)``.

        Returns:
            Vectors ``(B, H, N, R)``; padded positions get zeros, so that blocks may be cut from them.
        """
        q, k = at_least_float32(qk.q), at_least_float32(qk.k)
        if self.q.in_size == 2 * q.shape[-1]:
            qk.one_text("a projection of [q; k]")
            q = k = torch.cat([q, k], dim=-1)
        # what a projection makes is its own: no second copy of it
        sides = ((self.q(q), qk.queries_valid), (self.k(k), qk.valid))
        return qk.with_vectors(*(x.masked_fill_(~valid[:, None, :, None], 0.0) for x, valid in sides))


@dataclass(frozen=True)
class Projections:
    """Projections of all layers: ``projections(qk, layer)`` gives the projected `QK`.

    Args:
        layers: One for each layer.
        source: Where they come from, for messages.
    """

    layers: Sequence[LayerProjections]
    source: str = "memory"

    def __call__(self, qk: QK, layer: int) -> QK:
        if not 0 <= layer < len(self.layers):
            raise UserError(
                f"{self.source} has projections of {len(self.layers)} layers, but layer {layer} was asked for: "
                "they belong to another model; run stage=project on these queries and keys"
            )
        projection = self.layers[layer]
        _check_shapes(projection, qk, self.source)
        return projection(qk)

    @property
    def size(self) -> int | None:
        """``R``, numbers in a projected vector; None where vectors stay as they are."""
        return self.layers[0].q.out_size

    @property
    def cost(self) -> float:
        """Multiplications for projecting a query and a key."""
        return _multiplications(self.layers[0].q) + self.cost_of_keys

    @property
    def cost_of_keys(self) -> float:
        """Those for a key alone."""
        return _multiplications(self.layers[0].k)

    def content(self) -> list[dict[str, dict[str, Tensor]]]:
        """The published form: for each layer the state of both sides."""
        return [
            {
                side: {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
                for side, module in (("q", layer.q), ("k", layer.k))
            }
            for layer in self.layers
        ]

    def keys(self, qk: QK, layer: int) -> Tensor:
        """The projected keys alone, ``(B, H, N_k, R)``, zeros on padding: half the work where nobody asks for queries."""
        if 0 <= layer < len(self.layers) and not qk.crosses:
            projection = self.layers[layer]
            _check_shapes(projection, qk, self.source)
            if projection.k.in_size != 2 * qk.k.shape[-1]:
                return projection.k(at_least_float32(qk.k)).masked_fill_(~qk.valid[:, None, :, None], 0.0)
        return self(qk, layer).k

    def linear_of_keys(self, qk: QK, layer: int) -> Identity | Linear | None:
        """What projects the keys of a layer, where that is linear and takes nothing else; None where it is not."""
        if not 0 <= layer < len(self.layers):
            return None
        projection = self.layers[layer]
        _check_shapes(projection, qk, self.source)
        own = projection.k
        alone = not isinstance(own, Hidden) and own.in_size in (None, qk.k.shape[-1])
        return own if alone and isinstance(own, (Identity, Linear)) else None

    def save(self, path: Path | str) -> None:
        """Write the published form."""
        save_tensors(self.content(), path)

    def check(self, layers: int, heads: int, size: int) -> None:
        """Refuse projections that do not fit queries and keys of that shape.

        Args:
            layers: ``L``.
            heads: ``H``.
            size: Head size ``D``.

        Raises:
            UserError: Which says what does not fit.
        """
        if len(self.layers) != layers:
            raise UserError(
                f"{self.source} has projections of {len(self.layers)} layers, the queries and keys have {layers}: "
                "run stage=project on these queries and keys"
            )
        probe = torch.zeros(1, heads, 1, size)
        for layer in self.layers:
            _check_shapes(layer, QK(probe, probe, torch.ones(1, 1, dtype=torch.bool)), self.source)


def load_projections(path: Path | str) -> Projections:
    """Read a projections file, ours or the published Sparsefinder's.

    Args:
        path: Of the file.

    Returns:
        The projections of all layers, float32, without gradients.

    Raises:
        UserError: In one line, for anything else.
    """
    return projections_of(load_tensors(path, "projections"), str(path))


def projections_of(content: Any, source: str) -> Projections:
    """Projections in the published form, looked at.

    Args:
        content: What should be a list over layers of ``{"q": state_dict, "k": state_dict}``.
        source: Where it comes from, for messages.

    Returns:
        The projections of all layers, float32, without gradients.

    Raises:
        UserError: In one line, for anything else.
    """
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{source}: projections must be a list over layers of {{'q': …, 'k': …}}; run stage=project to make them"
        )
    layers = []
    for index, layer in enumerate(content):
        if not isinstance(layer, dict) or set(layer) != {"q", "k"}:
            raise UserError(
                f"{source}: layer {index} must be a dict with 'q' and 'k'; run stage=project to make projections"
            )
        q, k = (_from_state(layer[side], f"{source}: layer {index}, {side}") for side in ("q", "k"))
        if _sizes(q) != _sizes(k):
            raise UserError(
                f"{source}: layer {index} projects q by (heads, from, to) {_sizes(q)}, but k by {_sizes(k)}; run stage=project"
            )
        layers.append(LayerProjections(q, k).requires_grad_(False))
    return Projections(layers, source)


def _from_state(state: object, where: str) -> Projection:
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and t.is_floating_point() for t in state.values()):
        raise UserError(f"{where} must be a dict of floating point tensors (w and b, or w1, b1, w2 and b2)")
    if not all(tensor.numel() for tensor in state.values()):
        raise UserError(f"{where} has an empty tensor; train the projections again with stage=project")
    if not all(torch.isfinite(tensor.float()).all() for tensor in state.values()):
        raise UserError(f"{where} contains NaN or infinity; train the projections again with stage=project")
    module: Projection
    if not state:
        return Identity()
    if set(state) == {"w", "b"} and state["w"].ndim == 3:
        heads, in_size, out_size = state["w"].shape
        module = Linear(heads, in_size, out_size)
    elif set(state) == {"w1", "b1", "w2", "b2"} and state["w1"].ndim == 3 and state["w2"].ndim == 3:
        heads, in_size, hidden_size = state["w1"].shape
        module = Hidden(heads, in_size, hidden_size, state["w2"].shape[-1])
    else:
        raise UserError(
            f"{where} has {', '.join(sorted(map(str, state)))}; known are w, b (linear) and w1, b1, w2, b2 (hidden)"
        )
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != shapes:
        raise UserError(f"{where} has shapes {shapes}, which do not fit together; they should be {expected}")
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return module


def _check_shapes(projection: LayerProjections, qk: QK, source: str) -> None:
    if isinstance(projection.q, Identity):
        return
    weight = projection.q.w if isinstance(projection.q, Linear) else projection.q.w1
    heads, in_size = weight.shape[0], weight.shape[1]
    if heads != qk.q.shape[1] or in_size not in (qk.q.shape[-1], 2 * qk.q.shape[-1]):
        raise UserError(
            f"{source} projects {heads} heads of size {in_size}, the queries and keys have {qk.q.shape[1]} heads of size "
            f"{qk.q.shape[-1]}: run stage=project on these queries and keys"
        )


def _multiplications(projection: Projection) -> float:
    return float(sum(w.numel() / len(w) for name, w in projection.named_parameters() if name.startswith("w")))


def _sizes(projection: Projection) -> tuple[int, ...]:
    if isinstance(projection, Identity):
        return ()
    return (
        len(projection.w if isinstance(projection, Linear) else projection.w1),
        projection.in_size,
        projection.out_size,
    )


def _uniform(heads: int, rows: int, columns: int) -> Tensor:
    bound = 1.0 / math.sqrt(rows)
    return torch.empty(heads, rows, columns).uniform_(-bound, bound)
