"""How many passes over a row each way to find entmax's threshold needs: counts, not times, so any machine will do.

    python benchmarks/entmax_steps.py

A pass computes all sums that one step needs. ``Newton`` is on ``Σ (x − τ)₊^p − 1``, ``p-norm`` on ``‖(x − τ)₊‖_p − 1`` (what
`sparsefinder.numerics.entmax_newton` does), ``Halley`` on the former with bisection where it leaves its bracket, as in
AdaSplash; all from the row's maximum, τ = −1. A histogram of ``b`` bins (AdaSplash-2) puts every score into a bin of [−1, 0]
and starts from the largest bin edge that is sure to lie left of the threshold; that is one pass more, with a scatter instead
of a sum, which is not counted. A row is done when its next Newton step is below 2.4e-7, twice float32's rounding. Each entry
is the mean over 256 rows, and the slowest row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, STILL, LIMIT = 256, 2.4e-7, 200
Step = Callable[[Tensor, Tensor, Tensor, float], Tensor]
KINDS: dict[str, Callable[..., Tensor]] = {
    "N(0, 1)": lambda *shape: torch.randn(*shape),
    "N(0, 0.1²)": lambda *shape: 0.1 * torch.randn(*shape),
    "N(0, 3²)": lambda *shape: 3 * torch.randn(*shape),
    "exponential": lambda *shape: torch.empty(*shape).exponential_(),
    "all equal": lambda *shape: torch.zeros(*shape),
}


def sums(x: Tensor, threshold: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ e^p``, ``Σ e^{p−1}``, ``Σ e^{p−2}`` over the support, ``e = x − τ``: each ``(M, 1)``."""
    excess = (x - threshold).clamp_min(0.0)
    terms = (torch.where(excess > 0, excess ** (power - less), 0.0) for less in range(3))
    first, second, third = (term.sum(-1, keepdim=True) for term in terms)
    return first, second, third


def newton(total: Tensor, slope: Tensor, _: Tensor, power: float) -> Tensor:
    return (total - 1) / (power * slope)


def p_norm(total: Tensor, slope: Tensor, _: Tensor, power: float) -> Tensor:
    return (total - total ** (1 - 1 / power)) / slope


def halley(total: Tensor, slope: Tensor, curve: Tensor, power: float) -> Tensor:
    f, f1, f2 = total - 1, -power * slope, power * (power - 1) * curve
    return -2 * f * f1 / (2 * f1 * f1 - f * f2)


def passes(x: Tensor, start: Tensor, step: Step, power: float) -> Tensor:
    """Passes of each row, ``(M, 1)``."""
    threshold, taken = start.clone(), torch.zeros_like(start)
    low, high = torch.full_like(start, -1.0), torch.zeros_like(start)
    moving = torch.ones_like(start, dtype=torch.bool)
    for _ in range(LIMIT):
        found = sums(x, threshold, power)
        moving &= newton(*found, power).abs() > STILL
        if not moving.any():
            break
        low, high = torch.where(found[0] >= 1, threshold, low), torch.where(found[0] < 1, threshold, high)
        to = threshold + step(*found, power)
        if step is halley:  # it alone can leave the bracket
            to = torch.where((to > low) & (to < high), to, (low + high) / 2)
        threshold = torch.where(moving, to, threshold)
        taken += moving
    return taken


def from_histogram(x: Tensor, bins: int, power: float) -> Tensor:
    """A threshold that is not above the root, from the number of scores in each bin: ``(M, 1)``."""
    edges = torch.arange(bins, dtype=x.dtype) / bins - 1
    counts = x.new_zeros(len(x), bins).scatter_add_(1, ((x + 1) * bins).long().clamp(0, bins - 1), (x > -1).to(x.dtype))
    at_least_one = counts @ (edges[None, :] - edges[:, None]).clamp_min(0).T ** power >= 1
    return torch.where(at_least_one, edges, -1.0).amax(-1, keepdim=True)


def main() -> None:
    names = ("Newton", "p-norm", "Halley", "16 bins, Newton", "64 bins, Newton", "16 bins, p-norm")
    print(f"\n| α | scores | row | {' | '.join(names)} |\n|{'---|' * (len(names) + 3)}")
    for alpha in (1.5, 1.25, 2.0):
        power = 1 / (alpha - 1)
        for kind, make in KINDS.items():
            for length in (512, 2048, 16384):
                torch.manual_seed(length)
                scores = make(ROWS, length).double()
                x = (scores - scores.amax(-1, keepdim=True)) * (alpha - 1)
                warm = x.new_full((ROWS, 1), -1.0)
                coarse, fine = from_histogram(x, 16, power), from_histogram(x, 64, power)
                ways: tuple[tuple[Tensor, Step], ...] = (
                    (warm, newton), (warm, p_norm), (warm, halley), (coarse, newton), (fine, newton), (coarse, p_norm)
                )  # fmt: skip
                found = (passes(x, start, step, power) for start, step in ways)
                cells = " | ".join(f"{n.mean():.1f}, {int(n.max())}" for n in found)
                print(f"| {alpha} | {kind} | {length:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
