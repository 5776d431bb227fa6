"""Normalizers against the entmax package, and the promises that the package does not make (traps 3 and 4)."""

from __future__ import annotations

import math

import entmax as package
import pytest
import torch

from sparsefinder import transforms
from sparsefinder.transforms import Normalizer, entmax, entmax15, softmax, sparsemax


def rows(*shape: int, scale: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("length", [1, 2, 33, 700])
def test_entmax15_agrees_with_the_package(length: int, scale: float) -> None:
    z = rows(64, length, scale=scale)
    torch.testing.assert_close(entmax15(z), package.entmax15(z, dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.25, 1.5, 1.75, 2.0])
def test_any_alpha_agrees_with_bisection(alpha: float) -> None:
    z = rows(40, 200, dtype=torch.float64)
    expected = package.entmax_bisect(z, alpha=alpha, dim=-1, n_iter=80)
    torch.testing.assert_close(entmax(z, alpha), expected, atol=1e-6, rtol=0)


def test_compiled_and_eager_agree() -> None:
    z = rows(transforms._WORTH_COMPILING // 256 + 1, 256)
    one_by_one = torch.cat([entmax15(row) for row in z.split(64)])
    torch.testing.assert_close(entmax15(z), one_by_one, atol=1e-6, rtol=0)


def test_many_alphas_share_one_compiled_form() -> None:
    z = rows(transforms._WORTH_COMPILING // 256 + 1, 256)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for alpha in (1.01, 1.2, 1.3, 1.4, 1.6, 1.7):
        expected = package.entmax_bisect(z.double(), alpha=alpha, dim=-1, n_iter=80).float()
        torch.testing.assert_close(entmax(z, alpha), expected, atol=1e-6, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 3, "first steps, more steps, projection"


def test_runs_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    transforms._compiled.cache_clear()
    z = rows(transforms._WORTH_COMPILING // 64 + 1, 64)
    torch.testing.assert_close(entmax15(z), package.entmax15(z, dim=-1), atol=1e-6, rtol=0)
    transforms._compiled.cache_clear()


def test_kernels_do_not_share_their_compiled_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps eight compiled forms of a code object, and runs what shares it uncompiled from then on."""
    codes = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: codes.append(function.__code__))
    for constant in (None, 1.5, 2.0):
        transforms._compiled.__wrapped__(transforms._project, constant)
        transforms._compiled.__wrapped__(transforms._jacobian_product, constant)
    assert len({id(code) for code in codes}) == len(set(codes)) == 6


@pytest.mark.parametrize("normalize", [softmax, entmax15, sparsemax, lambda z: entmax(z, 1.3)])
class TestPromises:
    def test_sums_to_one(self, normalize) -> None:
        torch.testing.assert_close(normalize(rows(50, 60)).sum(-1), torch.ones(50), atol=2e-6, rtol=0)

    def test_masked_is_absent(self, normalize) -> None:
        z = rows(20, 30)
        absent = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.5
        p = normalize(z.masked_fill(absent, -math.inf))
        assert (p[absent] == 0).all()
        for row in range(20):
            torch.testing.assert_close(p[row][~absent[row]], normalize(z[row][~absent[row]]), atol=1e-6, rtol=0)

    def test_an_empty_row_gives_zeros_and_no_gradient(self, normalize) -> None:
        z = rows(3, 5)
        z[1] = -math.inf
        z.requires_grad_()
        p = normalize(z)
        assert (p[1] == 0).all()
        (p * torch.arange(5.0)).sum().backward()
        assert torch.isfinite(z.grad).all()
        assert (z.grad[1] == 0).all()

    def test_half_precision_is_computed_in_float32(self, normalize) -> None:
        z = rows(20, 300)
        p = normalize(z.bfloat16())
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, normalize(z.bfloat16().float()))
        torch.testing.assert_close(p.sum(-1), torch.ones(20), atol=2e-6, rtol=0)

    def test_gradient(self, normalize) -> None:
        z = rows(4, 7, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(normalize, (z,), atol=1e-6)

    def test_a_shift_changes_nothing(self, normalize) -> None:
        z = rows(10, 20, dtype=torch.float64)
        torch.testing.assert_close(normalize(z), normalize(z + 123.0))


def test_normalizer_names_its_range() -> None:
    with pytest.raises(ValueError, match="between 1"):
        Normalizer(2.5)
    assert not Normalizer(1.0).sparse
    assert Normalizer(1.5).sparse


def test_empty_input() -> None:
    assert entmax15(torch.zeros(0, 4)).shape == (0, 4)
