"""Time and memory of LSG attention, beside the published layer's method and dense attention, on the same tensors.

    python benchmarks/lsg.py                        # 1,024 to 16,384 tokens, two threads
    python benchmarks/lsg.py --lengths 4096 --repeats 11 --sparsity_types norm pooling

One process for each figure of memory; the variants take turns in one process for time. `published` is the method of the
published layer in few words: pad, unfold into overlapping blocks, lay global, sparse and local keys side by side for all
heads, softmax of all scores, product. Blocks of 128, sparsity factor 2, one global token, 12 heads of 64 dimensions.
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefinder.executors.local_sparse_global.attention import LSGAttention

HEADS, SIZE, BLOCK, FACTOR = 12, 64, 128, 2


def published(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """The published method for `norm`, `(B, H, 1 + N, D)`, N whole blocks of real tokens: everything at once."""
    batch, heads, _, size = q.shape
    lowest = torch.finfo(q.dtype).min
    mask = (~valid).to(q.dtype)[:, None, None] * lowest
    first = torch.softmax(q[:, :, :1] @ k.transpose(-1, -2) / math.sqrt(size) + mask, dim=-1) @ v
    (front_k, k), (front_v, v), (front_m, mask) = (
        (x[..., :1, :], x[..., 1:, :]) for x in (k, v, mask.transpose(-1, -2))
    )
    q = q[:, :, 1:]
    tokens, kept = q.shape[2], BLOCK // FACTOR
    blocks = tokens // BLOCK
    mask, front_m = mask.expand(-1, heads, -1, -1), front_m.expand(-1, heads, -1, -1)
    norms = (k.norm(dim=-1, keepdim=True) * (mask == 0)).reshape(batch, heads, blocks, BLOCK, 1)
    chosen = norms.argsort(dim=-2)[..., -kept:, :] + (torch.arange(blocks) * BLOCK).view(1, 1, -1, 1, 1)
    chosen = chosen.reshape(batch, heads, -1, 1)
    sparse = [x.gather(2, chosen.expand(-1, -1, -1, x.shape[-1])) for x in (k, v, mask)]

    def windows(x: Tensor, side: int, size: int, step: int, fill: float) -> Tensor:
        return F.pad(x, (0, 0, side, side), value=fill).unfold(2, size, step).transpose(-1, -2)

    def side_by_side(front: Tensor, sparse: Tensor, local: Tensor, fill: float = 0.0) -> Tensor:
        width = 6 * BLOCK
        around = windows(sparse, (width - kept) // 2, width, kept, fill)
        edge = (width - 3 * kept) // 2
        picked = [around[..., edge - BLOCK : edge, :], around[..., -edge : BLOCK - edge, :]]
        front = front.unsqueeze(2).expand(-1, -1, blocks, -1, -1)
        return torch.cat([front, *picked, windows(local, BLOCK, 3 * BLOCK, BLOCK, fill)], dim=-2)

    keys, values = side_by_side(front_k, sparse[0], k), side_by_side(front_v, sparse[1], v)
    hidden = side_by_side(front_m, sparse[2], mask, lowest).transpose(-1, -2)
    scores = q.reshape(batch, heads, blocks, BLOCK, size) @ keys.transpose(-1, -2) / math.sqrt(size) + hidden
    output = (torch.softmax(scores, dim=-1) @ values).reshape(batch, heads, tokens, size)
    return torch.cat([first, output], dim=2)


def dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """torch's dense attention, without a mask."""
    return F.scaled_dot_product_attention(q, k, v)


def ours(sparsity_type: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """LSG attention of this package."""
    return LSGAttention(sparsity_type, BLOCK, BLOCK, FACTOR, num_global_tokens=1)


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One example: a global token and `tokens` others."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, HEADS, tokens + 1, SIZE, generator=generator) for _ in range(3))
    return q, k, v, torch.ones(1, tokens + 1, dtype=torch.bool)


def variants(sparsity_types: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Name → attention."""
    return {"published": published, "dense": dense, **{f"ours {name}": ours(name) for name in sparsity_types}}


def times(
    functions: dict[str, Callable], inputs: tuple[Tensor, ...], repeats: int, backward: bool
) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor, of `repeats` rounds in which the functions take turns, after one uncounted."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            given = [x.detach().requires_grad_(backward) if x.is_floating_point() else x for x in inputs]
            begin = time.perf_counter(), time.process_time()
            output = function(*given)
            if backward:
                output.sum().backward()
            if turn:
                found[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return found


def peak_memory(name: str, tokens: int, threads: int, sparsity_types: list[str]) -> float:
    """Megabytes that one call needs beside its inputs, in a fresh process."""
    command = [sys.executable, __file__, "--memory_of", name, "--lengths", str(tokens), "--threads", str(threads)]
    done = subprocess.run([*command, "--sparsity_types", *sparsity_types], capture_output=True, text=True, check=True)
    return float(done.stdout)


def watched(function: Callable[[], object]) -> float:
    """Megabytes by which the resident memory of this process rises while `function` runs, looked at each half millisecond."""
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = function()
    done.set()
    watcher.join()
    peak = max(peak, _resident())
    del kept
    return (peak - before) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--sparsity_types", nargs="+", default=["norm"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    functions = variants(given.sparsity_types)
    if given.memory_of:
        inputs = tensors(given.lengths[0])
        small = tuple(x[:, :, : 3 * BLOCK + 1] if x.ndim == 4 else x[:, : 3 * BLOCK + 1] for x in inputs)
        with torch.no_grad():
            functions[given.memory_of](*small)  # what a first call loads is not its memory
            print(watched(lambda: functions[given.memory_of](*inputs)))
        return
    print(
        f"torch {torch.__version__}, {given.threads} threads, {HEADS} heads of {SIZE}, blocks of {BLOCK}, factor {FACTOR}"
    )
    print(
        f"{'tokens':>7} {'attention':<18} {'median s':>9} {'min–max s':>17} {'CPU s':>7} {'peak MB':>8} {'× published':>12}"
    )
    for tokens in given.lengths:
        inputs = tensors(tokens)
        if "ours norm" in functions:
            with torch.no_grad():
                torch.testing.assert_close(functions["ours norm"](*inputs), published(*inputs), atol=1e-5, rtol=1e-4)
        with torch.set_grad_enabled(given.backward):
            found = times(functions, inputs, given.repeats, given.backward)
        clock = {name: [seconds for seconds, _ in both] for name, both in found.items()}
        reference = statistics.median(clock["published"])
        for name, seconds in clock.items():
            median, spread = statistics.median(seconds), f"{min(seconds):.3f}–{max(seconds):.3f}"
            processor = statistics.median(cpu for _, cpu in found[name])
            memory = peak_memory(name, tokens, given.threads, given.sparsity_types)
            print(
                f"{tokens:>7} {name:<18} {median:>9.3f} {spread:>17} {processor:>7.3f} {memory:>8.0f} "
                f"{reference / median:>11.1f}×",
                flush=True,
            )


if __name__ == "__main__":
    main()
