"""Bucketed Sparsefinder attention against dense softmax (SDPA), on what a real model attends with.

    python benchmarks/bucketed.py --model FOLDER --train valid.txt --test test.txt      # some minutes on two cores
    python benchmarks/bucketed.py --model FOLDER --train A --test B --tokens 4096 --shape             # one table

Queries, keys and values are those of one layer of the model, which reads as many tokens of ``--test`` as each table says (a
position table that is too short is repeated). What patterns learn, they learn from 24 texts of 512 tokens of ``--train``; they
are united with a window of 11 and one global token, but for those with a tail, and the predictor is inside every time.
Attention has the normalizer of the model. Beside every time stands what it buys, on 64 queries of every head: recall of the
gold edges (the support of entmax with α = 1.5 where the model has softmax), and the error of the output to dense attention's
with the same normalizer, ``‖o − o_dense‖ / ‖o_dense‖``. One row is of noise, to compare with older tables: what it recalls is
chance.

``--shape`` is a whole layer of RoBERTa-base (12 heads of 64, 768, 3,072; random weights around the attention, which cost what
any others do). Of a model with heads of 32, such as MiniLM, those of two layers stand side by side: real vectors of the right
size. The last column is the share of Amdahl's bound, the time of the layer with attention left out.

How it is measured is told in `measuring.py`. Dense entmax is exact (`dense.py` measures it alone).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import recorded
import torch
import torch.nn.functional as F
from measuring import Measured, machine, measure
from recorded import Vectors
from torch import Tensor, nn

from sparsefinder import models
from sparsefinder.attention import Bucketed, Dense
from sparsefinder.executors.support_lists import support
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.graphs import QK, Attention, Layout
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.refined import Refined
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import Window
from sparsefinder.storage.samples import Samples

SOME = 64  # queries of each head on which recall and error are measured
BASELINE, BOUND = "SDPA softmax", "no attention"
HEADS, SIZE, HIDDEN, INNER = 12, 64, 768, 3072  # of RoBERTa-base


@dataclass(frozen=True)
class Quality:
    """What an attention keeps, means over some queries of all heads."""

    recall: float | None
    error: float


def routed(learned: Learned, **settings: Any) -> Any:
    """A routed pattern with its window and global token, where it has no tail that stands for them."""
    around: dict[str, int] = {} if settings.get("tail") else {"window": 11, "global_tokens": 1}
    return Configuration("routed", Routed(**settings), **around).build(learned)


def arms(learned: Learned, normalizer: Normalizer) -> dict[str, Bucketed]:
    """In the settings of the quality tables."""
    patterns = {
        "window 257": Window(257),
        "routed, margin 0.2": routed(learned, rule="margin", level=0.2),
        "routed, 5% of the keys": routed(learned, rule="budget", level=0.05),
        "routed, 10% of the keys": routed(learned, rule="budget", level=0.1),
        "routed, 2.5% and the tail": routed(learned, rule="budget", level=0.025, tail=True, keys_per_cluster=16.0),
        "refined, level 5.0": Refined(5.0, alpha=normalizer.alpha, **learned.artefacts),
        "refined, level 2.5": Refined(alpha=normalizer.alpha, **learned.artefacts),
        "refined, level 1.0": Refined(1.0, alpha=normalizer.alpha, **learned.artefacts),
    }
    return {name: Bucketed(pattern, normalizer) for name, pattern in patterns.items()}


# ---- what it buys ----


def rows_of(layout: Layout, qk: QK, some: Tensor) -> Tensor:
    """The graph of some queries, ``(H, S, N)`` bool, without the others."""
    tokens = qk.k.shape[2]
    positions = torch.arange(tokens)
    edges = ((some[:, None] - positions).abs() <= layout.window // 2) & (layout.window > 0)
    edges = edges.expand(qk.q.shape[1], -1, -1).clone()
    if layout.is_global is not None:
        edges |= layout.is_global[0] | layout.is_global[0, some, None]
    if layout.buckets is not None:
        ids, count = layout.buckets.q_ids[0][:, some], layout.buckets.count
        taken = torch.zeros(*ids.shape[:2], count + 1, dtype=torch.bool)
        taken.scatter_(-1, torch.where(ids < 0, count, ids), True)
        taken[..., count] = False
        for slot in layout.buckets.k_ids[0].unbind(-1):
            edges |= taken.gather(-1, torch.where(slot < 0, count, slot)[:, None].expand(-1, len(some), -1))
    return edges


def quality(attention: Attention, vectors: Vectors, layer: int, normalizer: Normalizer) -> Quality:
    """Recall of the exact part, and the error of the output."""
    found = recall(attention, vectors, layer, normalizer) if isinstance(attention, Bucketed) else None
    return Quality(found, error(attention, vectors, layer, normalizer))


def some_scores(vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Which queries are looked at, and their scores ``(H, SOME, N)``."""
    q, k, _ = vectors
    some = torch.linspace(0, q.shape[2] - 1, SOME).long()
    return some, q[0][:, some] @ k[0].mT / math.sqrt(q.shape[-1])


def error(attention: Attention, vectors: Vectors, layer: int, normalizer: Normalizer) -> float:
    """Of the output, to that of dense attention, in its lengths."""
    some, scores = some_scores(vectors)
    dense = normalizer(scores) @ vectors[2][0]
    valid = torch.ones(1, scores.shape[-1], dtype=torch.bool)
    off = attention(*vectors, valid, layer)[0][:, some] - dense
    return float((off.flatten(1).norm(dim=-1) / dense.flatten(1).norm(dim=-1)).mean())


def recall(attention: Bucketed, vectors: Vectors, layer: int, normalizer: Normalizer) -> float:
    """Of the gold edges."""
    some, scores = some_scores(vectors)
    gold = Normalizer(normalizer.alpha if normalizer.sparse else 1.5)(scores) > 0
    qk = QK(*vectors[:2], torch.ones(1, scores.shape[-1], dtype=torch.bool))
    edges = rows_of(attention._layout(qk, layer), qk, some)
    return float(((edges & gold).sum(-1) / gold.sum(-1)).mean())


# ---- attention alone ----


def compare(vectors: Vectors, layer: int, learned: Learned, normalizer: Normalizer, rounds: int) -> None:
    """One table: every arm at one length."""
    q, k, v = vectors
    tokens = q.shape[2]
    valid = torch.ones(1, tokens, dtype=torch.bool)
    attentions: dict[str, Attention] = {
        BASELINE: lambda q, k, v, valid, layer: F.scaled_dot_product_attention(q, k, v),
        "exact entmax": Dense(Normalizer(normalizer.alpha if normalizer.sparse else 1.5)),
        **arms(learned, normalizer),
    }
    calls: dict[str, Callable[[], object]] = {
        name: lambda each=each: each(q, k, v, valid, layer)
        for name, each in attentions.items()  # type: ignore[misc]
    }
    generator = torch.Generator().manual_seed(tokens)
    noise = tuple(torch.randn(q.shape, generator=generator) for _ in range(3))
    on_noise = attentions[name := "routed, 5% of the keys"]
    calls[f"the same as “{name}”, on noise"] = lambda: on_noise(noise[0], noise[1], noise[2], valid, layer)
    results = measure(calls, rounds)
    kinds = {name: quality(each, vectors, layer, normalizer) for name, each in arms(learned, normalizer).items()}
    kinds[f"the same as “{name}”, on noise"] = quality(on_noise, (noise[0], noise[1], noise[2]), layer, normalizer)
    gold = support(QK(q, k, valid), normalizer.alpha if normalizer.sparse else 1.5).counts.double().mean().item()
    heads = f"{q.shape[1]} heads of {q.shape[3]}, {gold:.0f} gold keys a query"
    print(f"\n### Recorded: {tokens:,} tokens, forward, {rounds} rounds\n\n{heads}\n")
    print("| attention | median ms | min – max | SDPA ÷ this | peak MB | recall | output error |")
    print("|---|---|---|---|---|---|---|")
    for name, each in results.items():
        print(row(name, each, results[BASELINE], kinds.get(name)), flush=True)


def row(name: str, measured: Measured, baseline: Measured, kind: Quality | None, *more: str) -> str:
    recall = "" if kind is None or kind.recall is None else f"{kind.recall:.3f}"
    error = "" if kind is None else f"{kind.error:.3f}"
    cells = (name, measured.times, f"{measured.faster_than(baseline):.2f}", measured.megabytes, recall, error, *more)
    return f"| {' | '.join(cells)} |"


# ---- a whole layer ----


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Heads of two layers as one of twice the size."""
    return torch.cat(list(parts), dim=-1)


@dataclass(frozen=True)
class Layer:
    """Everything around the attention of a layer of RoBERTa-base."""

    projections: nn.Linear
    output: nn.Linear
    inner: nn.Linear
    outer: nn.Linear
    norm: nn.LayerNorm

    @classmethod
    def drawn(cls) -> Layer:
        """With random weights: they cost what any others do."""
        torch.manual_seed(0)
        linear = (nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN))
        return cls(*linear, nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN), nn.LayerNorm(HIDDEN))

    def __call__(self, x: Tensor, attend: Callable[[], Tensor]) -> Tensor:
        """``x (1, N, 768)``; ``attend`` gives ``(1, 12, N, 64)`` whatever is projected here."""
        self.projections(x)
        x = self.norm(x + self.output(attend().transpose(1, 2).flatten(2)))
        out: Tensor = self.norm(x + self.outer(F.gelu(self.inner(x))))
        return out


def compare_layers(vectors: Vectors, learned: Learned, normalizer: Normalizer, rounds: int) -> None:
    """One table: a whole layer with every arm."""
    q, k, v = vectors
    tokens = q.shape[2]
    valid, layer = torch.ones(1, tokens, dtype=torch.bool), Layer.drawn()
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(0))
    attentions: dict[str, Attention] = {
        BASELINE: lambda q, k, v, valid, layer: F.scaled_dot_product_attention(q, k, v),
        BOUND: lambda q, k, v, valid, layer: v,
        **arms(learned, normalizer),
    }
    calls: dict[str, Callable[[], object]] = {
        name: lambda each=each: layer(x, lambda: each(q, k, v, valid, 0))
        for name, each in attentions.items()  # type: ignore[misc]
    }
    results = measure(calls, rounds)
    bound = results[BOUND].faster_than(results[BASELINE])
    print(f"\n### A layer of RoBERTa-base: {tokens:,} tokens, forward, {rounds} rounds\n")
    print("| attention | median ms | min – max | SDPA ÷ this | peak MB | recall | output error | of the bound |")
    print("|---|---|---|---|---|---|---|---|")
    for name, each in results.items():
        kind = None if name in (BASELINE, BOUND) else quality(attentions[name], vectors, 0, normalizer)
        share = f"{each.faster_than(results[BASELINE]) / bound:.2f}"
        print(row(name, each, results[BASELINE], kind, share), flush=True)


@torch.inference_mode()
def main() -> None:
    parser = recorded.arguments(__doc__, "model of any family")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 4096, 8192, 16384], help="attention alone")
    parser.add_argument("--shape", type=int, nargs="*", default=[4096, 16384], help="a whole layer of RoBERTa-base")
    parser.add_argument("--layer", type=int, default=2, help="whose vectors are taken; and the one before, for --shape")
    parser.add_argument("--rounds", type=int, default=5, help="that each attention is timed")
    given = parser.parse_args()
    lengths = sorted({*given.tokens, *given.shape})
    model, tokenizer = recorded.lengthened(given.model, lengths[-1])
    normalizer, layer = models.get_normalizer(model), given.layer
    training = recorded.texts(given.train, tokenizer, recorded.LEARNED, recorded.TRAINING)
    samples = recorded.samples(model, training)
    learned = recorded.learned(samples)
    print(machine())
    ids = recorded.texts(given.test, tokenizer, lengths[-1], 1)[0]

    found: dict[int, list[Vectors]] = {}
    for tokens in lengths:
        found[tokens] = recorded.vectors(model, ids[:, :tokens], (layer - 1, layer))
    for tokens in given.tokens:
        compare(found[tokens][1], layer, learned, normalizer, given.rounds)
    if given.shape:
        two = Samples(
            *([side_by_side(x[layer - 1 : layer + 1].split(1)) for x in side] for side in (samples.q, samples.k))
        )
        of_shape = recorded.learned(two)
    for tokens in given.shape:
        joined = tuple(side_by_side(pair) for pair in zip(*found[tokens], strict=True))
        compare_layers((joined[0], joined[1], joined[2]), of_shape, normalizer, given.rounds)


if __name__ == "__main__":
    main()
