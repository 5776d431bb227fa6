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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsefinder.executors.native.attention as native
import sparsefinder.executors.native.dense as native_dense
from sparsefinder.errors import UserError, one_of
from sparsefinder.executors.blocks import dense_tiles
from sparsefinder.executors.blocks.decompose import Pieces, cut
from sparsefinder.executors.blocks.head_chunks import Shares, shares_of
from sparsefinder.executors.native.dense import Pairs
from sparsefinder.graphs import QK, HasLayout, Layout, Pattern, band
from sparsefinder.numerics.normalizers import Normalizer, PerHead
from sparsefinder.numerics.padding import at_least_float32, without_padding

EXECUTORS = ("auto", "native", "blocks")
DENSE_EXECUTORS = ("auto", "native", "tiles")
_ENTMAX15 = Normalizer(1.5)  # the normalizer of the gold graphs


@dataclass(frozen=True)
class Masked:
    """Dense attention with ``-inf`` outside the graph: ``p_i = normalizer(q_i·k_j / √D over j with graph_ij)``."""

    pattern: Pattern  # who may attend to whom
    normalizer: Normalizer = _ENTMAX15  # how the scores on the graph become probabilities
    causal: bool = False  # whether a query sees no later key

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        """``q, k, v (B, H, N, D)``, ``valid (B, N)`` bool → ``(B, H, N, D)`` in the dtype of ``v``."""
        q, k, v = without_padding(q, valid), without_padding(k, valid), without_padding(v, valid)
        graph = self.graph(QK(q, k, valid, self.causal), layer)
        scores = at_least_float32(q) / math.sqrt(q.shape[-1]) @ at_least_float32(k).transpose(-1, -2)
        probabilities = self.normalizer(scores.masked_fill(~graph, -math.inf))
        return probabilities.to(v.dtype) @ v

    @torch.no_grad()
    def graph(self, qk: QK, layer: int) -> Tensor:
        """The graph that is executed, ``(B, H, N, N)`` bool."""
        return self.pattern(qk, layer)

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64: all of them."""
        batch, heads, tokens, _ = qk.q.shape
        return torch.full((batch, heads), tokens * tokens, device=qk.q.device)


@dataclass(frozen=True)
class Bucketed:
    """Sparsefinder's attention for real: only what is in the pattern's layout is multiplied, and nothing is N × N.

    The same output and gradients as ``Masked`` of the same pattern, to rounding. The pattern must have a ``layout``: buckets,
    a window, global tokens and unions of these. Work and memory are linear in N where buckets keep their size; a bucket with
    all tokens costs what dense attention costs. Two executors multiply it:

    - ``native``, C++ on a CPU (`sparsefinder.executors.native.attention`): a query at a time, the pairs of the graph and no
      others;
    - ``blocks``, torch's products on any device (`sparsefinder.executors.blocks.decompose`): buckets are filled up to a few
      sizes, so that those of like size are one product (never up to the fullest one), and ``computed_pairs`` counts the
      filling.

    ``auto`` is ``native`` wherever it works, which on a CPU needs a C++ compiler the first time.
    """

    pattern: Pattern  # who may attend to whom; must have a layout
    normalizer: Normalizer = _ENTMAX15  # how the scores on the graph become probabilities
    causal: bool = False  # whether a query sees no later key
    executor: str = "auto"  # auto, native or blocks
    queries_at_once: int = 1 << 15  # of blocks: queries (once for each bucket) whose scores are in memory at one time

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, HasLayout):
            raise UserError(
                f"attention=bucketed got the pattern {type(self.pattern).__name__}, which has no layout (buckets, window, "
                "global tokens): choose a pattern with buckets such as kmeans or quantize, or use attention=masked"
            )
        if self.executor not in EXECUTORS:
            raise UserError(f"executor={self.executor} is unknown; {one_of(EXECUTORS, self.executor)}")
        if self.executor == "native":
            native.require()
        if self.queries_at_once < 1:
            raise UserError(f"queries_at_once must be 1 query or more, got {self.queries_at_once}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        """``q, k, v (B, H, N, D)``, ``valid (B, N)`` bool → ``(B, H, N, D)`` in the dtype of ``v``."""
        q, k, v = without_padding(q, valid), without_padding(k, valid), without_padding(v, valid)
        qk = QK(q, k, valid, self.causal)
        if self._is_native(q):
            exact = qk.with_vectors(at_least_float32(q), at_least_float32(k))
            return native.attend(exact, v, self._layout(qk, layer), self.normalizer.alpha)
        layout, shares = self._layout_and_shares(qk, layer)
        vectors = (shares.split(x) for x in (at_least_float32(q), at_least_float32(k), v))
        parts = zip(shares.split_layout(layout, qk), *vectors, strict=True)
        return shares.join([self._attend(cut(*part), *vectors) for part, *vectors in parts])

    @torch.no_grad()
    def graph(self, qk: QK, layer: int) -> Tensor:
        """The graph that is executed, in its dense form: ``(B, H, N, N)`` bool."""
        return self._layout(qk, layer).graph(qk)

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64: those of the graph, and with ``blocks`` the filling too."""
        if self._is_native(qk.q):
            return native.pairs(qk, self._layout(qk, layer))
        layout, shares = self._layout_and_shares(qk, layer)
        return shares.join([cut(*part).computed_pairs() for part in shares.split_layout(layout, qk)])

    def _attend(self, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q / math.sqrt(q.shape[-1])
        rows = pieces.rows()
        probabilities = self.normalizer.each(rows.pack(pieces.scores(q, k)))
        out = pieces.apply(rows.unpack(probabilities).to(v.dtype), v)
        if pieces.globals is None:
            return out
        probabilities_of_globals = self.normalizer(pieces.globals.query_scores(q, k))
        return pieces.globals.add(out, probabilities_of_globals.to(v.dtype) @ v)

    def _is_native(self, q: Tensor) -> bool:
        if self.executor == "auto":
            return native.works_on(q.device)
        if self.executor == "native" and q.device.type != "cpu":
            raise UserError(f"executor=native runs on a CPU, the queries are on {q.device}: choose executor=blocks")
        return self.executor == "native"

    @torch.no_grad()
    def _layout(self, qk: QK, layer: int) -> Layout:
        assert isinstance(self.pattern, HasLayout)  # checked when made
        return self.pattern.layout(qk, layer)

    def _layout_and_shares(self, qk: QK, layer: int) -> tuple[Layout, Shares]:
        layout = self._layout(qk, layer)
        times = 1.0  # that a query is multiplied, once for each of its buckets
        if layout.buckets is not None and layout.buckets.q_ids.numel():
            times = max((layout.buckets.q_ids >= 0).sum(-1).double().mean().item(), 1.0)
        return layout, shares_of(qk, max(int(self.queries_at_once / times), 1))


@dataclass(frozen=True)
class Dense:
    """Dense attention, exact, executed without a matrix of N × N: ``Masked(Full(), normalizer)`` to rounding.

    Entmax gives most keys a probability of zero, and which ones can be told from their scores long before they are normalized;
    only the others take part in the threshold, in the product with ``v`` and in the gradients. Memory is linear in N. Executors:

    - ``native``, C++ on a CPU (`sparsefinder.executors.native.dense`): exact, and faster than softmax from some hundred tokens
      on;
    - ``tiles``, torch's products on any device (`sparsefinder.executors.blocks.dense_tiles`): some queries at a time, with the
      work of dense attention.

    ``auto`` is ``native`` wherever it works, which on a CPU needs a C++ compiler the first time. Softmax (α = 1) is torch's
    ``scaled_dot_product_attention`` with either. ``native`` can be differentiated once, not twice.
    """

    normalizer: Normalizer | PerHead = _ENTMAX15  # how scores become probabilities; α may differ from head to head
    causal: bool = False  # whether a query sees no later key
    window: int = 0  # odd: a query sees itself and window // 2 keys on each side; 0 for all
    dropout: float = 0.0  # share of the probabilities that are set to zero, the others divided by what is left
    executor: str = "auto"  # auto, native or tiles

    def __post_init__(self) -> None:
        if self.executor not in DENSE_EXECUTORS:
            raise UserError(f"executor={self.executor} is unknown; {one_of(DENSE_EXECUTORS, self.executor)}")
        if self.window < 0 or (self.window and self.window % 2 == 0):
            raise UserError(f"window must be odd, or 0 for none, got {self.window}; try {self.window + 1}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be 0 or more and below 1, got {self.dropout}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int = 0) -> Tensor:
        """``q, k, v (B, H, N, D)``, ``valid (B, N)`` bool → ``(B, H, N, D)`` in the dtype of ``v``."""
        q, k, v = without_padding(q, valid), without_padding(k, valid), without_padding(v, valid)
        return self._attend(q, k, v, self._pairs(valid, valid))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``q (B, H, N_q, D)``, ``k``, ``v (B, H_k, N_k, D)`` → ``(B, H, N_q, D)`` in the dtype of ``v``.

        ``H`` is a multiple of ``H_k``: as many heads of queries share one of keys. ``mask``: None, or bool, True where a query
        may attend, ``(B, H, N_q, N_k)`` where each of the first three may be 1. A query without a key gets zeros.
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
        exact = (at_least_float32(q), at_least_float32(k), v.to(at_least_float32(q).dtype))
        if isinstance(self.normalizer, Normalizer) and self.normalizer.alpha == 1.0:
            return self._softmax(*exact, pairs).to(v.dtype)
        if self._is_native(exact[0]):
            alpha = self.normalizer.alpha
            alpha = alpha if isinstance(alpha, Tensor) else torch.full((q.shape[1],), alpha, dtype=torch.float64)
            seed = int(torch.randint(1 << 62, ())) if self.dropout else 0
            return native_dense.attend(*exact, pairs, alpha, self.dropout, seed).to(v.dtype)
        out = dense_tiles.attend(*exact, pairs.allowed, self.normalizer, self.dropout)
        return out.masked_fill(~pairs.query_valid[:, None, :, None], 0.0).to(v.dtype)

    @torch.no_grad()
    def graph(self, qk: QK, layer: int) -> Tensor:
        """Which pairs there are: ``(B, H, N, N)`` bool."""
        pairs = qk.allowed.expand(-1, qk.q.shape[1], -1, -1)
        return pairs & band(qk.q.shape[2], self.window, qk.q.device) if self.window else pairs

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs whose products are taken, exactly or not, ``(B, H)`` int64: all of them."""
        return self.graph(qk, layer).sum((-2, -1))

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
        plain = pairs.mask is None and not self.window and bool(pairs.key_valid.all())
        mask = None if plain else pairs.allowed(0, q.shape[2])
        out = F.scaled_dot_product_attention(
            *(q, k, v, mask, self.dropout), is_causal=plain and self.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        present = pairs.query_valid[:, None, :, None]
        return out.masked_fill(~(present if mask is None else present & mask.any(-1, keepdim=True)), 0.0)

    def _is_native(self, q: Tensor) -> bool:
        if self.executor == "auto":
            return native_dense.works_on(q)
        if self.executor == "native" and not native_dense.works_on(q):
            raise UserError(
                f"executor=native needs a CPU and a C++ compiler, the queries are on {q.device}: choose executor=tiles"
            )
        return self.executor == "native"
