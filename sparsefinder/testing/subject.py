"""A pattern under test, and what a promise is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, HasLayout, Layout, Pattern
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.testing.vectors import random_cross, random_qk

LENGTHS = (5, 17, 11, 1)  # tokens of the sentences that most checks read
NORMALIZERS = tuple(Normalizer(alpha) for alpha in (1.0, 1.25, 1.5, 2.0))


def as_it_is(pattern: Any) -> Pattern:
    """A pattern that needs nothing else."""
    same: Pattern = pattern
    return same


@dataclass(frozen=True)
class Subject:
    """A pattern under test, and what the checks need to know about it."""

    pattern: Any  # a frozen dataclass: its settings
    # attaches artefacts, or unites with a local window and global tokens; what it returns is what is run
    build: Callable[[Any], Pattern] = as_it_is
    sweep: Sequence[Any] = ()  # values of the sparsity parameter by which the graph should grow, in this order
    dense: Any = None  # the same pattern with settings that name every allowed pair, if there are such
    random: bool | None = None  # whether these settings draw numbers; None: they do if there is a field `seed`
    heads: int = 2
    size: int = 8  # of a query vector
    name: str = ""  # in messages; empty: the name of its class

    @cached_property
    def whole(self) -> Pattern:
        """The pattern as it is run."""
        return self.build(self.pattern)

    @property
    def refuses_cross(self) -> bool:
        """Whether it says, in one line, that it compares positions within one text."""
        qk = random_cross((3, 2), (4, 1), self.heads, self.size)
        try:
            self.whole(qk, 0)
        except UserError as error:
            refusal = str(error)
        else:
            return False
        assert "\n" not in refusal, "a refusal of cross-attention has several lines"
        assert "cross-attention" in refusal, f"a refusal of cross-attention does not say so: {refusal}"
        return True

    def sentences(self, lengths: Sequence[int] = LENGTHS, causal: bool = False, **more: Any) -> QK:
        """Random queries and keys of the right shape, see `random_qk`."""
        return random_qk(lengths, self.heads, self.size, causal, **more)

    def layout(self, qk: QK, layer: int = 0) -> Layout | None:
        """The bucketed form, None for a pattern without one."""
        if not isinstance(self.whole, HasLayout):
            return None
        try:
            return self.whole.layout(qk, layer)
        except UserError:  # a wrapper around a pattern without one
            return None


@dataclass(frozen=True)
class Check:
    """One promise. Calling it raises an AssertionError that names the pattern, the promise and what happened instead."""

    name: str
    promise: str  # in one line
    test: Callable[[Subject, bool], None]  # (subject, causal)

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Subject) -> None:
        for causal in (False, True):
            try:
                self.test(subject, causal)
            except Exception as error:
                what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                name = subject.name or type(subject.pattern).__name__
                way = "causal" if causal else "bidirectional"
                broken = f"{name} breaks the promise “{self.name}: {self.promise}” ({way}): {what}"
                raise AssertionError(broken) from error


def equal(expected: Tensor, actual: Tensor, where: str) -> None:
    """An AssertionError with the first pair that differs, unless two graphs of one shape are the same."""
    differ = expected != actual
    count = f"{int(differ.sum())} of {differ.numel()} pairs"
    assert not differ.any(), f"{where} {count} differ, the first at {first(differ)}"


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """An AssertionError with the largest difference, unless that is below 1e-4."""
    error = float((actual - expected).abs().max())
    assert error < 1e-4, f"{what} is off by up to {error:.2g}"


def first(graph: Tensor) -> str:
    """``(example, head, query, key)``, without the example in a graph that has none."""
    return str(tuple(graph.nonzero()[0].tolist()))
