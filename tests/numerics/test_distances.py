"""Which centre is the nearest, by one matrix product."""

import torch

from sparsefinder.numerics.distances import closeness, squared


def test_closeness_orders_centres_as_their_distances_do() -> None:
    generator = torch.Generator().manual_seed(0)
    x, centres = (torch.randn(2, 3, n, 5, generator=generator, dtype=torch.float64) for n in (40, 7))
    assert torch.equal(closeness(x, centres).argsort(descending=True), squared(x, centres).argsort())
