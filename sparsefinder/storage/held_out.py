"""Which samples of a run are learned from and which are measured on, and a look at whether those of other people can be right."""

from __future__ import annotations

import logging
import math

import torch

from sparsefinder.errors import UserError
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage.samples import Samples, load_samples
from sparsefinder.storage.store import Store

log = logging.getLogger(__name__)

_MOST_GOLD = 0.5  # share of the pairs above which a file given by path is not believed
_ENOUGH_TOKENS = 16  # of fewer a large share means nothing


def training_samples(store: Store, in_groups: bool = False) -> Samples:
    """The samples to learn from: ``qk``, without its last tenth where that is held out (see `validation_samples`).

    Args:
        store: The run; queries of a file that was given are multiplied by its ``query_scale``.
        in_groups: Whether heads that share their keys are one, with the mean of their queries.

    Raises:
        UserError: There is no such file, it cannot be read, or nothing is left beside what is held out.
    """
    samples = _read(store, "qk", in_groups)
    if not store.splits_qk:
        return samples
    training = samples.split_last_tenth()[0]
    if not len(training):
        raise UserError(f"{samples.source} holds one sample and its last tenth is held out: extract 2 samples or more")
    return training


def validation_samples(store: Store, in_groups: bool = False) -> Samples:
    """The samples to measure on: ``qk_validation``, or the last tenth (one or more) of a ``qk`` that was given alone.

    Args:
        store: The run; queries of a file that was given are multiplied by its ``query_scale``.
        in_groups: Whether heads that share their keys are one, with the mean of their queries.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    samples = _read(store, "qk_validation", in_groups)
    if not store.splits_qk:
        return samples
    held_out = samples.split_last_tenth()[1]
    log.info("%s is given without qk_validation: its last %d samples are held out", samples.source, len(held_out))
    return held_out


def _read(store: Store, name: str, in_groups: bool) -> Samples:
    """Of a file that somebody else may have made, the queries as ``query_scale`` says, after a look at whether that can be."""
    samples = load_samples(store.path(name))
    if name in store.given:
        if store.query_scale is not None:
            samples = samples.with_queries_times(store.query_scale)
        if store.first_time(f"density of {samples.source}"):
            _warn_of_density(samples)
    return samples.in_groups if in_groups else samples


def _warn_of_density(samples: Samples) -> None:
    """Say so where more than half of the pairs are gold: queries that were divided twice make all scores alike."""
    longest = max(range(len(samples)), key=samples.lengths.__getitem__)
    if samples.lengths[longest] < _ENOUGH_TOKENS:
        return
    density = gold_density(samples, longest)
    if density > _MOST_GOLD:
        log.warning(
            "%s: %.0f %% of the pairs of sample %d are gold under 1.5-entmax, where sparse attention has a few percent; if its "
            "queries are stored divided by √D, as fairseq's are, give query_scale=sqrt_d, else query_scale=NUMBER",
            *(samples.source, 100 * density, longest),
        )


def gold_density(samples: Samples, index: int, alpha: float = 1.5, queries: int = 128) -> float:
    """The share of gold pairs in one sample, over all its layers and heads.

    Args:
        samples: Queries and keys.
        index: Which of the samples.
        alpha: Of the entmax whose support is gold.
        queries: About how many of the sample's queries are looked at, evenly spaced.

    Returns:
        A number between 0 and 1.
    """
    shares = []
    for qk in samples.layers(index):
        step = max(1, qk.q.shape[2] // queries)
        scores = qk.q[:, :, ::step] @ qk.k.mT / math.sqrt(qk.q.shape[-1])
        shares.append((Normalizer(alpha)(scores) > 0).float().mean())
    return torch.stack(shares).mean().item()
