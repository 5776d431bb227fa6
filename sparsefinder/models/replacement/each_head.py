"""What each head of a model's attention has of its own: an α, and a temperature that grows with the number of keys.

A configuration remembers both, one row for each layer: ``attention_alpha`` is then a matrix ``L × H`` instead of a number, and
``attention_temperature`` is ``{"delta": δ, "beta": L × H, "gamma": L × H}`` (`sparsefinder.numerics.temperature`). While they
are learned (`sparsefinder.models.learned_heads`) an attention module has them as parameters, and those count.

The temperature multiplies *queries*, before anything sees them. So every attention that is plugged into a model, every pattern
and every recorded file has queries that give the layer's own probabilities, and none of them knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder.models.entmax_configuration import ALPHA, TEMPERATURE
from sparsefinder.numerics.normalizers import PerHead
from sparsefinder.numerics.temperature import scales

LEARNED = "entmax_heads"  # name of the module of parameters inside an attention module


class HeadParameters(nn.Module):
    """Parameters of the heads of one layer, while they are learned: each ``(H,)``, or None where it is not."""

    def __init__(self, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None, delta: float = 1.0):
        super().__init__()
        self.delta = delta
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            self.register_parameter(name, None if value is None else nn.Parameter(value.clone()))


@dataclass(frozen=True)
class Temperature:
    """Of the heads of one layer: ``δ + β (log(1 + n))^γ``, with ``beta`` and ``gamma`` each ``(H,)``."""

    beta: Tensor
    gamma: Tensor
    delta: float

    def __call__(self, q: Tensor, keys: Tensor) -> Tensor:
        """Queries ``(B, H, N_q, D)`` times the temperature, in their dtype; ``keys (B, N_q)``: how many each may attend to."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        beta, gamma = (x.to(q.device, dtype) for x in (self.beta, self.gamma))
        return (q.to(dtype) * scales(keys, beta, gamma, self.delta)[..., None]).to(q.dtype)


def temperature_of(config: Any, module: Any) -> Temperature | None:
    """That of an attention module; None where there is none."""
    learned = module._modules.get(LEARNED)
    if learned is not None and learned.beta is not None:
        return Temperature(learned.beta, learned.gamma, learned.delta)
    kept = getattr(config, TEMPERATURE, None)
    if kept is None:
        return None
    beta, gamma = (torch.tensor(kept[name][module.layer_idx]) for name in ("beta", "gamma"))
    return Temperature(beta, gamma, kept["delta"])


def alphas_of(config: Any, module: Any) -> PerHead | None:
    """The α of each head of an attention module; None where its heads share one."""
    learned = module._modules.get(LEARNED)
    if learned is not None and learned.alpha is not None:
        return PerHead(learned.alpha)
    kept = getattr(config, ALPHA, None)
    return PerHead(torch.tensor(kept[module.layer_idx])) if isinstance(kept, (list, tuple)) else None
