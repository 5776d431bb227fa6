"""Normalizers against the entmax package, and the promises that the package does not make (traps 3 and 4)."""

from __future__ import annotations

import math

import entmax as package
import pytest
import torch

from sparsefinder.numerics import entmax_newton, normalizers
from sparsefinder.numerics.normalizers import Normalizer, PerHead, entmax, entmax15, softmax, sparsemax


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
    z = rows(entmax_newton.WORTH_COMPILING // 256 + 1, 256)
    one_by_one = torch.cat([entmax15(row) for row in z.split(64)])
    torch.testing.assert_close(entmax15(z), one_by_one, atol=1e-6, rtol=0)


def test_many_alphas_share_one_compiled_form() -> None:
    z = rows(entmax_newton.WORTH_COMPILING // 256 + 1, 256)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for alpha in (1.01, 1.2, 1.3, 1.4, 1.6, 1.7):
        expected = package.entmax_bisect(z.double(), alpha=alpha, dim=-1, n_iter=80).float()
        torch.testing.assert_close(entmax(z, alpha), expected, atol=1e-6, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 1, "one solution"


def test_runs_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    entmax_newton.compiled.cache_clear()
    z = rows(entmax_newton.WORTH_COMPILING // 64 + 1, 64)
    torch.testing.assert_close(entmax15(z), package.entmax15(z, dim=-1), atol=1e-6, rtol=0)
    entmax_newton.compiled.cache_clear()


def test_kernels_do_not_share_their_compiled_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps eight compiled forms of a code object, and runs what shares it uncompiled from then on."""
    codes = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: codes.append(function.__code__))
    for constant in (None, 1.5, 2.0):
        entmax_newton.compiled.__wrapped__(entmax_newton.solve, constant)
        entmax_newton.compiled.__wrapped__(entmax_newton.jacobian_product, constant)
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
        assert torch.autograd.gradgradcheck(normalize, (z,), atol=1e-6)

    def test_no_keys_and_no_queries(self, normalize) -> None:
        for shape in ((0, 4), (3, 0), (2, 0, 3), (0, 0)):
            z = torch.zeros(shape, requires_grad=True)
            normalize(z).sum().backward()
            assert z.grad.shape == shape

    def test_a_trace_is_right_for_other_scores(self, normalize) -> None:
        """Easy rows are traced; flat, steep, long and empty rows come later."""
        traced = torch.jit.trace(normalize, (rows(6, 8),), check_trace=False)
        hard = rows(6, 3000)
        hard[0], hard[1], hard[2] = -math.inf, hard[1] * 1e-4, hard[2] * 1e3
        hard[3, 5:] = -math.inf
        torch.testing.assert_close(traced(hard), normalize(hard), atol=1e-6, rtol=1e-4)
        z = rows(4, 7).requires_grad_()
        expected = torch.autograd.grad(normalize(z)[:, 0].sum(), z)[0]
        torch.testing.assert_close(torch.autograd.grad(traced(z)[:, 0].sum(), z)[0], expected, atol=1e-6, rtol=1e-4)

    def test_a_shift_changes_nothing(self, normalize) -> None:
        z = rows(10, 20, dtype=torch.float64)
        torch.testing.assert_close(normalize(z), normalize(z + 123.0))


def test_normalizer_names_its_range() -> None:
    with pytest.raises(ValueError, match="between 1"):
        Normalizer(2.5)
    assert not Normalizer(1.0).sparse
    assert Normalizer(1.5).sparse


# ---- α for each head, and its gradient ----


def implicit(z: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """α-entmax by bisection, then one Newton step that autograd sees: exact value, exact derivatives in z and α."""
    power, x = 1 / (alpha - 1), (alpha - 1) * z
    with torch.no_grad():
        low, high = x.amax(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
        for _ in range(200):
            middle = (low + high) / 2
            enough = ((x - middle).clamp_min(0) ** power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    support = (x > low).detach()
    excess = torch.where(support, x - low, 1.0)
    value = (torch.where(support, excess**power, 0.0)).sum(-1, keepdim=True) - 1
    slope = (power * torch.where(support, excess ** (power - 1), 0.0)).sum(-1, keepdim=True)
    threshold = low + value / slope.detach()
    return torch.where(support, torch.where(support, x - threshold, 1.0) ** power, 0.0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_alpha_per_head_and_its_gradient_are_exact(scale: float) -> None:
    z = rows(2, 5, 4, 50, scale=scale, dtype=torch.float64)
    alpha = torch.tensor([1.05, 1.3, 1.5, 1.7, 1.99], dtype=torch.float64)
    weights = rows(2, 5, 4, 50, seed=1, dtype=torch.float64)
    found = {}
    for name, normalize in {
        "ours": lambda z, alpha: PerHead(alpha)(z),
        "reference": lambda z, alpha: implicit(z, alpha[:, None, None]),
    }.items():
        leaves = z.clone().requires_grad_(), alpha.clone().requires_grad_()
        p = normalize(*leaves)
        found[name] = (p.detach(), *torch.autograd.grad((p * weights).sum(), leaves))
    for ours, reference in zip(found["ours"], found["reference"], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-8, rtol=1e-6)
    for head, one in enumerate(alpha.tolist()):
        torch.testing.assert_close(found["ours"][0][:, head], entmax(z[:, head], one), atol=1e-12, rtol=0)


def test_second_derivatives_in_scores_and_alpha() -> None:
    alpha = torch.tensor([[1.2], [1.5], [1.9], [2.0]], dtype=torch.float64, requires_grad=True)
    z = rows(4, 6, dtype=torch.float64)
    z[0, 2] = z[3, 1:] = -math.inf
    z.requires_grad_()
    (by_alpha,) = torch.autograd.grad(entmax(z, alpha)[:3, 0].sum(), alpha, create_graph=True)
    mixed, twice = torch.autograd.grad(by_alpha.sum(), (z, alpha))
    step = 1e-5
    for i in range(3):
        with torch.no_grad():
            move = torch.zeros_like(alpha)
            move[i] = step
        up, middle, down = (entmax(z.detach(), alpha.detach() + sign * move)[i, 0] for sign in (1, 0, -1))
        torch.testing.assert_close(twice[i, 0], (up - 2 * middle + down) / step**2, atol=2e-4, rtol=1e-3)
    assert torch.isfinite(mixed).all()


def test_gradient_of_alpha_by_finite_differences() -> None:
    z = rows(2, 3, 6, scale=1.0, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor([1.2, 1.5], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, alpha: PerHead(alpha)(z), (z, alpha), atol=1e-6)


def test_alpha_per_head_in_float32_with_masked_and_empty_rows() -> None:
    z = rows(2, 3, 40, 90)
    z[:, :, :, 60:] = -math.inf
    z[0, 1, 3] = -math.inf
    alpha = torch.tensor([1.1, 1.5, 2.0], requires_grad=True)
    leaf = z.clone().requires_grad_()
    p = PerHead(alpha)(leaf)
    (p * torch.linspace(-1, 1, 90)).sum().backward()
    assert (p[..., 60:] == 0).all()
    assert (p[0, 1, 3] == 0).all()
    assert torch.isfinite(alpha.grad).all()
    assert torch.isfinite(leaf.grad).all()
    keep = torch.ones(2, 3, 40, dtype=torch.bool)
    keep[0, 1, 3] = False
    expected = implicit(z[..., :60].double(), alpha.detach().double()[:, None, None])
    torch.testing.assert_close(p[..., :60][keep].double(), expected[keep], atol=1e-6, rtol=0)


def test_alpha_per_head_names_what_it_needs() -> None:
    with pytest.raises(ValueError, match="must be"):
        PerHead(torch.tensor([1.5, 1.5]))(rows(3, 4, 4))
    with pytest.raises(ValueError, match="1 < alpha"):
        PerHead(torch.tensor([1.0]))(rows(1, 4, 4))


# ---- exactness ----


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_hard_rows_are_exact(alpha: float) -> None:
    """Flat rows, two levels, one winner, a long tail, masked: float32 to 1e-6 of bisection in float64."""
    generator = torch.Generator().manual_seed(0)
    n = 3000
    hard = torch.stack(
        [
            torch.zeros(n),
            (torch.rand(n, generator=generator) < 0.1).float(),
            torch.eye(1, n)[0] * 50,
            torch.empty(n).exponential_(generator=generator),
            0.02 * torch.randn(n, generator=generator),
            torch.linspace(-1, 1, n),
            torch.randn(n, generator=generator).masked_fill(torch.arange(n) % 2 == 0, -math.inf),
            torch.full((n,), 1e4).index_fill(0, torch.arange(7), 1e4 + 1),
        ]
    )
    expected = package.entmax_bisect(hard.double(), alpha=alpha, dim=-1, n_iter=100)
    torch.testing.assert_close(entmax(hard, alpha).double(), expected, atol=1e-6, rtol=0)


def test_softmax_of_scores_with_nan_stays_nan() -> None:
    """What makes an empty row zero must not hide an error."""
    z = rows(2, 4)
    z[0, 2] = math.nan
    assert softmax(z)[0].isnan().all()
    torch.testing.assert_close(softmax(z)[1], torch.softmax(z[1], -1))


def looks(z: torch.Tensor, alpha: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often `entmax` runs its kernel for these rows."""
    calls = []
    original = normalizers.kernel

    def counting(function, alpha):
        run = original(function, alpha)
        return lambda *inputs, together: calls.append(1) or run(*inputs, together=together)

    monkeypatch.setattr(normalizers, "kernel", counting)
    entmax(z, alpha)
    return len(calls)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_one_look_is_the_rule(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    z = rows(100, 2000, scale=1.0)
    z[3] = -math.inf
    z[4] = 0.0
    z[5, 1:] = -math.inf
    assert looks(z, alpha, monkeypatch) == 1


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("worth", [1, 1 << 40])
def test_rectangles_together_are_rectangles_one_by_one(
    alpha: float, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled or not, with gradients; a single row and an empty one are among them."""
    monkeypatch.setattr(entmax_newton, "WORTH_COMPILING", worth)
    normalizer = normalizers.Normalizer(alpha)
    several = [rows(count, width).requires_grad_() for count, width in ((40, 16), (1, 16), (7, 80))]
    with torch.no_grad():
        several[2][3] = -math.inf
    weights = [torch.randn(z.shape) for z in several]
    together = normalizer.each(several)
    found = torch.autograd.grad(sum((p * w).sum() for p, w in zip(together, weights, strict=True)), several)
    monkeypatch.setattr(entmax_newton, "WORTH_COMPILING", 1 << 40)
    for z, w, p, gradient in zip(several, weights, together, found, strict=True):
        alone = normalizer(z)
        torch.testing.assert_close(p, alone, atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad((alone * w).sum(), z)[0], atol=1e-5, rtol=0)


def test_rows_that_need_more_than_one_look_sum_to_one() -> None:
    """Sparsemax of 16,384 flat scores is not done after the first eight steps."""
    p = sparsemax(0.1 * rows(3, 16_384, scale=1.0))
    torch.testing.assert_close(p.sum(-1), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_one_newton_step_is_enough_where_all_scores_are_equal(alpha: float) -> None:
    """There the function whose root is looked for is a line, and a step from the left end meets its root."""
    excess = torch.ones(1, 8, dtype=torch.float64)  # x − τ, where x = 0 and τ = −1
    power = 1 / (alpha - 1)
    total, slope = excess.pow(power).sum(-1), excess.pow(power - 1).sum(-1)
    step = entmax_newton.newton_step(total, slope, alpha)
    torch.testing.assert_close((1.0 - step).pow(power) * 8, torch.ones(1, dtype=torch.float64))
