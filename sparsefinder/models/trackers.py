"""Trackers of experiments, such as TensorBoard, to which the Trainer reports."""

from __future__ import annotations

from collections.abc import Sequence

from sparsefinder.errors import UserError, one_of
from sparsefinder.models.transformers_internals import trackers

EXTRA = ("tensorboard", "wandb")  # what sparsefinder[trackers] installs


def check_trackers(setting: str, names: str | Sequence[str]) -> None:
    """Before any work: a `UserError` for a tracker that transformers does not know, or whose package is not installed."""
    if names in ("none", "all"):
        return
    known = trackers()
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise UserError(f"{setting}={name} is unknown; {one_of(('none', 'all', *known), name)}")
        if not known[name]:
            package = "'sparsefinder[trackers]'" if name in EXTRA else name
            here = [tracker for tracker, installed in known.items() if installed]
            raise UserError(
                f"{setting}={name} is not installed: pip install {package}, or choose one of {', '.join(['none', *here])}"
            )
