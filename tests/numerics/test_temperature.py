"""The temperature against its formula, and attention with it against brute force in float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Dense, Masked
from sparsefinder.numerics.normalizers import PerHead
from sparsefinder.numerics.temperature import scales
from sparsefinder.patterns.full import Full

KEYS = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]])  # causal; the second text has padding on the left


def of_heads(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_it_is_its_formula_of_each_head_and_query() -> None:
    beta, gamma = of_heads(0.3, 0.0, 1.2), of_heads(1.0, 2.0, -1.5)
    found = scales(KEYS, beta, gamma, 0.5)
    assert found.shape == (2, 3, 6)
    for row, head, query in ((0, 0, 5), (0, 2, 0), (1, 1, 3), (1, 2, 0)):
        n = max(1, int(KEYS[row, query]))
        expected = 0.5 + float(beta[head]) * math.log(1 + n) ** float(gamma[head])
        assert found[row, head, query].item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda beta, gamma: scales(KEYS, beta, gamma), (beta, gamma))


def test_with_delta_1_and_beta_0_nothing_is_multiplied() -> None:
    assert bool((scales(KEYS, torch.zeros(3), torch.tensor([-2.0, 0.0, 2.0])) == 1.0).all())


def test_a_query_with_more_keys_is_multiplied_with_more() -> None:
    factors = scales(torch.arange(1, 5000)[None], torch.tensor([0.1]), torch.tensor([1.0]))
    assert bool((factors.diff() > 0).all())


def by_halving(scores: Tensor, alpha: float) -> Tensor:
    """Entmax of one row in plain float64, by halving the interval in which the threshold lies."""
    x = (alpha - 1) * scores
    low, high = x.max() - 1, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        mass = (x - middle).clamp_min(0).pow(1 / (alpha - 1)).sum()
        low, high = (middle, high) if mass >= 1 else (low, middle)
    return (x - low).clamp_min(0).pow(1 / (alpha - 1))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 0] = False
    return 3 * q.detach().requires_grad_(), k, v, valid


@pytest.mark.parametrize("executor", ["masked", "tiles", "native"])
def test_attention_of_heads_with_their_own_is_brute_force_with_its_derivatives(executor: str) -> None:
    q, k, v, valid = inputs()
    alpha, beta, gamma = of_heads(1.3, 1.8), of_heads(0.4, 0.1), of_heads(1.0, -0.5)

    def attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        q = q * scales(KEYS, beta, gamma)[..., None]
        if executor == "masked":
            return Masked(Full(), PerHead(alpha), causal=True)(q, k, v, valid, 0)  # type: ignore[arg-type]
        return Dense(PerHead(alpha), causal=True, executor=executor)(q, k, v, valid, 0)

    output = attend(q, k, v, alpha, beta, gamma)
    with torch.no_grad():
        for row, head, query in ((0, 0, 5), (0, 1, 2), (1, 0, 1), (1, 1, 4)):
            first = int(row == 1)
            n = query + 1 - first
            factor = 1 + float(beta[head]) * math.log(1 + n) ** float(gamma[head])
            scores = factor * (k[row, head, first : query + 1] @ q[row, head, query]) / 2
            expected = by_halving(scores, float(alpha[head])) @ v[row, head, first : query + 1]
            torch.testing.assert_close(output[row, head, query], expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(attend, (q, k, v, alpha, beta, gamma), atol=1e-5)
