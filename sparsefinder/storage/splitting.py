"""A file of queries and keys by the length of its samples, into several: to learn from, or to measure on, some lengths alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from sparsefinder.errors import UserError
from sparsefinder.storage.samples import Samples, load_samples


def by_length(samples: Samples, bounds: Sequence[int]) -> dict[str, Samples]:
    """Samples by their number of tokens.

    Args:
        samples: Queries and keys.
        bounds: Rising numbers of tokens: a bin holds those of at least ``bounds[i]`` and less than ``bounds[i + 1]``.

    Returns:
        Bins by names such as ``10-20``, the last one ``40-up``. Those shorter than the first bound are left out, and so are
        bins without a sample.
    """
    if not bounds or bounds[0] < 0 or any(low >= high for low, high in pairwise(bounds)):
        raise UserError(f"lengths={list(bounds)}: give numbers of tokens that rise, such as 10 20 30 40")
    bins = {}
    for low, high in zip(bounds, [*bounds[1:], None], strict=True):
        inside = [i for i, n in enumerate(samples.lengths) if low <= n and (high is None or n < high)]
        if inside:
            chosen = replace(samples, q=[samples.q[i] for i in inside], k=[samples.k[i] for i in inside])
            bins[f"{low}-{'up' if high is None else high}"] = chosen
    if not bins:
        longest = max(samples.lengths)
        raise UserError(f"{samples.source} has no sample of {bounds[0]} tokens or more: its longest has {longest}")
    return bins


def split_file(source: Path, out: Path, bounds: Sequence[int]) -> Mapping[Path, int]:
    """Write ``out-10-20.pt``, … from a file or folder of queries and keys: each path and its number of samples; all or none."""
    parts = by_length(load_samples(source), bounds)
    written = {}
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            for name, part in parts.items():
                part.save(Path(folder) / name)
            for name, part in parts.items():
                path = out.with_name(f"{out.name}-{name}.pt")
                (Path(folder) / name).replace(path)
                written[path] = len(part)
    except OSError as error:
        raise UserError(f"cannot write {out}-….pt: {error.strerror}; choose another path") from error
    return written
