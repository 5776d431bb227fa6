"""What every pattern promises, as checks that anyone can run on a pattern of their own.

    from sparsefinder.testing import CHECKS, Subject, check_pattern

    check_pattern(MyPattern(width=5), sweep=[1, 3, 5])  # an AssertionError names every promise that is broken

    @pytest.mark.parametrize("check", CHECKS, ids=str)  # or one test for each promise
    def test_my_pattern(check):
        check(Subject(MyPattern(width=5), sweep=[1, 3, 5]))  # or check(subject_named("mine")), by its name

A pattern is a frozen dataclass with ``(QK, layer) → graph``, a class attribute ``sparsity_parameter`` (the name of the field
that trades sparsity for recall, or None) and, where work can be skipped, ``layout(QK, layer)``. Each check runs on small
random queries and keys of ragged sentences, bidirectional and causal, and takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsefinder.graphs import Pattern
from sparsefinder.testing import of_attention, of_graphs
from sparsefinder.testing.by_name import subject_named
from sparsefinder.testing.subject import LENGTHS, NORMALIZERS, Check, Subject, as_it_is
from sparsefinder.testing.vectors import random_cross, random_qk, single_sentence

__all__ = [
    "CHECKS",
    "LENGTHS",
    "NORMALIZERS",
    "Check",
    "Subject",
    "broken_promises",
    "check_pattern",
    "random_cross",
    "random_qk",
    "single_sentence",
    "subject_named",
]

CHECKS = tuple(
    Check(test.__name__, str(test.__doc__), test)
    for test in (
        *(of_graphs.shape, of_graphs.allowed, of_graphs.padding, of_graphs.batch, of_graphs.left_padding),
        *(of_graphs.order, of_graphs.history, of_graphs.seed, of_graphs.dtype, of_graphs.sparsity_parameter),
        *(of_attention.dense, of_attention.empty_rows, of_attention.gradients, of_graphs.layout),
        *(of_attention.bucketed, of_graphs.future, of_attention.grouped, of_attention.crossing),
    )
)


def broken_promises(subject: Subject) -> list[str]:
    """A line for each promise that a pattern breaks; empty where it keeps them all."""
    broken = []
    for check in CHECKS:
        try:
            check(subject)
        except AssertionError as error:
            broken.append(str(error))
    return broken


def check_pattern(
    pattern: Any,
    *,
    build: Callable[[Any], Pattern] = as_it_is,
    sweep: Sequence[Any] = (),
    dense: Any = None,
    random: bool | None = None,
    heads: int = 2,
    size: int = 8,
) -> None:
    """Run every check; raises one AssertionError with a line for each promise that is broken. Arguments: see `Subject`."""
    broken = broken_promises(Subject(pattern, build, sweep, dense, random, heads, size))
    if broken:
        raise AssertionError(f"{len(broken)} of {len(CHECKS)} promises are broken\n" + "\n".join(broken))
