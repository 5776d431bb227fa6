"""The conformance suite catches what it says: one broken pattern for each promise, and a good one that keeps them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.counter_rng import uniform
from sparsefinder.patterns.window import Window
from sparsefinder.testing import CHECKS, Check, Subject, check_pattern, random_qk


@dataclass(frozen=True)
class Mine:
    """A pattern as a reader of the documentation would write it: alike tokens meet, and a few pairs by chance."""

    similarity: float = -1.0
    chance: float = 0.1
    seed: int = 0

    sparsity_parameter: ClassVar[str | None] = "chance"
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, qk: QK, layer: int) -> Tensor:
        heads = torch.arange(qk.q.shape[1])
        query, key = qk.query_positions, qk.positions
        drawn = uniform(self.seed, layer, heads[:, None, None], query[:, None, :, None], key[:, None, None, :])
        return ((qk.scores() < self.similarity) | (drawn < self.chance)) & qk.allowed


SWEEP = [0.0, 0.2, 0.6, 1.0]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_good_pattern_keeps_every_promise(check: Check) -> None:
    check(Subject(Mine(), sweep=SWEEP, dense=Mine(chance=1.0)))


def test_one_call_runs_every_check() -> None:
    check_pattern(Mine(), sweep=SWEEP, dense=Mine(chance=1.0))
    check_pattern(Window(3), sweep=[1, 3, 5], dense=Window(99), heads=3, size=4)


@dataclass(frozen=True)
class Changed:
    """A good pattern with its graph changed on the way out."""

    change: Callable[[Tensor, QK], Any]
    sparsity_parameter: ClassVar[str | None] = None

    def __call__(self, qk: QK, layer: int) -> Tensor:
        changed: Tensor = self.change(Mine()(qk, layer), qk)
        return changed


@dataclass(frozen=True)
class Remembering:
    seen: list[int] = field(default_factory=list)
    sparsity_parameter: ClassVar[str | None] = None

    def __call__(self, qk: QK, layer: int) -> Tensor:
        self.seen.append(0)
        return qk.allowed.expand(-1, qk.q.shape[1], -1, -1) & (torch.tensor(len(self.seen) % 2 == 0))


@dataclass(frozen=True)
class Drawing(Mine):
    def __call__(self, qk: QK, layer: int) -> Tensor:
        return (torch.rand(*qk.q.shape[:3], qk.q.shape[2]) < 0.5) & qk.allowed


@dataclass(frozen=True)
class Deaf(Mine):
    """The same numbers for every head, or every layer, or every seed."""

    to: str = "heads"

    def __call__(self, qk: QK, layer: int) -> Tensor:
        heads = torch.arange(qk.q.shape[1]) * (self.to != "heads")
        seed, layer = self.seed * (self.to != "seed"), layer * (self.to != "layer")
        position = qk.positions
        drawn = uniform(seed, layer, heads[:, None, None], position[:, None, :, None], position[:, None, None, :])
        return (drawn < self.chance) & qk.allowed


@dataclass(frozen=True)
class WrongLayout(Window):
    kind: str = "other"

    def layout(self, qk: QK, layer: int) -> Layout:
        if self.kind == "other":
            return Layout(window=self.width + 2)
        ids = torch.zeros(*qk.q.shape[:3], 2, dtype=torch.int64)
        return Layout(Buckets(ids, ids, 1 if self.kind == "twice" else 0))

    def __call__(self, qk: QK, layer: int) -> Tensor:
        if self.kind == "other":
            return Window(self.width)(qk, layer)
        return qk.allowed.expand(-1, qk.q.shape[1], -1, -1)


def _without_padding_rule(graph: Tensor, qk: QK) -> Tensor:
    mean = qk.k.masked_fill(qk.k.isnan(), 0.0).mean((2, 3))[:, :, None, None]
    return graph & (mean < 1)


def _of_the_last_key(graph: Tensor, qk: QK) -> Tensor:
    last = qk.k.masked_fill(~qk.valid[:, None, :, None], 0.0).sum((1, 2, 3))
    return graph & (last > 0)[:, None, None, None]


@dataclass(frozen=True)
class AheadOfNothing(Mine):
    reads_ahead: ClassVar[str] = "everything"


@dataclass(frozen=True)
class Refusing(Mine):
    def __call__(self, qk: QK, layer: int) -> Tensor:
        if qk.crosses:
            raise UserError("no")
        return super().__call__(qk, layer)


BROKEN = {
    "shape": [Changed(lambda graph, qk: graph.float()), Changed(lambda graph, qk: graph[:, :1])],
    "allowed": [Changed(lambda graph, qk: ~graph), Changed(lambda graph, qk: graph | qk.valid[:, None, None])],
    "padding": [Changed(_without_padding_rule)],
    "batch": [Changed(lambda graph, qk: graph & (torch.arange(graph.shape[2]) < graph.shape[2] // 2))],
    "left_padding": [Changed(lambda graph, qk: graph & (torch.arange(graph.shape[2]) % 5 == 0))],
    "order": [Changed(lambda graph, qk: graph & (torch.arange(len(graph)) % 2 == 0)[:, None, None, None])],
    "history": [Remembering(), Drawing()],
    "seed": [Deaf(to="heads"), Deaf(to="layer"), Deaf(to="seed")],
    "dtype": [Changed(lambda graph, qk: graph & (qk.q @ torch.ones(8) < 9)[..., None])],
    "sparsity_parameter": [Mine(seed=1), Window(3)],
    "layout": [WrongLayout(), WrongLayout(kind="twice"), WrongLayout(kind="range")],
    "bucketed": [WrongLayout()],
    "future": [Changed(_of_the_last_key), AheadOfNothing()],
    "crossing": [
        Changed(lambda graph, qk: graph | (qk.valid[:, None, None] if qk.crosses else False)),
        Changed(lambda graph, qk: graph & (~qk.k.isnan().any() if qk.crosses else True)),
        Refusing(),
    ],
}


@pytest.mark.parametrize(("name", "pattern"), [(name, each) for name, some in BROKEN.items() for each in some])
def test_a_broken_promise_is_named(name: str, pattern: Any) -> None:
    check = {each.name: each for each in CHECKS}[name]
    sweep = {Mine: [1.0, 0.5], Window: []}.get(type(pattern), [])
    with pytest.raises(AssertionError, match=rf"{type(pattern).__name__} breaks the promise “{name}: "):
        check(Subject(pattern, sweep=sweep))


def test_a_sparsity_parameter_that_does_nothing() -> None:
    check = {each.name: each for each in CHECKS}["sparsity_parameter"]
    with pytest.raises(AssertionError, match=r"changes nothing \(0.1: \d+, 0.1: \d+\)"):
        check(Subject(Mine(), sweep=[0.1, 0.1]))


def test_density_that_is_not_reached() -> None:
    with pytest.raises(AssertionError, match="allowed pairs are missing, the first at"):
        check_pattern(Window(1), sweep=[1, 3], dense=Window(15))


def test_all_broken_promises_are_listed() -> None:
    with pytest.raises(
        AssertionError, match=r"^3 of \d+ promises are broken\nChanged breaks .*\nChanged breaks .*\nChanged breaks "
    ):
        check_pattern(Changed(lambda graph, qk: graph | qk.valid[:, None, None]))


def test_what_is_built_is_what_is_run() -> None:
    subject = Subject(Window(1), build=lambda pattern: replace(pattern, width=pattern.width + 2))
    assert subject.whole == Window(3)


def test_padding_side_changes_no_vector() -> None:
    right, left = (random_qk([4, 6, 1], left=side) for side in (False, True))
    assert left.valid.sum(-1).tolist() == [4, 6, 1]
    assert left.valid[:, -1].all()
    for index, length in enumerate([4, 6, 1]):
        for a, b in ((right.q, left.q), (right.k, left.k)):
            assert torch.equal(a[index, :, :length], b[index, :, -length:])
