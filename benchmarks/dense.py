"""Exact dense entmax attention against dense softmax (SDPA), side by side in one run.

    python benchmarks/dense.py                          # forward to 16,384 tokens, and backward to 4,096, and a window
    python benchmarks/dense.py --tokens 512 --both 512 --window 1024
    python benchmarks/dense.py --run runs/tiny          # and on what a model was recorded with by stage=extract

12 heads of 64, one text, float32, α = 1.5, on normal noise and on noise whose scores are 2.5 times as large: the latter has as
few keys in its support as trained models have. With ``--run`` on the recorded queries and keys too, with the heads and the head
size that the model has (32 in the tiny experiment, and 12 heads at most): the samples' tokens side by side, cut at each length,
since a text of the model is shorter than most of these. Values are noise. How much the filter lets pass depends on the scores,
so every time stands beside the keys in the support of a query.

Errors are largest differences to the `entmax` package in float64, forward on 64 queries of every head, of gradients on the first
head alone. A window is compared with SDPA under a mask of that window, since torch has no other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import entmax
import torch
import torch.nn.functional as F
from measuring import Measured, machine, measure
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.executors.support_lists import support
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.pairs import band
from sparsefinder.patterns.window import Window
from sparsefinder.storage.samples import Samples, load_samples

HEADS, SIZE = 12, 64
WINDOW = 129  # 64 keys on each side and the query's own, a layer of ModernBERT
PEAKED = 2.5
ROWS = 64  # queries of each head whose output is compared with the package's
BASELINE = "SDPA softmax"

Vectors = tuple[Tensor, Tensor, Tensor]


def noise(tokens: int, peaked: float) -> Vectors:
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE) for _ in range(3))
    return q * peaked, k, v


def recorded(samples: Samples, tokens: int) -> Vectors | None:
    """The last layers' heads; None where all samples together are shorter."""
    if sum(samples.lengths) < tokens:
        return None
    wanted, parts = tokens, []
    for index in range(len(samples)):
        layers = list(samples.layers(index))
        parts.append([torch.cat([getattr(qk, side) for qk in layers], dim=1)[:, -HEADS:] for side in ("q", "k")])
        wanted -= layers[0].q.shape[2]
        if wanted <= 0:
            break
    q, k = (torch.cat(side, dim=2)[:, :, :tokens].contiguous() for side in zip(*parts, strict=True))
    return q, k, torch.randn(q.shape, generator=torch.Generator().manual_seed(tokens))


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """By the package."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    out: Tensor = entmax.entmax15(scores if seen is None else scores.masked_fill(~seen, -math.inf), dim=-1) @ v
    return out


def error(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, window: int) -> float:
    """Of the output."""
    some = torch.linspace(0, q.shape[2] - 1, ROWS).long()
    seen = band(q.shape[2], window)[some] if window else None
    heads = zip(*(x[0].double() for x in (q[:, :, some], k, v)), strict=True)
    expected = torch.stack([reference(*head, seen) for head in heads])
    return (attention(q, k, v)[0, :, some] - expected).abs().max().item()


def gradient_error(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of the gradients of a sum with random weights."""
    first = [x[:, :1].detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in first]
    weights = torch.randn(first[2].shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((attention(*first) * weights).sum(), first)
    theirs = torch.autograd.grad((reference(*exact) * weights).sum(), exact)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def compare(title: str, vectors: Vectors, rounds: int, backward: bool = False, window: int = 0) -> None:
    """One table."""
    q, k, v = (x.requires_grad_(backward) for x in vectors)
    tokens = q.shape[2]
    valid, mask = torch.ones(1, tokens, dtype=torch.bool), band(tokens, window) if window else None
    entmaxes: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "exact entmax": lambda q, k, v: Dense(window=window)(q, k, v, valid)
    }
    attentions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        BASELINE: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)
    }
    if window:
        softmax, bucketed = Dense(Normalizer(1.0), window=window), Bucketed(Window(window))
        attentions["banded softmax"] = lambda q, k, v: softmax(q, k, v, valid)
        entmaxes["banded entmax, as a pattern"] = lambda q, k, v: bucketed(q, k, v, valid, 0)

    def call_of(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            out = attention(q, k, v)
            return torch.autograd.grad(out.sum(), (q, k, v)) if backward else out

        return call

    with torch.set_grad_enabled(backward):
        results = measure({name: call_of(each) for name, each in {**attentions, **entmaxes}.items()}, rounds)
    errors = {
        name: gradient_error(each, q, k, v) if backward else error(each, q, k, v, window)
        for name, each in entmaxes.items()
    }
    keys = support(QK(q.detach(), k.detach(), valid), 1.5).counts.double().mean().item()
    heads = f"{q.shape[1]} heads of {q.shape[3]}"
    what = f"{'forward and backward' if backward else 'forward'}{f', a window of {window}' if window else ''}"
    print(f"\n### Exact entmax, {title}: {tokens:,} tokens, {what}, {rounds} rounds\n")
    print(f"{heads}, {keys:.1f} keys in the support of a query{' (without the window)' if window else ''}\n")
    print("| attention | median ms | min – max | SDPA ÷ this | peak MB | error |")
    print("|---|---|---|---|---|---|")
    for name, measured in results.items():
        print(row(name, measured, results[BASELINE], errors.get(name)), flush=True)


def row(name: str, measured: Measured, baseline: Measured, off: float | None) -> str:
    last = "" if off is None else f"{off:.1e}"
    return f"| {name} | {measured.times} | {measured.faster_than(baseline):.2f} | {measured.megabytes} | {last} |"


def everything(tokens: int, samples: Samples | None) -> Iterator[tuple[str, Vectors]]:
    """What is attended with at one length, and its name."""
    yield "noise", noise(tokens, 1.0)
    yield f"noise {PEAKED} times as peaked", noise(tokens, PEAKED)
    if samples is not None and (found := recorded(samples, tokens)) is not None:
        yield "recorded", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 16384], help="forward")
    parser.add_argument("--both", type=int, nargs="*", default=[512, 2048, 4096], help="forward and backward")
    parser.add_argument("--window", type=int, nargs="*", default=[4096, 8192], help=f"a window of {WINDOW}, forward")
    parser.add_argument("--run", type=Path, help="a run directory with recorded queries and keys")
    parser.add_argument(
        "--rounds", type=int, default=9, help="rounds up to 4,096 tokens; a third as many, at least 3, beyond"
    )
    given = parser.parse_args()
    samples = None if given.run is None else load_samples(given.run / "qk_validation_enc-attn.pt")
    print(machine())

    def rounds(tokens: int) -> int:
        return int(given.rounds) if tokens <= 4096 else max(3, given.rounds // 3)

    for tokens in given.tokens:
        for title, vectors in everything(tokens, samples):
            compare(title, vectors, rounds(tokens))
    for tokens in given.both:
        for title, vectors in everything(tokens, samples):
            compare(title, vectors, rounds(tokens), backward=True)
    for tokens in given.window:
        compare(f"noise {PEAKED} times as peaked", noise(tokens, PEAKED), rounds(tokens), window=WINDOW)


if __name__ == "__main__":
    main()
