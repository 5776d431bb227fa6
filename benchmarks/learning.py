"""What learning costs: projections beside the published way to train them, centroids beside one scikit-learn run a head.

    python benchmarks/learning.py             # the whole table, some minutes
    python benchmarks/learning.py --rounds 1

Queries and keys are made: tokens of a random walk in a latent space, mapped into every head at random, so sharp that an
entmax row keeps two or three keys in a hundred. `published` computes in few words what the published code computes for one
layer: the gold graph anew in every step by the `entmax` package, as many negatives as positives by sorting a random N × N
matrix, N × N distances, one hinge around the sums of a row. Both sides have the same samples, steps and learning rate, and
recall is measured on held-out samples alike.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from entmax import entmax15
from measuring import machine, measure
from sklearn.cluster import KMeans
from torch import Tensor

from sparsefinder.kmeans_centroids import ClusterSettings
from sparsefinder.predictors.fit_centroids import fit_centroids
from sparsefinder.predictors.projections import Identity, LayerProjections, Linear, Projections
from sparsefinder.quantization import ProjectSettings, recall_of_nearest, train_projections
from sparsefinder.storage.samples import Samples

ROUNDS = 4  # R, of the projected space


def made(layers: int, heads: int, tokens: int, samples: int, size: int = 64, seed: int = 0) -> Samples:
    """Queries and keys of one made model: the maps of a head are drawn by its shape alone, samples by the seed."""
    maps = torch.Generator().manual_seed(layers * heads)
    to_q, other = (torch.randn(layers, heads, 16, size, generator=maps) / size**0.5 for _ in range(2))
    to_k = (to_q + other) / 2**0.5
    draw = torch.Generator().manual_seed(seed)
    q, k = [], []
    for _ in range(samples):
        walk = torch.randn(tokens, 16, generator=draw).cumsum(0)
        latent = 2.5 * torch.nn.functional.layer_norm(walk, (16,)) + torch.randn(tokens, 16, generator=draw)
        q.append(latent @ to_q)
        k.append(latent @ to_k + 0.2 * torch.randn(layers, heads, tokens, size, generator=draw))
    return Samples(q, k)


def published(samples: Samples, layer: int, settings: ProjectSettings) -> LayerProjections:
    """One layer's shared projection, trained the published way."""
    _, heads, size = samples.shape
    torch.manual_seed(settings.seed)
    weight = Linear(heads, size, settings.rounds)
    optimizer = torch.optim.Adam(weight.parameters(), lr=settings.learning_rate)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(samples)).split(settings.batch_size):
            qks = [samples.layer(index, layer) for index in batch.tolist()]
            q, k = torch.cat([qk.q for qk in qks]), torch.cat([qk.k for qk in qks])
            gold = entmax15(q @ k.mT / size**0.5, dim=-1) > 0
            order = torch.rand(gold.shape).masked_fill(gold, 2.0).argsort(-1)
            counts = gold.sum(-1, keepdim=True)
            negative = torch.zeros_like(gold).scatter(-1, order, torch.arange(gold.shape[-1]) < counts) & ~gold
            distance = torch.cdist(weight(q), weight(k)).square()
            near, far = ((distance * chosen).sum(-1) for chosen in (gold, negative))
            optimizer.zero_grad()
            torch.relu(settings.margin + near - far).mean().backward()
            optimizer.step()
    return LayerProjections(weight, weight)


def project(rounds: int) -> None:
    """Projections of 4 layers × 4 heads, 50 samples of 256 tokens, 3 epochs; the published way trains them one by one."""
    training, held_out = made(4, 4, 256, 50), made(4, 4, 256, 10, seed=1)
    settings = ProjectSettings(rounds=ROUNDS, epochs=3, eval_every=0, eval_samples=len(held_out))
    times = measure(
        {
            "published": lambda: [published(training, layer, settings) for layer in range(4)],
            "sparsefinder": lambda: train_projections(training, held_out.part(0, 1), settings),
        },
        rounds,
    )
    theirs = Projections([published(training, layer, settings) for layer in range(4)])
    ours = train_projections(training, held_out.part(0, 1), settings).projections
    print(
        "\n| projections, 4 layers × 4 heads × 256 tokens, 50 samples, 3 epochs | ms | spread | times as fast | recall at 20 % |"
    )
    print("|---|---|---|---|---|")
    for name, projections in (("published", theirs), ("sparsefinder", ours)):
        recall = recall_of_nearest(projections, held_out, settings)["recall"]
        print(f"| {name} | {times[name].times} | {times[name].faster_than(times['published']):.1f} | {recall:.3f} |")
    training = made(12, 12, 512, 50)
    start = time.perf_counter()
    train_projections(training, held_out=training.part(0, 1), settings=settings)
    print(f"\n12 layers × 12 heads × 512 tokens, 50 samples, 3 epochs: {time.perf_counter() - start:.0f} s")


def cluster(rounds: int) -> None:
    """144 heads × 51,200 points × 4 dimensions into 16, beside one scikit-learn run a head after the other."""
    points = made(12, 12, 512, 50, size=ROUNDS)
    whole = ClusterSettings(n_clusters=16, max_points=None)
    identity = Projections([LayerProjections(Identity(), Identity()) for _ in range(12)])
    found: dict[str, list[Tensor]] = {}

    def one_by_one() -> None:
        centres = [
            np.stack(
                [KMeans(16, n_init=1, random_state=0).fit(head).cluster_centers_ for head in of_layer(points, layer)]
            )
            for layer in range(12)
        ]
        found["scikit-learn"] = [torch.from_numpy(each) for each in centres]

    def ours() -> None:
        found["sparsefinder"] = [each[:, 0] for each in fit_centroids(points, identity, whole).layers]

    times = measure({"scikit-learn": one_by_one, "sparsefinder": ours}, rounds)
    inertia = {name: sum(inertia_of(points, centres)) for name, centres in found.items()}
    print(
        "\n| k-means, 144 heads × 51,200 points × 4 into 16 | ms | spread | times as fast | inertia, in scikit-learn's |"
    )
    print("|---|---|---|---|---|")
    for name, value in inertia.items():
        against = times[name].faster_than(times["scikit-learn"])
        print(f"| {name} | {times[name].times} | {against:.1f} | {value / inertia['scikit-learn']:.4f} |")


def of_layer(samples: Samples, layer: int) -> np.ndarray:
    """``(H, points, D)``: all queries and keys."""
    each = [samples.layer(index, layer) for index in range(len(samples))]
    points: np.ndarray = torch.cat([torch.cat([qk.q[0], qk.k[0]], 1) for qk in each], 1).numpy()
    return points


def inertia_of(samples: Samples, centres: list[Tensor]) -> list[float]:
    """Squared distances to the nearest centroid, summed in each layer."""
    return [
        torch.cdist(torch.from_numpy(of_layer(samples, layer)).float(), centre.float()).amin(-1).square().sum().item()
        for layer, centre in enumerate(centres)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(machine())
    project(arguments.rounds)
    cluster(arguments.rounds)
