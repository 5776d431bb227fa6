"""A temperature of attention that grows with the log of the number of keys: what scores are multiplied with.

The more keys a query sees, the more of them lie near its largest score, and the flatter its attention becomes, unless the
differences of the scores grow too. Here the scores of a head are multiplied with

    θ_h(n_i) = δ + β_h · log(1 + n_i)^{γ_h},

where ``n_i`` is the number of keys that query ``i`` may attend to. With ``δ = 1`` and ``β = 0`` nothing is multiplied; with
softmax, ``δ = 0`` and ``γ = 1`` this is Scalable-Softmax (Nakanishi 2025, https://arxiv.org/abs/2501.19399).

Source:
    Vasylenko, Pitorro, Martins and Treviso 2026, Long-Context Generalization with Sparse Attention (ASEntmax),
    https://arxiv.org/abs/2506.16640. There ``β`` and ``γ`` are functions of the query's hidden state, or, as here, one number for
    each head (``learn`` in the published code); the formula there has ``log n``, the published code ``log(n + 1)``, as here: with
    one key and ``γ < 0``, ``(log 1)^γ`` would be infinite.
"""

from __future__ import annotations

from torch import Tensor


def scales(keys: Tensor, beta: Tensor, gamma: Tensor, delta: float = 1.0) -> Tensor:
    """``θ_h(n_i)`` of each query and head; differentiable in ``β`` and ``γ``.

    Args:
        keys: ``(B, N_q)``, how many keys each query may attend to; below 1, as on padding, counts as 1.
        beta: ``(H,)`` floating point.
        gamma: ``(H,)``.
        delta: what is left where ``β = 0``.

    Returns:
        ``(B, H, N_q)`` in the dtype of ``beta``.
    """
    logs = keys.clamp_min(1).to(beta.dtype).log1p()
    return delta + beta[:, None] * logs[:, None] ** gamma[:, None]
