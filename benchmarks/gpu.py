"""Block-sparse entmax attention on a GPU against SDPA (FlashAttention), FlexAttention on the same graph, and AdaSplash.

    python benchmarks/gpu.py                            # 4,096 to 32,768 tokens; needs CUDA and triton
    python benchmarks/gpu.py --tokens 8192 --block 128

Noise of the sizes of `bucketed.py`'s layer, in bfloat16, and two of its patterns, learned from it: what a graph costs, not what
it finds. FlexAttention runs softmax on the same predicted graph, in the order of the text (it cannot permute, so it computes
every block that holds one edge). AdaSplash (version 1, bidirectional, α = 1.5) runs dense entmax and is skipped where it is not
installed; our own exact dense entmax in Triton is beside it. The predictor is inside our times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bucketed import HEADS, SIZE, routed
from measuring import Measured, measure
from recorded import learned
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.graphs import QK, HasLayout, Layout
from sparsefinder.storage.samples import Samples

BASELINE = "SDPA softmax"


@torch.no_grad()
def patterns(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Routed patterns, learned from these queries and keys ``(1, H, N, D)``."""
    with torch.device("cpu"):
        found = learned(Samples(*([x.float().cpu()] for x in (q, k))))
    return {
        "routed, margin 0.2": routed(found, rule="margin", level=0.2),
        "routed, 5% of the keys": routed(found, rule="budget", level=0.05),
    }


def flex(layout: Layout, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention on the pairs of a layout."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert layout.buckets is not None
    assert layout.is_global is not None
    q_ids, k_ids, is_global, reach = layout.buckets.q_ids, layout.buckets.k_ids, layout.is_global, layout.window // 2

    def edge(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shared = ((i - j).abs() <= reach) | is_global[b, i] | is_global[b, j]
        for q_slot in range(q_ids.shape[-1]):
            for k_slot in range(k_ids.shape[-1]):
                shared = shared | (q_ids[b, h, i, q_slot] == k_ids[b, h, j, k_slot])
        return shared

    mask = create_block_mask(edge, 1, HEADS, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def adasplash(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """Dense entmax by AdaSplash, None where that is not installed."""
    try:
        from adasplash import adasplash_v1
    except ImportError:
        return None
    return lambda: adasplash_v1(q, k, v, alpha=1.5, is_causal=False)


def peak(call: Callable[[], object]) -> float:
    """Megabytes that a call adds at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(tokens: int, block: int, rounds: int, backward: bool) -> None:
    """One table: every attention at one length."""
    torch.manual_seed(tokens)
    q, k, v = (
        torch.randn(1, HEADS, tokens, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for _ in range(3)
    )
    valid = torch.ones(1, tokens, dtype=torch.bool, device="cuda")
    attentions: dict[str, Callable[[], Tensor]] = {BASELINE: lambda: F.scaled_dot_product_attention(q, k, v)}
    exact = Dense(executor="triton")
    attentions["Dense entmax, exact"] = lambda: exact(q, k, v, valid)
    pairs: dict[str, float] = {BASELINE: 1.0, "Dense entmax, exact": 1.0}
    dense = adasplash(q, k, v)
    if dense is not None:
        attentions["AdaSplash, dense entmax"] = dense
    for name, pattern in patterns(q, k).items():
        sparse, qk = Bucketed(pattern, executor="triton", block=block), QK(q, k, valid)
        assert isinstance(pattern, HasLayout)
        on_graph = flex(pattern.layout(qk, 0), tokens)
        attentions[f"FlexAttention softmax, {name}"] = lambda on_graph=on_graph: on_graph(q, k, v)  # type: ignore[misc]
        attentions[name] = lambda sparse=sparse: sparse(q, k, v, valid, 0)  # type: ignore[misc]
        pairs[name] = sparse.computed_pairs(qk, 0).double().mean().item() / tokens**2

    def call_of(attention: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            out = attention()
            if backward:
                torch.autograd.grad(out.sum(), (q, k, v))
            torch.cuda.synchronize()

        return call

    calls: dict[str, Callable[[], object]] = {name: call_of(attention) for name, attention in attentions.items()}
    results: dict[str, Measured] = measure(calls, rounds)
    print(f"\n### {tokens:,} tokens, {'forward and backward' if backward else 'forward'}, {rounds} rounds\n")
    print("| attention | median ms | min – max | SDPA ÷ this | peak MB | computed density |")
    print("|---|---|---|---|---|---|")
    for name, measured in results.items():
        density = f"{pairs[name]:.3f}" if name in pairs else ""
        ratio = measured.faster_than(results[BASELINE])
        print(f"| {name} | {measured.times} | {ratio:.2f} | {peak(calls[name]):,.0f} | {density} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a GPU with CUDA, and torch sees none: benchmarks/bucketed.py measures on the CPU"
        )
    torch.set_default_device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for tokens in given.tokens:
        for backward in (False, True):
            with torch.set_grad_enabled(backward):
                compare(tokens, given.block, given.rounds, backward)


if __name__ == "__main__":
    main()
