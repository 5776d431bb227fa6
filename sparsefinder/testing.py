"""What every pattern promises, as checks that anyone can run on a pattern of their own.

    from sparsefinder.testing import CHECKS, Subject, check_pattern

    check_pattern(MyPattern(width=5), sweep=[1, 3, 5])  # an AssertionError names every promise that is broken

    @pytest.mark.parametrize("check", CHECKS, ids=str)  # or one test for each promise
    def test_my_pattern(check):
        check(Subject(MyPattern(width=5), sweep=[1, 3, 5]))

A pattern is a frozen dataclass with ``(QK, layer) → graph``, a class attribute ``sparsity_parameter`` (the name of the field
that trades sparsity for recall, or None) and, where work can be skipped, ``layout(QK, layer)``. Each check runs on small
random queries and keys of ragged sentences, bidirectional and causal, and takes milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, HasLayout, Layout, Pattern, has_tail
from sparsefinder.numerics.normalizers import Normalizer

LENGTHS = (5, 17, 11, 1)  # tokens of the sentences that most checks read
NORMALIZERS = tuple(Normalizer(alpha) for alpha in (1.0, 1.25, 1.5, 2.0))


def _as_it_is(pattern: Any) -> Pattern:
    same: Pattern = pattern
    return same


@dataclass(frozen=True)
class Subject:
    """A pattern under test, and what the checks need to know about it."""

    pattern: Any  # a frozen dataclass: its settings
    # attaches artefacts, or unites with a local window and global tokens; what it returns is what is run
    build: Callable[[Any], Pattern] = _as_it_is
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


def check_pattern(
    pattern: Any,
    *,
    build: Callable[[Any], Pattern] = _as_it_is,
    sweep: Sequence[Any] = (),
    dense: Any = None,
    random: bool | None = None,
    heads: int = 2,
    size: int = 8,
) -> None:
    """Run every check; raises one AssertionError with a line for each promise that is broken. Arguments: see `Subject`."""
    subject = Subject(pattern, build, sweep, dense, random, heads, size)
    broken = []
    for check in CHECKS:
        try:
            check(subject)
        except AssertionError as error:
            broken.append(str(error))
    if broken:
        raise AssertionError(f"{len(broken)} of {len(CHECKS)} promises are broken\n" + "\n".join(broken))


# ---- queries and keys ----


def random_qk(
    lengths: Sequence[int],
    heads: int = 2,
    size: int = 8,
    causal: bool = False,
    seed: int = 0,
    padding: float = 7.0,
    left: bool = False,
) -> QK:
    """Normal queries and keys; the vectors of a sentence are the same whichever side it is padded on.

    Args:
        lengths: Tokens of each sentence.
        heads: ``H``.
        size: ``D``.
        causal: Whether a query sees no later key.
        seed: Of the vectors.
        padding: What padded positions hold.
        left: Whether sentences are padded on the left instead of the right.

    Returns:
        Vectors ``(B, H, N, D)`` float32, ``N`` the longest length.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    q, k = torch.randn(2, len(lengths), heads, longest, size, generator=generator)
    padded = ~valid[:, None, :, None]
    qk = QK(q.masked_fill(padded, padding), k.masked_fill(padded, padding), valid, causal)
    if not left:
        return qk
    order = (torch.arange(longest) + torch.tensor(lengths)[:, None]) % longest  # the last slot gets the last token
    rows = torch.arange(len(lengths))[:, None]
    q, k = (x.transpose(1, 2)[rows, order].transpose(1, 2) for x in (qk.q, qk.k))
    return QK(q, k, valid[rows, order], causal)


def single_sentence(qk: QK, index: int) -> QK:
    """One sentence of a batch padded on the right, without its padding: vectors ``(1, H, n, D)``."""
    tokens = int(qk.lengths[index])
    part = slice(index, index + 1)
    return QK(qk.q[part, :, :tokens], qk.k[part, :, :tokens], qk.valid[part, :tokens], qk.causal)


# ---- the promises ----


def shape(subject: Subject, causal: bool) -> None:
    """a graph is bool (B, H, N, N) on the device of the queries"""
    qk = subject.sentences(causal=causal)
    graph = subject.whole(qk, 1)
    expected = (*qk.q.shape[:3], qk.q.shape[2])
    assert graph.dtype == torch.bool, f"its dtype is {graph.dtype}"
    assert graph.shape == expected, f"its shape is {tuple(graph.shape)}, expected for these queries is {expected}"


def allowed(subject: Subject, causal: bool) -> None:
    """True means may attend: never padding, and never a later key where attention is causal"""
    for left in (False, True):
        qk = subject.sentences(causal=causal, left=left)
        wrong = subject.whole(qk, 1) & ~qk.allowed
        assert not wrong.any(), f"{int(wrong.sum())} pairs that are not allowed are True, the first at {_first(wrong)}"


def padding(subject: Subject, causal: bool) -> None:
    """what padded positions hold never matters"""
    graphs = [subject.whole(subject.sentences(causal=causal, padding=x), 0) for x in (0.0, -3.0, 1e6, math.nan)]
    for value, graph in zip((-3.0, 1e6, math.nan), graphs[1:], strict=True):
        _equal(graphs[0], graph, f"with {value} instead of 0 on padding")


def batch(subject: Subject, causal: bool) -> None:
    """a sentence has the same graph by itself and padded in a batch"""
    qk = subject.sentences(causal=causal)
    together = subject.whole(qk, 1)
    for index, length in enumerate(LENGTHS):
        single = subject.whole(single_sentence(qk, index), 1)
        _equal(single, together[index : index + 1, :, :length, :length], f"a sentence of {length} tokens in a batch")


def left_padding(subject: Subject, causal: bool) -> None:
    """a sentence padded on the left has the graph of the same sentence padded on the right"""
    right, left = (subject.whole(subject.sentences(causal=causal, left=side), 1) for side in (False, True))
    for index, length in enumerate(LENGTHS):
        moved = left[index, :, -length:, -length:]
        _equal(right[index, :, :length, :length], moved, f"a sentence of {length} tokens padded on the left")


def order(subject: Subject, causal: bool) -> None:
    """the order of the sentences in a batch does not matter"""
    qk = subject.sentences(causal=causal)
    mixed = torch.tensor([2, 0, 3, 1])
    shuffled = QK(qk.q[mixed], qk.k[mixed], qk.valid[mixed], causal)
    _equal(subject.whole(qk, 0)[mixed], subject.whole(shuffled, 0), "in another order")


def history(subject: Subject, causal: bool) -> None:
    """no memory of other batches, and no use of the global random state"""
    qk = subject.sentences(causal=causal)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = subject.whole(qk, 0)
        state = torch.random.get_rng_state()
        subject.whole(subject.sentences([3], causal, seed=9), 0)
        assert torch.equal(state, torch.random.get_rng_state()), "it draws from torch's global random state"
        torch.manual_seed(123)
        _equal(before, subject.whole(qk, 0), "after another batch")
        _equal(before, subject.build(subject.pattern)(qk, 0), "when built again")


def seed(subject: Subject, causal: bool) -> None:
    """random numbers are fixed by seed, layer and head, and differ between them"""
    has_seed = "seed" in {field.name for field in dataclasses.fields(subject.pattern)}
    if not (has_seed if subject.random is None else subject.random):
        return
    qk = subject.sentences([64, 50], causal)
    # the same vectors for every head, so that only what is drawn can differ
    q, k = (x[:, :1].expand(-1, subject.heads, -1, -1) for x in (qk.q, qk.k))
    qk = qk.with_vectors(q, k)
    graph = subject.whole(qk, 0)
    hint = "; if these settings draw nothing, say random=False"
    assert not torch.equal(graph, subject.whole(qk, 1)), f"layers 0 and 1 have the same graph{hint}"
    assert not torch.equal(graph[:, 0], graph[:, 1]), f"heads 0 and 1 have the same graph{hint}"
    if has_seed:
        other = replace(subject.pattern, seed=subject.pattern.seed + 1)
        assert not torch.equal(graph, subject.build(other)(qk, 0)), f"another seed gives the same graph{hint}"


def dtype(subject: Subject, causal: bool) -> None:
    """float64, float32, bfloat16 and float16 are all understood; the first two give one graph, up to ties"""
    qk = subject.sentences(causal=causal)
    graphs = {}
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        graph = subject.whole(qk.with_vectors(qk.q.to(kind), qk.k.to(kind)), 0)
        assert graph.dtype == torch.bool, f"the graph of {kind} queries is {graph.dtype}"
        assert not (graph & ~qk.allowed).any(), f"{kind} queries attend to pairs that are not allowed"
        graphs[kind] = graph
    differ = (graphs[torch.float64] ^ graphs[torch.float32]).sum() / qk.allowed.expand_as(graph).sum()
    assert differ < 0.01, f"float64 and float32 differ in {100 * differ:.1f} % of the pairs: more than ties"


def sparsity_parameter(subject: Subject, causal: bool) -> None:
    """along its sweep the sparsity parameter never takes pairs away in total, and adds some"""
    if subject.pattern.sparsity_parameter is None:
        assert not subject.sweep, "there is no sparsity parameter, but values for it"
        return
    name = subject.pattern.sparsity_parameter
    assert len(subject.sweep) >= 2, f"give sweep=[…], values of its `{name}` by which the graph grows"
    qk = subject.sentences([40, 33], causal)
    swept = [replace(subject.pattern, **{name: value}) for value in subject.sweep]
    pairs = [int(subject.build(pattern)(qk, 0).sum()) for pattern in swept]
    counted = ", ".join(f"{value}: {count}" for value, count in zip(subject.sweep, pairs, strict=True))
    assert pairs == sorted(pairs), f"pairs by `{name}` are not rising ({counted})"
    assert pairs[0] < pairs[-1], f"`{name}` changes nothing ({counted})"


def dense(subject: Subject, causal: bool) -> None:
    """at density 1 it is dense attention, for every normalizer"""
    if subject.dense is None:
        return
    pattern = subject.build(subject.dense)
    qk = subject.sentences(causal=causal)
    missing = qk.allowed.expand(-1, subject.heads, -1, -1) & ~pattern(qk, 0)
    assert not missing.any(), f"{int(missing.sum())} allowed pairs are missing, the first at {_first(missing)}"
    for normalizer in NORMALIZERS:
        output = Masked(pattern, normalizer, causal)(qk.q, qk.k, _values(qk), qk.valid, 0)
        _close(output, normalizer(qk.scores()) @ _values(qk), f"the output under {normalizer}")


def empty_rows(subject: Subject, causal: bool) -> None:
    """a query without any key gives zeros and finite gradients, for every normalizer; so does an empty sentence"""
    qk = subject.sentences([6, 0, 9], causal)
    pattern = _FirstQuerySilenced(subject.whole)
    nobody = ~pattern(qk, 0).any(-1)
    for normalizer in NORMALIZERS:
        inputs, output = _attend(Masked(pattern, normalizer, causal), qk)
        assert not output[nobody].any(), f"a query without a key does not give zeros under {normalizer}"
        output.square().sum().backward()
        for x, name in zip(inputs, "qkv", strict=True):
            assert x.grad is not None, f"no gradient of {name}"
            assert x.grad.isfinite().all(), f"the gradient of {name} is not finite under {normalizer}"


def gradients(subject: Subject, causal: bool) -> None:
    """gradients through the attention on it are finite, and without a tail zero for every key outside a query's graph"""
    qk = subject.sentences(causal=causal)
    reach = qk.allowed.expand_as(qk.scores()) if has_tail(subject.whole) else subject.whole(qk, 0)
    for query in (0, 4, 10, 16):
        inputs, output = _attend(Masked(subject.whole, causal=causal), qk)
        output[:, :, query].square().sum().backward()
        outside = ~reach[:, :, query]
        others = (torch.arange(reach.shape[2]) != query).expand_as(outside)
        for x, name, zero in zip(inputs, "qkv", (others, outside, outside), strict=True):
            assert x.grad is not None, f"no gradient of {name}"
            assert x.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert not x.grad[zero].any(), f"query {query} sends a gradient to a {name} outside its graph"


def layout(subject: Subject, causal: bool) -> None:
    """its layout, where it has one, is its graph; a token names a bucket at most once"""
    for left in (False, True):
        qk = subject.sentences(causal=causal, left=left)
        layout = subject.layout(qk, 1)
        if layout is None:
            return
        _equal(subject.whole(qk, 1), layout.graph(qk), "as a layout")
        if layout.buckets is None:
            continue
        for ids, name in ((layout.buckets.q_ids, "query"), (layout.buckets.k_ids, "key")):
            real = ids.transpose(1, 2)[qk.valid]
            count = layout.buckets.count
            assert not ((real < -1) | (real >= count)).any(), f"a {name} has a bucket id outside [-1, {count})"
            rising = real.sort(-1).values
            twice = (rising[..., 1:] == rising[..., :-1]) & (rising[..., 1:] >= 0)
            assert not twice.any(), f"a {name} names the same bucket twice"


def bucketed(subject: Subject, causal: bool) -> None:
    """bucketed attention on its layout, where it has one, gives the output and gradients of the masked one"""
    qk = subject.sentences(causal=causal)
    if subject.layout(qk) is None:
        return
    runs = []
    for kind in (Masked, Bucketed):
        inputs, output = _attend(kind(subject.whole, causal=causal), qk)
        output.square().sum().backward()
        gradient = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        runs.append([output.detach(), *gradient])
    for name, masked, run in zip(("output", "gradient of q", "gradient of k", "gradient of v"), *runs, strict=True):
        _close(run, masked, f"the {name}")


CHECKS = tuple(
    Check(test.__name__, str(test.__doc__), test)
    for test in (
        *(shape, allowed, padding, batch, left_padding, order, history, seed, dtype),
        *(sparsity_parameter, dense, empty_rows, gradients, layout, bucketed),
    )
)


@dataclass(frozen=True)
class _FirstQuerySilenced:
    """A pattern without the edges of each row's first query: there is an empty row in any case."""

    pattern: Pattern

    def __call__(self, qk: QK, layer: int) -> Tensor:
        graph = self.pattern(qk, layer).clone()
        graph[:, :, 0] = False
        return graph


def _values(qk: QK) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(qk.q.shape, generator=generator).masked_fill(~qk.valid[:, None, :, None], 7.0)


def _attend(attention: Any, qk: QK) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k and v, and the output of layer 0."""
    inputs = [x.clone().requires_grad_() for x in (qk.q, qk.k, _values(qk))]
    return inputs, attention(*inputs, qk.valid, 0)


def _equal(expected: Tensor, actual: Tensor, where: str) -> None:
    differ = expected != actual
    count = f"{int(differ.sum())} of {differ.numel()} pairs"
    assert not differ.any(), f"{where} {count} differ, the first at {_first(differ)}"


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).abs().max())
    assert error < 1e-4, f"{what} is off by up to {error:.2g}"


def _first(graph: Tensor) -> str:
    """``(example, head, query, key)``, without the example in a graph that has none."""
    return str(tuple(graph.nonzero()[0].tolist()))
