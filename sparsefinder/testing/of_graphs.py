"""What a graph promises, whatever is done with it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import torch

from sparsefinder.graphs import QK, reads_ahead
from sparsefinder.testing.subject import LENGTHS, Subject, equal, first
from sparsefinder.testing.vectors import random_qk, single_sentence


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
        assert not wrong.any(), f"{int(wrong.sum())} pairs that are not allowed are True, the first at {first(wrong)}"


def padding(subject: Subject, causal: bool) -> None:
    """what padded positions hold never matters"""
    graphs = [subject.whole(subject.sentences(causal=causal, padding=x), 0) for x in (0.0, -3.0, 1e6, math.nan)]
    for value, graph in zip((-3.0, 1e6, math.nan), graphs[1:], strict=True):
        equal(graphs[0], graph, f"with {value} instead of 0 on padding")


def batch(subject: Subject, causal: bool) -> None:
    """a sentence has the same graph by itself and padded in a batch"""
    qk = subject.sentences(causal=causal)
    together = subject.whole(qk, 1)
    for index, length in enumerate(LENGTHS):
        single = subject.whole(single_sentence(qk, index), 1)
        equal(single, together[index : index + 1, :, :length, :length], f"a sentence of {length} tokens in a batch")


def left_padding(subject: Subject, causal: bool) -> None:
    """a sentence padded on the left has the graph of the same sentence padded on the right"""
    right, left = (subject.whole(subject.sentences(causal=causal, left=side), 1) for side in (False, True))
    for index, length in enumerate(LENGTHS):
        moved = left[index, :, -length:, -length:]
        equal(right[index, :, :length, :length], moved, f"a sentence of {length} tokens padded on the left")


def order(subject: Subject, causal: bool) -> None:
    """the order of the sentences in a batch does not matter"""
    qk = subject.sentences(causal=causal)
    mixed = torch.tensor([2, 0, 3, 1])
    shuffled = QK(qk.q[mixed], qk.k[mixed], qk.valid[mixed], causal)
    equal(subject.whole(qk, 0)[mixed], subject.whole(shuffled, 0), "in another order")


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
        equal(before, subject.whole(qk, 0), "after another batch")
        equal(before, subject.build(subject.pattern)(qk, 0), "when built again")


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


def layout(subject: Subject, causal: bool) -> None:
    """its layout, where it has one, is its graph; a token names a bucket at most once"""
    for left in (False, True):
        qk = subject.sentences(causal=causal, left=left)
        layout = subject.layout(qk, 1)
        if layout is None:
            return
        equal(subject.whole(qk, 1), layout.graph(qk), "as a layout")
        if layout.buckets is None:
            continue
        for ids, name in ((layout.buckets.q_ids, "query"), (layout.buckets.k_ids, "key")):
            real = ids.transpose(1, 2)[qk.valid]
            count = layout.buckets.count
            assert not ((real < -1) | (real >= count)).any(), f"a {name} has a bucket id outside [-1, {count})"
            rising = real.sort(-1).values
            twice = (rising[..., 1:] == rising[..., :-1]) & (rising[..., 1:] >= 0)
            assert not twice.any(), f"a {name} names the same bucket twice"


def future(subject: Subject, causal: bool) -> None:
    """where attention is causal, no later token changes what an earlier query sees; or it says what it reads ahead"""
    if not causal:
        return
    lengths = (64, 31)
    qk = subject.sentences(lengths, causal=True)
    graph, drawn = subject.whole(qk, 1), random_qk(lengths, subject.heads, subject.size, seed=5)
    changed = False
    for past in (3, 16, 41):
        later = (torch.arange(qk.q.shape[2]) >= past)[:, None]
        others = qk.with_vectors(torch.where(later, 3 * drawn.q, qk.q), torch.where(later, 3 * drawn.k, qk.k))
        shorter = replace(qk, valid=qk.valid & ~later[:, 0])
        for kind, other in (("other", others), ("no", shorter)):
            real = qk.valid[:, None, :past, None]
            before, after = (each[:, :, :past, :past] & real for each in (graph, subject.whole(other, 1)))
            changed |= not torch.equal(before, after)
            if not reads_ahead(subject.pattern):
                equal(before, after, f"with {kind} tokens from position {past} on")
    assert changed or not reads_ahead(subject.pattern), "it says that it reads ahead, and does not"
