"""How the time of predicted attention grows with the text, at constant recall or at a constant error of the output.

    python benchmarks/growth.py --model FOLDER --train valid.txt --test test.txt        # ten minutes on two cores

Vectors, what is learned, and what recall and error are, as in `bucketed.py`. At every length the share of the keys of `Routed`
is the smallest that recalls as much, the level of `Refined` the largest at which the output errs no more. Gold keys a query
stand beside the keys that are multiplied: they grow too, so no graph of constant recall has work that is linear in the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import recorded
import torch
from bucketed import error, quality, recall, routed
from measuring import machine, measure
from recorded import Vectors

from sparsefinder import models
from sparsefinder.attention import Bucketed
from sparsefinder.executors.support_lists import support
from sparsefinder.experiment.configuration import Learned
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.refined import Refined

FEWEST = 1e-3  # share of the keys from which on a recall is looked for
RECALLS, ERRORS = (0.85, 0.9, 0.95), (0.1, 0.07)  # that are the same at all lengths of a table


@dataclass(frozen=True)
class Constant:
    """What is the same at all lengths while one level, of which more is better or worse, is set for each."""

    what: str
    wanted: float
    low: float  # the levels between which it lies
    high: float
    make: Callable[[float], Bucketed]
    enough: Callable[[Bucketed, Vectors], bool]  # growing with the level

    def __call__(self, vectors: Vectors) -> Bucketed:
        """The smallest level that is enough, by bisection of its logarithm."""
        low, high = math.log(self.low), math.log(self.high)
        for _ in range(9):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if self.enough(self.make(math.exp(middle)), vectors) else (middle, high)
        return self.make(math.exp(high))


def constants(layer: int, learned: Learned, normalizer: Normalizer) -> list[Constant]:
    """Routed attention with the fewest keys of a recall, and refined attention of an error of the output."""

    def by_share(share: float) -> Bucketed:
        return Bucketed(routed(learned, rule="budget", level=share), normalizer)

    def by_fineness(fineness: float) -> Bucketed:
        return Bucketed(Refined(1 / fineness, alpha=normalizer.alpha, **learned.artefacts), normalizer)

    def recalls(wanted: float) -> Callable[[Bucketed, Vectors], bool]:
        return lambda attention, vectors: recall(attention, vectors, layer, normalizer) >= wanted

    def errs(most: float) -> Callable[[Bucketed, Vectors], bool]:
        return lambda attention, vectors: error(attention, vectors, layer, normalizer) <= most

    return [
        *(Constant("routed, recall", each, FEWEST, 1.0, by_share, recalls(each)) for each in RECALLS),
        *(Constant("refined, output error", each, 0.01, 10.0, by_fineness, errs(each)) for each in ERRORS),
    ]


def growth(found: dict[int, Vectors], layer: int, learned: Learned, normalizer: Normalizer, rounds: int) -> None:
    """A table for each recall and each error: times of the attention that has it at every length, and their exponent."""
    first, last = min(found), max(found)
    for constant in constants(layer, learned, normalizer):
        print(f"\n### Growth: {constant.what} {constant.wanted:.2f}\n")
        print("| tokens | gold keys a query | keys and entries a query | recall | output error | median ms |")
        print("|---|---|---|---|---|---|")
        times = {}
        for tokens, vectors in sorted(found.items()):
            attention, valid = constant(vectors), torch.ones(1, tokens, dtype=torch.bool)
            qk, alpha = QK(*vectors[:2], valid), normalizer.alpha if normalizer.sparse else 1.5
            call = lambda: attention(*vectors, valid, layer)  # noqa: B023, E731
            times[tokens] = measure({"attention": call}, rounds)["attention"].median
            kind = quality(attention, vectors, layer, normalizer)
            keys = attention.computed_pairs(qk, layer).double().mean().item() / tokens
            gold = support(qk, alpha).counts.double().mean().item()
            numbers = f"{tokens:,} | {gold:.0f} | {keys:,.0f} | {kind.recall:.3f} | {kind.error:.3f}"
            print(f"| {numbers} | {1e3 * times[tokens]:,.1f} |", flush=True)
        exponent = math.log(times[last] / times[first]) / math.log(last / first)
        print(
            f"\n- growth, {first:,} to {last:,} tokens, {constant.what} {constant.wanted:.2f}: {exponent:.2f}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    parser = recorded.arguments(__doc__, "model of any family")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--layer", type=int, default=2, help="whose vectors are taken")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model, tokenizer = recorded.lengthened(given.model, max(given.tokens))
    normalizer, layer = models.get_normalizer(model), given.layer
    training = recorded.texts(given.train, tokenizer, recorded.LEARNED, recorded.TRAINING)
    learned = recorded.learned(recorded.samples(model, training))
    print(machine())
    ids = recorded.texts(given.test, tokenizer, max(given.tokens), 1)[0]
    found = {tokens: recorded.vectors(model, ids[:, :tokens], (layer,))[0] for tokens in sorted(given.tokens)}
    growth(found, layer, learned, normalizer, given.rounds)


if __name__ == "__main__":
    main()
