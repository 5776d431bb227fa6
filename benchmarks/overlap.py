"""How much of what a query looks at is shared by the heads of a layer, and by layers.

    python benchmarks/overlap.py --model FOLDER --test test.txt               # half a minute

Gold graphs under 1.5-entmax of the queries and keys of an encoder. Two tables: of each layer the density of the gold graph, that
of the union over its heads, and the recall of one choice for all heads, the keys that most of a layer's probability lies on (an
oracle: no predictor is asked); and the recall of each layer's heads when another layer's choice is taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import recorded
import torch
from measuring import machine
from torch import Tensor

from sparsefinder.numerics.normalizers import Normalizer

SHARES = (0.05, 0.1, 0.2)


def chosen(probabilities: Tensor, share: float) -> Tensor:
    """The share of the keys ``(N, N)`` bool on which most of the probability ``(H, N, N)`` of all heads lies."""
    summed = probabilities.sum(0)
    best = summed.topk(int(share * summed.shape[-1]), dim=-1).indices
    return torch.zeros_like(summed, dtype=torch.bool).scatter_(-1, best, True)


def recall(gold: Tensor, choice: Tensor) -> float:
    """Mean over heads ``(H, N, N)``."""
    return float(((gold & choice).sum((-1, -2)) / gold.sum((-1, -2))).mean())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--documents", type=int, default=4)
    given = parser.parse_args()
    model, tokenizer = recorded.lengthened(given.model, given.tokens)
    samples = recorded.samples(model, recorded.texts(given.test, tokenizer, given.tokens, given.documents))
    layers = samples.shape[0]
    of_layers, of_pairs = torch.zeros(layers, 2 + len(SHARES)), torch.zeros(layers, layers)
    for index in range(len(samples)):
        dense = [Normalizer(1.5)(qk.scores())[0] for qk in samples.layers(index)]
        for layer, own in enumerate(dense):
            gold = own > 0
            shared = [recall(gold, chosen(own, share)) for share in SHARES]
            of_layers[layer] += torch.tensor([float(gold.float().mean()), float(gold.any(0).float().mean()), *shared])
            of_pairs[layer] += torch.tensor([recall(gold, chosen(other, 0.1)) for other in dense])
    print(f"{machine()}. {given.model.name}, {len(samples)} texts of {given.tokens} tokens")
    heads = "".join(f" one choice of {share:.0%} |" for share in SHARES)
    print(f"| layer | gold density | union of heads |{heads}\n|{'---|' * (3 + len(SHARES))}")
    for layer, row in enumerate((of_layers / len(samples)).tolist(), start=1):
        print(f"| {layer} | {row[0]:.3f} | {row[1]:.3f} |" + "".join(f" {value:.3f} |" for value in row[2:]))
    print(
        "| recall of | "
        + " | ".join(f"by layer {other}" for other in range(1, layers + 1))
        + f" |\n|{'---|' * (1 + layers)}"
    )
    for layer, row in enumerate((of_pairs / len(samples)).tolist(), start=1):
        print(f"| layer {layer} | " + " | ".join(f"{value:.3f}" for value in row) + " |")


if __name__ == "__main__":
    main()
