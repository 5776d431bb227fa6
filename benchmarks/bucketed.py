"""Bucketed Sparsefinder attention against dense softmax (SDPA) and dense entmax, side by side in one run.

    python benchmarks/bucketed.py                       # 2,048 to 32,768 tokens, forward; forward and backward up to 4,096
    python benchmarks/bucketed.py --tokens 4096 32768 --backward

12 heads of 64, one text, window 11, one global token, buckets of about 64 tokens, float32. Queries, keys and values are normal
noise, projected to 4 numbers at random; the centroids of k-means are N / 64 of the projected tokens, so its clusters are
uneven. Routed queries are compared, by 32 numbers, with as many centroids of the keys. The predictor (projection and buckets)
is inside every bucketed time, and is also timed alone.

Bucketed attention is in C++ (its executor ``native``); routed queries also with the executor ``blocks``, in torch.

How it is measured is told in `measuring.py`. Dense entmax is exact (`dense.py` measures it alone).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import Measured, machine, measure
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.graphs import QK, Pattern
from sparsefinder.patterns.combine import Projected, Union
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.predictors.centroids import Centroids
from sparsefinder.predictors.projections import LayerProjections, Linear, Projections

HEADS, SIZE, BUCKET, WINDOW, RANK = 12, 64, 64, 11, 32
BASELINE = "SDPA softmax"
IN_BLOCKS = f"routed, {BUCKET} keys"  # the one that is also run by torch's operations


@torch.no_grad()
def patterns(q: Tensor, k: Tensor, valid: Tensor) -> dict[str, Pattern]:
    """The predictors, each united with the window and the global token."""
    torch.manual_seed(0)
    tokens = q.shape[2]
    surroundings = (Window(WINDOW), GlobalTokens(1))
    found: dict[str, Pattern] = {}
    for coordinates in (1, 4):
        linear = Linear(HEADS, SIZE, coordinates)
        projections = Projections([LayerProjections(linear, linear)])
        quantized = Projected(Quantize(bucket_size=BUCKET), projections)
        found[f"quantize, {coordinates} round{'s' * (coordinates > 1)}"] = Union((quantized, *surroundings))
    quarter = Projected(Quantize(bucket_size=BUCKET // 4), projections)
    found[f"quantize, 4 rounds of {BUCKET // 4}"] = Union((quarter, *surroundings))
    projected = projections(QK(q, k, valid), 0)
    some = torch.randperm(tokens)[: tokens // BUCKET]
    centroids = Centroids(
        [torch.where(some[:, None] % 2 == 0, projected.q[0, :, some], projected.k[0, :, some])[:, None]]
    )
    for top in (1, 2):
        kmeans = Projected(KMeans(top, centroids), projections)
        found[f"kmeans, top {top}"] = Union((kmeans, *surroundings))
    linear = Linear(HEADS, SIZE, RANK)
    space = Projections([LayerProjections(linear, Linear(HEADS, SIZE, RANK))])
    key_centroids = Centroids([space(QK(q, k, valid), 0).k[0, :, some][:, None]])
    for keys in (BUCKET, 2 * BUCKET):
        routed = Projected(Routed("budget", keys / tokens, key_centroids=key_centroids), space)
        found[f"routed, {keys} keys"] = Union((routed, *surroundings))
    return found


def report(title: str, results: dict[str, Measured], pairs: dict[str, float]) -> None:
    baseline = results[BASELINE]
    print(f"\n### {title}\n")
    print("| attention | median ms | min – max | SDPA ÷ this | peak MB | pairs per query |")
    print("|---|---|---|---|---|---|")
    for name, measured in results.items():
        each = f"{pairs[name]:,.0f}" if name in pairs else ""
        print(
            f"| {name} | {measured.times} | {measured.faster_than(baseline):.2f} | {measured.megabytes} | {each} |",
            flush=True,
        )


def compare(tokens: int, rounds: int, backward: bool) -> dict[str, Measured]:
    """One table: every variant at one length."""
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE, requires_grad=backward) for _ in range(3))
    valid = torch.ones(1, tokens, dtype=torch.bool)
    attentions: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: F.scaled_dot_product_attention(q, k, v),
        "dense entmax": lambda: Dense()(q, k, v, valid),
    }
    layouts: dict[str, Callable[[], object]] = {}
    pairs = {BASELINE: float(tokens), "dense entmax": float(tokens)}
    predictors = patterns(q, k, valid)
    executed = {name: Bucketed(pattern, executor="native") for name, pattern in predictors.items()}
    executed[f"{IN_BLOCKS}, in torch"] = Bucketed(predictors[IN_BLOCKS], executor="blocks")
    for name, bucketed in executed.items():
        attentions[name] = lambda bucketed=bucketed: bucketed(q, k, v, valid, 0)  # type: ignore[misc]
        pairs[name] = bucketed.computed_pairs(QK(q, k, valid), 0).double().mean().item() / tokens
    for name, pattern in predictors.items():
        layouts[f"{name}: predictor alone"] = lambda pattern=pattern: pattern.layout(QK(q, k, valid), 0)  # type: ignore[misc]

    def with_gradients(attention: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention().sum(), (q, k, v))

    calls = {name: with_gradients(call) if backward else call for name, call in attentions.items()}
    with torch.set_grad_enabled(backward):
        results = measure({**calls, **({} if backward else layouts)}, rounds)
    report(f"{tokens:,} tokens, {'forward and backward' if backward else 'forward'}, {rounds} rounds", results, pairs)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument(
        "--backward", action="store_true", help="forward and backward at every length, and nothing else"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds up to 4,096 tokens; half as many, at least 3, beyond"
    )
    arguments = parser.parse_args()
    print(machine())

    def rounds(tokens: int) -> int:
        return arguments.rounds if tokens <= 4096 else max(3, arguments.rounds // 2)

    if arguments.backward:
        for tokens in arguments.tokens:
            compare(tokens, rounds(tokens), backward=True)
        return
    forward = {tokens: compare(tokens, rounds(tokens), backward=False) for tokens in arguments.tokens}
    for tokens in (n for n in arguments.tokens if n <= 4096):
        compare(tokens, rounds(tokens), backward=True)
    shorter, longer = min((n for n in forward if n >= 4096), default=0), max(forward)
    if shorter and longer > shorter:
        print(f"\n### Growth from {shorter:,} to {longer:,} tokens: exponent of the median time\n")
        for name in (name for name in forward[longer] if name in forward[shorter]):
            ratio = forward[longer][name].median / forward[shorter][name].median
            print(f"- {name}: {math.log(ratio) / math.log(longer / shorter):.2f}")


if __name__ == "__main__":
    main()
