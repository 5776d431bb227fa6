"""What attention on a graph promises: the same output and gradients, whoever executes it and whatever shares its keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.graphs import QK, Pattern, has_tail
from sparsefinder.testing.subject import NORMALIZERS, Subject, close, equal, first
from sparsefinder.testing.vectors import random_cross


def dense(subject: Subject, causal: bool) -> None:
    """at density 1 it is dense attention, for every normalizer"""
    if subject.dense is None:
        return
    pattern = subject.build(subject.dense)
    qk = subject.sentences(causal=causal)
    missing = qk.allowed.expand(-1, subject.heads, -1, -1) & ~pattern(qk, 0)
    assert not missing.any(), f"{int(missing.sum())} allowed pairs are missing, the first at {first(missing)}"
    for normalizer in NORMALIZERS:
        output = Masked(pattern, normalizer, causal)(qk.q, qk.k, _values(qk), qk.valid, 0)
        close(output, normalizer(qk.scores()) @ _values(qk), f"the output under {normalizer}")


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
        close(run, masked, f"the {name}")


def grouped(subject: Subject, causal: bool) -> None:
    """where heads of queries share keys, attention on it is that with the keys repeated, and so are its gradients"""
    if subject.heads % 2:
        return
    qk = subject.sentences(causal=causal)
    shared = qk.with_vectors(qk.q, qk.k[:, ::2])
    kinds: list[Callable[..., Any]] = [Masked] if subject.layout(qk) is None else [Masked, Bucketed]
    values = _values(qk)[:, ::2]
    for kind in kinds:
        attention, runs = kind(subject.whole, causal=causal), []
        for repeat in (True, False):
            q, k, v = (x.clone().requires_grad_() for x in (shared.q, shared.k, values))
            keys, own = (x.repeat_interleave(2, 1) if repeat else x for x in (k, v))
            output = attention(q, keys, own, qk.valid, 1)
            output.square().sum().backward()
            runs.append([output.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v))])
        for name, repeated, run in zip(
            ("output", "gradient of q", "gradient of k", "gradient of v"), *runs, strict=True
        ):
            close(run, repeated, f"the {name} of {type(attention).__name__}")


def crossing(subject: Subject, causal: bool) -> None:
    """in cross-attention it keeps the promises of shape, padding and batch, and bucketed is masked; or it refuses in one line"""
    if causal or subject.refuses_cross:
        return
    queries, keys = (5, 12, 1, 9), (7, 3, 11, 16)
    qk = random_cross(queries, keys, subject.heads, subject.size)
    graph = subject.whole(qk, 1)
    assert graph.shape == qk.graph_shape, f"its shape is {tuple(graph.shape)}, expected is {tuple(qk.graph_shape)}"
    wrong = graph & ~qk.allowed
    assert not wrong.any(), f"{int(wrong.sum())} pairs that are not allowed are True, the first at {first(wrong)}"
    other = random_cross(queries, keys, subject.heads, subject.size, padding=math.nan)
    equal(graph, subject.whole(other, 1), "with NaN instead of 7 on padding")
    left = subject.whole(random_cross(queries, keys, subject.heads, subject.size, left=True), 1)
    for index, (rows, columns) in enumerate(zip(queries, keys, strict=True)):
        part, real = slice(index, index + 1), torch.ones(1, max(rows, columns), dtype=torch.bool)
        alone = QK(qk.q[part, :, :rows], qk.k[part, :, :columns], real[:, :columns], query_valid=real[:, :rows])
        single = subject.whole(alone, 1)
        equal(single, graph[part, :, :rows, :columns], f"{rows} queries of {columns} keys in a batch")
        equal(single, left[part, :, -rows:, -columns:], f"{rows} queries of {columns} keys padded on the left")
    if subject.layout(qk) is None:
        return
    runs = []
    values = torch.randn(qk.k.shape, generator=torch.Generator().manual_seed(1))
    for attention in (Masked(subject.whole), Bucketed(subject.whole), Bucketed(subject.whole, executor="blocks")):
        q, k, v = inputs = [x.clone().requires_grad_() for x in (qk.q, qk.k, values)]
        output = attention(q, k, v, qk.valid, 1, qk.query_valid)
        output.square().sum().backward()
        gradient = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        runs.append([output.detach(), *gradient])
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, masked, native, blocks in zip(names, *runs, strict=True):
        close(native, masked, f"the {name}")
        close(blocks, masked, f"the {name} (blocks)")


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
