"""Attention on a graph against a slow reference: one query at a time, normalized by the ``entmax`` package."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import entmax
import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Masked
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.transforms import Normalizer

ALPHAS = [1.0, 1.3, 1.5, 2.0]


@dataclass(frozen=True)
class Fixed:
    """A pattern whose buckets were given in advance."""

    buckets: Buckets | None = None
    window: int = 0
    is_global: Tensor | None = field(default=None, compare=False)

    def layout(self, qk: QK, layer: int) -> Layout:
        return Layout(self.buckets, self.window, self.is_global)

    def __call__(self, qk: QK, layer: int) -> Tensor:
        return self.layout(qk, layer).graph(qk)


def reference(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, alpha: float) -> Tensor:
    """The output of each query from its own keys alone, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(v)
    for b, h, i in graph.any(-1).nonzero().tolist():
        keys = graph[b, h, i].nonzero().squeeze(-1)
        scores = k[b, h, keys] @ q[b, h, i] / math.sqrt(q.shape[-1])
        p = scores.softmax(0) if alpha == 1 else entmax.entmax_bisect(scores, alpha, n_iter=100)
        out[b, h, i] = p @ v[b, h, keys]
    return out


def vectors(batch: int, heads: int, tokens: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(3))
    return 2 * q, k, v


def right_padded(lengths: list[int], tokens: int) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def random_ids(batch: int, heads: int, tokens: int, slots: int, buckets: int, seed: int = 0) -> Buckets:
    """``slots`` rounds of random buckets, so that pairs share one, several or none."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, slots)
    offsets = torch.arange(slots) * buckets
    q_ids, k_ids = (torch.randint(buckets, shape, generator=generator) + offsets for _ in range(2))
    return Buckets(q_ids, k_ids, slots * buckets)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("causal", [False, True])
def test_masked_matches_the_reference(alpha: float, causal: bool) -> None:
    q, k, v = vectors(2, 2, 23, 8)
    valid = right_padded([23, 17], 23)
    pattern = Fixed(random_ids(2, 2, 23, 2, 5), window=3)
    graph = pattern(QK(q, k, valid, causal), 0)
    out = Masked(pattern, Normalizer(alpha), causal)(q, k, v, valid, 0)
    torch.testing.assert_close(out, reference(q, k, v, graph, alpha).float(), rtol=1e-5, atol=1e-5)
    assert not out[1, :, 17:].any()


def test_masked_gives_zeros_without_keys_and_ignores_padding() -> None:
    q, k, v = vectors(1, 1, 6, 4)
    valid = right_padded([4], 6)
    for x in (q, k, v):
        x[:, :, 4:] = math.nan
        x.requires_grad_()
    alone = Buckets(torch.tensor([[[[0], [0], [0], [1], [0], [0]]]]), torch.zeros(1, 1, 6, 1, dtype=torch.long), 2)
    out = Masked(Fixed(alone))(q, k, v, valid, 0)
    assert not out[0, 0, 3:].any()
    assert out[0, 0, :3].isfinite().all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert Masked(Fixed(alone)).computed_pairs(QK(q, k, valid), 0).tolist() == [[36]]
