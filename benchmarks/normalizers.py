"""α-entmax and sparsemax against the ``entmax`` package, and entmax against softmax inside dense attention.

    python benchmarks/normalizers.py                    # rows of 512 and of 2,048; forward, forward and backward
    python benchmarks/normalizers.py --rows 2048 --rounds 15

Rows are normal noise, as many as 12 heads of 512 queries have. Dense attention is ``normalizer(q kᵀ / √64) v`` for 12 heads of
64 over as many tokens as a row is long, the normalizer being all that differs. How it is measured is told in `measuring.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import entmax as package
import torch
from measuring import machine, measure
from torch import Tensor

from sparsefinder.numerics.normalizers import Normalizer, entmax, entmax15, softmax, sparsemax

HEADS, SIZE, ROWS = 12, 64, 12 * 512
Function = Callable[[Tensor], Tensor]

ENTMAX, SPARSEMAX, SOFTMAX = "entmax15 of the package", "sparsemax of the package", "torch.softmax"
FUNCTIONS: dict[str, tuple[Function, str]] = {  # name → function, and the name of what it is compared with
    ENTMAX: (lambda z: package.entmax15(z, dim=-1), ENTMAX),
    "entmax15": (entmax15, ENTMAX),
    "entmax, α = 1.3": (lambda z: entmax(z, 1.3), ENTMAX),
    SPARSEMAX: (lambda z: package.sparsemax(z, dim=-1), SPARSEMAX),
    "sparsemax": (sparsemax, SPARSEMAX),
    SOFTMAX: (lambda z: torch.softmax(z, dim=-1), SOFTMAX),
    "softmax with safe rows": (softmax, SOFTMAX),
}
DENSE: dict[str, tuple[Function, str]] = {
    "softmax": (Normalizer(1.0), "softmax"),
    "entmax15": (Normalizer(1.5), "softmax"),
    "sparsemax": (Normalizer(2.0), "softmax"),
    ENTMAX: (lambda z: package.entmax15(z, dim=-1), "softmax"),
}


def table(title: str, calls: dict[str, Callable[[], object]], against: dict[str, str], rounds: int) -> None:
    """Measure and print."""
    results = measure(calls, rounds)
    print(f"\n### {title}, {rounds} rounds\n")
    print("| function | median ms | min – max | times as fast | as | peak MB |")
    print("|---|---|---|---|---|---|")
    for name, measured in results.items():
        ratio = measured.faster_than(results[against[name]])
        print(f"| {name} | {measured.times} | {ratio:.2f} | {against[name]} | {measured.megabytes} |", flush=True)


def normalizing(length: int, backward: bool) -> dict[str, Callable[[], object]]:
    """Every function on the same rows."""
    torch.manual_seed(length)
    scores = torch.randn(ROWS, length, requires_grad=backward)
    gradient = torch.randn(ROWS, length)
    if not backward:
        return {name: lambda f=f: f(scores) for name, (f, _) in FUNCTIONS.items()}  # type: ignore[misc]
    return {name: lambda f=f: torch.autograd.grad(f(scores), scores, gradient) for name, (f, _) in FUNCTIONS.items()}  # type: ignore[misc]


def attending(tokens: int, backward: bool) -> dict[str, Callable[[], object]]:
    """Dense attention with every normalizer."""
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE, requires_grad=backward) for _ in range(3))

    def attention(normalizer: Function) -> Tensor:
        return normalizer(q / SIZE**0.5 @ k.transpose(-1, -2)) @ v

    if not backward:
        return {name: lambda f=f: attention(f) for name, (f, _) in DENSE.items()}  # type: ignore[misc]
    return {name: lambda f=f: torch.autograd.grad(attention(f).sum(), (q, k, v)) for name, (f, _) in DENSE.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048], help="lengths of rows")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(machine())
    for length in given.rows:
        for backward in (False, True):
            both = "forward and backward" if backward else "forward"
            with torch.set_grad_enabled(backward):
                compared = {name: other for name, (_, other) in FUNCTIONS.items()}
                table(f"{ROWS:,} rows of {length:,}, {both}", normalizing(length, backward), compared, given.rounds)
                compared = {name: other for name, (_, other) in DENSE.items()}
                title = f"Dense attention over {length:,} tokens, {both}"
                table(title, attending(length, backward), compared, given.rounds)


if __name__ == "__main__":
    main()
