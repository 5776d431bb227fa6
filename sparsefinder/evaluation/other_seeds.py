"""Configurations whose graph depends on a seed, with other seeds: how much chance there is in what was measured."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.storage.samples import Samples


@torch.no_grad()
def other_seeds(
    configurations: tuple[Configuration, ...], samples: Samples, learned: Learned, seeds: int, causal: bool
) -> tuple[Configuration, ...]:
    """The configurations whose graph depends on a seed, with ``seeds − 1`` other seeds.

    A field ``seed`` says little (a distance has one for the random distance alone), so the first sample is asked: is there a
    layer in which another seed of any configuration of that pattern gives another graph?
    """
    added: list[Configuration] = []
    random: dict[str, bool] = {}
    layers = list(samples.layers(0, causal))
    for configuration in configurations if seeds > 1 else ():
        if not hasattr(configuration.pattern, "seed"):
            continue
        others = [
            replace(configuration, pattern=replace(configuration.pattern, seed=configuration.pattern.seed + more))
            for more in range(1, seeds)
        ]
        if not random.get(configuration.name):
            mine, other = configuration.build(learned), others[0].build(learned)
            random[configuration.name] = any(
                not torch.equal(mine(qk, at), other(qk, at)) for at, qk in enumerate(layers)
            )
        if random[configuration.name]:
            added += others
    return tuple(added)


def seedless(configuration: Configuration) -> str:
    """What configurations that differ in their seed alone have in common."""
    pattern = configuration.pattern
    return repr(replace(configuration, pattern=replace(pattern, seed=0)) if hasattr(pattern, "seed") else configuration)
