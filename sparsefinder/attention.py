"""Attention on a predicted graph: ``(q, k, v, valid, layer) → output``.

``Masked`` turns any pattern into an attention by computing every score and hiding those outside the graph. It saves no
work: it is the definition that faster attentions are tested against, and the way to measure what a graph does to a model.

What every attention here promises:

- a query without any key, or padded, gets zeros; padded keys are never attended, whatever padded positions contain;
- scores, threshold and probabilities are float32 at least; probabilities are cast to the dtype of ``v`` for the product;
- ``graph`` is the graph that is executed and ``computed_pairs`` the pairs that are multiplied, whatever is added to it included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.blocks.dense_tiles import TilesExecutor
from sparsefinder.executors.blocks.executor import BlocksExecutor
from sparsefinder.executors.blocks.tail import entries
from sparsefinder.executors.choose_executor import AUTO, Executor, check, choose, explain
from sparsefinder.executors.native.bucketed import NativeExecutor
from sparsefinder.executors.native.dense import NativeDenseExecutor
from sparsefinder.executors.native.tailed import TailedExecutor
from sparsefinder.executors.triton.dense import TritonDenseExecutor
from sparsefinder.executors.triton.executor import TritonExecutor
from sparsefinder.executors.workload import Pairs, Work
from sparsefinder.graphs import QK, HasLayout, Layout, Pattern, each_query_alone, has_tail
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.numerics.padding import at_least_float32, exactly, right_padded, without_padding
from sparsefinder.numerics.pairs import band
from sparsefinder.numerics.tail_normalizer import with_clusters

_ENTMAX15 = Normalizer(1.5)  # the normalizer of the gold graphs
_KEYS_OF_A_PANEL = 8  # in a bucket on average, from which on panels of keys are faster than a query at a time


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, causal: bool, query_valid: Tensor | None
) -> tuple[QK, Tensor]:
    """Queries, keys and values without what padding contained."""
    queries = valid if query_valid is None else query_valid
    qk = QK(without_padding(q, queries), without_padding(k, valid), valid, causal, query_valid)
    return qk, without_padding(v, valid)


class LayoutExecutor(Executor, Protocol):
    """What multiplies a layout."""

    def attend(self, qk: QK, v: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Queries and keys without what padding contained, values of the shape of the keys → ``(B, H, N_q, D)`` in their dtype.

        The bucket ids of the layout are there for every head of queries, also where keys are shared.
        """

    def computed_pairs(self, qk: QK, layout: Layout) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64."""


class DenseExecutor(Executor, Protocol):
    """What multiplies all pairs that there are."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, normalizer: Normalizer | PerHead, dropout: float
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k``, ``v (B, H_k, N_k, D)``, of any precision → ``(B, H, N_q, D)``."""


_DENSE_EXECUTORS: tuple[DenseExecutor, ...] = (NativeDenseExecutor(), TritonDenseExecutor(), TilesExecutor())


@dataclass(frozen=True)
class Masked:
    """Dense attention with ``-inf`` outside the graph: ``p_i = normalizer(q_i·k_j / √D over j with graph_ij)``.

    A pattern with a tail (`Layout`) adds an entry for each query and bucket to the scores.
    """

    pattern: Pattern  # who may attend to whom
    normalizer: Normalizer = _ENTMAX15  # how the scores on the graph become probabilities
    causal: bool = False  # whether a query sees no later key

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, query_valid: Tensor | None = None
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k, v (B, H_k, N_k, D)``, ``valid (B, N_k)`` bool → ``(B, H, N_q, D)`` in the dtype of ``v``.

        ``query_valid``, ``(B, N_q)`` bool, is given in cross-attention.
        """
        qk, v = _prepared(q, k, v, valid, self.causal, query_valid)
        qk, v = qk.a_key_each, v.repeat_interleave(qk.group, dim=1)
        layout = self._layout(qk, layer)
        graph = self.graph(qk, layer) if layout is None else layout.graph(qk)
        exact = qk.with_vectors(at_least_float32(qk.q), at_least_float32(qk.k))
        scores = (exact.q / math.sqrt(q.shape[-1]) @ exact.k.mT).masked_fill(~graph, -math.inf)
        if layout is None:
            return self.normalizer(scores).to(v.dtype) @ v
        tail = entries(layout, exact, v.to(exact.q.dtype))
        probabilities, weights = with_clusters(scores, tail.mean, tail.variance, tail.numbers, self.normalizer.alpha)
        return probabilities.to(v.dtype) @ v + tail.apply(weights).to(v.dtype)

    @torch.no_grad()
    def graph(self, qk: QK, layer: int, rows: Tensor | None = None) -> Tensor:
        """The graph that is executed, ``(B, H, N_q, N_k)`` bool, or of it the rows of some queries, by their positions."""
        return _graph_of(self.pattern, qk.a_key_each, layer, rows)

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64: all of them, and the entries of a tail."""
        batch, heads, queries, keys = qk.graph_shape
        layout = self._layout(qk, layer)
        columns = keys + (0 if layout is None else layout.entries)
        return torch.full((batch, heads), queries * columns, device=qk.q.device)

    @torch.no_grad()
    def _layout(self, qk: QK, layer: int) -> Layout | None:
        """That of a pattern with a tail, None for one without."""
        if not has_tail(self.pattern):
            return None
        assert isinstance(self.pattern, HasLayout)  # nothing else can have a tail
        return self.pattern.layout(qk.a_key_each, layer)


@dataclass(frozen=True)
class Bucketed:
    """Sparsefinder's attention for real: only what is in the pattern's layout is multiplied, and nothing is N × N.

    The same output and gradients as ``Masked`` of the same pattern, to rounding. The pattern must have a ``layout``: buckets,
    a window, global tokens and unions of these. Work and memory are linear in N where buckets keep their size; a bucket with
    all tokens costs what dense attention costs. Four executors multiply it:

    - ``native``, C++ on a CPU (`sparsefinder.executors.native.bucketed`): a query at a time, the pairs of the graph and no
      others;
    - ``tailed``, C++ on a CPU (`sparsefinder.executors.native.tailed`), of a layout with a tail, or with softmax and buckets that
      share no key: clusters of keys as panels, some queries at a time; not causal;
    - ``blocks``, torch's products on any device (`sparsefinder.executors.blocks.decompose`): buckets are filled up to a few
      sizes, so that those of like size are one product (never up to the fullest one), and ``computed_pairs`` counts the
      filling;
    - ``triton``, kernels on a GPU (`sparsefinder.executors.triton`), float32 or half precision: only where it is asked for.

    ``auto`` is ``native`` or ``tailed`` wherever they work, which on a CPU need a C++ compiler the first time, and of the two
    ``tailed`` where buckets hold 8 keys or more on average; ``explain`` says what it took, before there are buckets.
    """

    pattern: Pattern  # who may attend to whom; must have a layout
    normalizer: Normalizer = _ENTMAX15  # how the scores on the graph become probabilities
    causal: bool = False  # whether a query sees no later key
    executor: str = AUTO  # auto, native, tailed, blocks or triton
    queries_at_once: int = 1 << 15  # of blocks: queries (once for each bucket) whose scores are in memory at one time
    block: int = 64  # of triton: queries and keys of a block, a power of two from 16

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, HasLayout):
            raise UserError(
                f"attention=bucketed got the pattern {type(self.pattern).__name__}, which has no layout (buckets, window, "
                "global tokens): choose a pattern with buckets such as kmeans or quantize, or use attention=masked"
            )
        check(self._executors(), self.executor)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, query_valid: Tensor | None = None
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k, v (B, H_k, N_k, D)``, ``valid (B, N_k)`` bool → ``(B, H, N_q, D)`` in the dtype of ``v``.

        ``query_valid``, ``(B, N_q)`` bool, is given in cross-attention.
        """
        qk, v = _prepared(q, k, v, valid, self.causal, query_valid)
        layout = self._layout(qk, layer)
        executor = choose(self._executors(layout), self.executor, self._work(qk, layout, v))
        return executor.attend(qk, v, layout, self.normalizer)

    @torch.no_grad()
    def graph(self, qk: QK, layer: int, rows: Tensor | None = None) -> Tensor:
        """The graph that is executed in its dense form, ``(B, H, N_q, N_k)`` bool, or the rows of some queries, by position."""
        return self._layout(qk, layer).graph(qk, rows)

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64: those of the graph, and but for ``native`` the filling too."""
        layout = self._layout(qk, layer)
        executor = choose(self._executors(layout), self.executor, self._work(qk, layout))
        return executor.computed_pairs(qk, layout)

    def explain(self, q: Tensor, *others: Tensor) -> str:
        """Which executor multiplies these queries (and keys and values) and why no other one does: a line for each."""
        return explain(self._executors(), self.executor, self._kind(Work.of(q, *others)))

    def _work(self, qk: QK, layout: Layout, *others: Tensor) -> Work:
        surrounded = bool(layout.window) or layout.is_global is not None
        disjoint = layout.buckets is not None and layout.buckets.k_ids.shape[-1] == 1
        kind = self._kind(Work.of(qk.q, qk.k, *others))
        return replace(kind, crosses=qk.crosses, surrounded=surrounded, disjoint=disjoint)

    def _kind(self, work: Work) -> Work:
        return replace(work, tail=has_tail(self.pattern), causal=self.causal, alpha=self.normalizer.alpha)

    def _executors(self, layout: Layout | None = None) -> tuple[LayoutExecutor, ...]:
        """In the order of preference, which depends on the buckets of a layout."""
        buckets = None if layout is None else layout.buckets
        full = buckets is not None and buckets.k_ids.shape[2] >= _KEYS_OF_A_PANEL * buckets.count
        on_cpu = (TailedExecutor(), NativeExecutor()) if full else (NativeExecutor(), TailedExecutor())
        return *on_cpu, BlocksExecutor(self.queries_at_once), TritonExecutor(self.block)

    @torch.no_grad()
    def _layout(self, qk: QK, layer: int) -> Layout:
        assert isinstance(self.pattern, HasLayout)  # checked when made
        return self.pattern.layout(qk.a_key_each, layer)


@dataclass(frozen=True)
class Dense:
    """Dense attention, exact, executed without a matrix of N × N: ``Masked(Full(), normalizer)`` to rounding.

    Entmax gives most keys a probability of zero, and which ones is known from their scores long before they are normalized;
    only the others take part in the threshold, in the product with ``v`` and in the gradients. Memory is linear in N. Executors:

    - ``native``, C++ on a CPU (`sparsefinder.executors.native.dense`): exact, and faster than softmax from some hundred tokens
      on;
    - ``triton``, kernels on a GPU (`sparsefinder.executors.triton.dense`), float32 or half precision, without masks besides
      padding, causal and window, without dropout and without a gradient for α;
    - ``tiles``, torch's products on any device (`sparsefinder.executors.blocks.dense_tiles`): some queries at a time, with the
      work of dense attention.

    ``auto`` is ``native`` wherever it works, which on a CPU needs a C++ compiler the first time, else ``tiles``. Softmax (α = 1)
    is torch's ``scaled_dot_product_attention`` with any, but for a window in C++. ``native`` and ``triton`` can be
    differentiated once, not twice.
    """

    normalizer: Normalizer | PerHead = _ENTMAX15  # how scores become probabilities; α may differ from head to head
    causal: bool = False  # whether a query sees no later key
    window: int = 0  # odd: a query sees itself and window // 2 keys on each side; 0 for all
    dropout: float = 0.0  # share of the probabilities that are set to zero, the others divided by what is left
    executor: str = AUTO  # auto, native, triton or tiles

    def __post_init__(self) -> None:
        check(_DENSE_EXECUTORS, self.executor)
        if self.window < 0 or (self.window and self.window % 2 == 0):
            raise UserError(f"window must be odd, or 0 for none, got {self.window}; try {self.window + 1}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be 0 or more and below 1, got {self.dropout}")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int = 0, query_valid: Tensor | None = None
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k, v (B, H_k, N_k, D)``, ``valid (B, N_k)`` bool → ``(B, H, N_q, D)`` in the dtype of ``v``.

        ``query_valid``, ``(B, N_q)`` bool, is given in cross-attention.
        """
        if self._is_softmax and not self.window and query_valid is None and q.device.type == "cpu":
            lengths = right_padded(valid)
            if lengths is not None and q.shape[2] == k.shape[2]:
                return self._softmax_of_texts(*exactly(q, k, v), lengths).to(v.dtype)
        qk, v = _prepared(q, k, v, valid, self.causal, query_valid)
        if self.window:
            qk.one_text(f"a window of {self.window} tokens")
        return self._attend(qk.q, qk.k, v, self._pairs(qk.queries_valid, valid))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Keys of another number, heads that are shared, and a mask of any kind; a query without a key gets zeros.

        Args:
            q: ``(B, H, N_q, D)``.
            k: ``(B, H_k, N_k, D)``, ``H`` a multiple of ``H_k``: as many heads of queries share one of keys.
            v: of the shape of ``k``.
            mask: None, or bool, True where a query may attend, ``(B, H, N_q, N_k)`` where each of the first three may be 1.

        Returns:
            ``(B, H, N_q, D)`` in the dtype of ``v``.
        """
        queries, keys = (  # all real
            torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device) for x in (q, k)
        )
        if mask is not None and mask.shape[1] == mask.shape[2] == 1:
            keys, mask = mask[:, 0, 0].expand_as(keys), None  # nothing but padding
        return self._attend(q, k, v, self._pairs(queries, keys, mask))

    def _pairs(self, query_valid: Tensor, key_valid: Tensor, mask: Tensor | None = None) -> Pairs:
        reach = self.window // 2 if self.window else None
        return Pairs(query_valid, key_valid, reach, 0 if self.causal else reach, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
        if self._is_softmax:
            return self._softmax(*exactly(q, k, v), pairs).to(v.dtype)
        work = self._work(q, k, v, masked=pairs.mask is not None)
        executor = choose(_DENSE_EXECUTORS, self.executor, work)
        return executor.attend(q, k, v, pairs, self.normalizer, self.dropout).to(v.dtype)

    def _work(self, q: Tensor, *others: Tensor, masked: bool = False) -> Work:
        alpha = self.normalizer.alpha
        learns = isinstance(alpha, Tensor) and alpha.requires_grad and torch.is_grad_enabled()
        return replace(Work.of(q, *others), masked=masked, dropout=self.dropout > 0.0, learns_alpha=learns)

    def explain(self, q: Tensor, *others: Tensor) -> str:
        """Which executor multiplies these queries (and keys and values) and why no other one does: a line for each."""
        if self._is_softmax:
            return "softmax: torch's scaled_dot_product_attention; a window in C++ where that works"
        return explain(_DENSE_EXECUTORS, self.executor, self._work(q, *others))

    @torch.no_grad()
    def graph(self, qk: QK, layer: int, rows: Tensor | None = None) -> Tensor:
        """Which pairs there are: ``(B, H, N, N)`` bool, or the rows of some queries, by their positions."""
        pairs = qk.allowed_of(rows).expand(-1, qk.q.shape[1], -1, -1)
        return pairs & band(qk.k.shape[2], self.window, qk.q.device, rows) if self.window else pairs

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs whose products are taken, exactly or not, ``(B, H)`` int64: all of them."""
        if self.window:
            return self.graph(qk, layer).sum((-2, -1))
        return qk.numbers_allowed[:, None].expand(qk.q.shape[:2])

    def _softmax_of_texts(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        """One text at a time, without a mask and without copies: what is cut off is never computed."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shared = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(
                *(q, k, v, None, self.dropout), is_causal=self.causal, enable_gqa=shared
            )

        if all(length == q.shape[2] for length in lengths):
            return attend(q, k, v)
        output = v.new_zeros(q.transpose(1, 2).shape).transpose(1, 2)  # in the order of what torch returns
        for row, length in enumerate(lengths):
            output[row, :, :length] = attend(*(x[row : row + 1, :, :length] for x in (q, k, v)))[0]
        return output

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
        if self._is_banded(q, k, pairs):
            qk = QK(q, k, pairs.key_valid, self.causal)
            return NativeExecutor().attend(qk, v, Layout(window=self.window), Normalizer(1.0))
        plain = pairs.mask is None and not self.window and bool(pairs.key_valid.all())
        mask = None if plain else pairs.allowed(0, q.shape[2])
        out = F.scaled_dot_product_attention(
            *(q, k, v, mask, self.dropout), is_causal=plain and self.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        present = pairs.query_valid[:, None, :, None]
        return out.masked_fill(~(present if mask is None else present & mask.any(-1, keepdim=True)), 0.0)

    def _is_banded(self, q: Tensor, k: Tensor, pairs: Pairs) -> bool:
        """Whether softmax multiplies a band alone: torch has none, and with a mask it takes all products."""
        same = pairs.query_valid is pairs.key_valid and q.shape == k.shape and pairs.mask is None
        able = self.executor in (AUTO, NativeDenseExecutor.name) and not NativeExecutor().why_not(Work.of(q, k))
        return bool(self.window) and same and able and not self.dropout

    @property
    def _is_softmax(self) -> bool:
        return isinstance(self.normalizer, Normalizer) and self.normalizer.alpha == 1.0


def _graph_of(pattern: Pattern, qk: QK, layer: int, rows: Tensor | None) -> Tensor:
    """The rows of a pattern's graph that belong to some queries.

    A pattern that looks at each query by itself (its attribute ``each_query_alone``) is asked about these alone, which costs
    ``S · N``; any other, and every one in causal attention, makes its whole graph.

    Args:
        pattern: Any.
        qk: Queries and keys.
        layer: Index of the layer.
        rows: ``(S,)`` int64, positions of the queries; None for all.

    Returns:
        ``(B, H, S or N_q, N_k)`` bool.
    """
    if rows is None:
        return pattern(qk, layer)
    if each_query_alone(pattern) and not qk.causal:
        return pattern(qk.of_queries(rows), layer)
    return pattern(qk, layer)[:, :, rows]
