"""LSG attention on bare tensors: local blocks, sparse keys and global tokens.

Condevaux and Harispe 2022 (https://arxiv.org/abs/2210.15497). Of a sequence of N tokens the first `num_global_tokens` are
global: in an LSG model they are learned vectors put before the text; inside a model that has none, its own first
tokens serve (usually [CLS]). The others are cut into blocks. A query sees its own block and both neighbours, the sparse
keys on either side of these (`sparse_keys`), and the global tokens; a global token sees everything. Up to two blocks that
is all there is, so attention is then dense, as published, and `computed_pairs` says so.

When causal, a query sees what of this lies before it, and a global token the global tokens before it (it comes first, so it
cannot see the text). The published decoder instead hands the query of a global token on as its output, and its first
versions replace the scores inside a block by zeros; this one is a plain causal attention on the graph above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefinder.executors.local_sparse_global.block_layout import attend, local_attention, view_size, visible
from sparsefinder.executors.local_sparse_global.settings import LSGSettings
from sparsefinder.executors.local_sparse_global.sparse_keys import choose, pick
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.numerics.pairs import allowed_pairs
from sparsefinder.numerics.tracing import known, recorded

SOFTMAX = Normalizer(1.0)


@dataclass(frozen=True)
class LSGAttention(LSGSettings):
    """An `Attention`: `(q, k, v, valid, layer) → output`. Settings are those of `LSGSettings`, and:"""

    num_global_tokens: int = 0
    """How many of the first tokens see all and are seen by all."""
    normalizer: Normalizer = SOFTMAX
    """How the scores in view become probabilities."""
    causal: bool = False
    """A query sees no later key."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int = 0, dropout: float = 0.0) -> Tensor:
        """Padding may lie anywhere and hold anything: real tokens are brought together first.

        (With `padding_in_pools`, padding must be finite and on the right, and gets outputs too.)

        Args:
            q: `(B, H, N, D)`.
            k: `(B, H_k, N, D)`.
            v: `(B, H_k, N, D)`.
            valid: `(B, N)` bool.
            layer: names the random projections of `lsh`.
            dropout: share of the probabilities that are set to zero.

        Returns:
            `(B, H, N, D)`, zeros on padding.
        """
        tokens = q.shape[2]
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if self.pools_padding and not self._dense(tokens):
            return self._on_packed(q, k, v, valid, layer, dropout)
        packed = pack(valid)
        padding = ~packed.valid[:, None, :, None]
        q, k, v = (packed.bring(x) for x in (q, k, v))
        if not known(packed.valid.all()):
            # zeros on padding, because a score of NaN stays NaN under any mask
            q, k, v = (x.masked_fill(padding, 0.0) for x in (q, k, v))
        output = self._on_packed(q, k, v, packed.valid, layer, dropout)
        output = output.masked_fill(padding, 0.0)
        return packed.put_back(output, tokens)

    def graph(self, qk: QK, layer: int = 0, rows: Tensor | None = None) -> Tensor | None:
        """Pairs of tokens that attend, `(B, H, N, N)` bool; None where keys are pooled: there is no such graph.

        `qk.causal` is not read: the attention knows whether it is causal.

        Args:
            qk: queries and keys.
            layer: not read.
            rows: `(S,)` int64, positions of the queries that are asked about; None for all. Where nothing is padding they cost
                `S · N`.
        """
        tokens = qk.k.shape[2]
        if rows is not None and not bool(qk.valid.all()):  # positions are others among real tokens
            whole = self.graph(qk, layer)
            return None if whole is None else whole[:, :, rows]
        packed = pack(qk.valid)
        k = packed.bring(qk.a_key_each.k)
        if self._dense(k.shape[2]):
            graph = self._allowed(packed.valid, rows).expand(-1, k.shape[1], -1, -1)
        elif self.pooled:
            return None
        else:
            graph = self._block_graph(k, packed.valid, rows) & self._allowed(packed.valid, rows)
        if rows is not None:
            return graph
        each = packed.put_back(graph, tokens)
        return packed.put_back(each.transpose(-1, -2), tokens).transpose(-1, -2).contiguous()

    def computed_pairs(self, qk: QK, layer: int = 0) -> Tensor:
        """Pairs whose score is computed, padding and block ends included, `(B, H)` int64."""
        tokens = qk.k.shape[2] if self.pools_padding else int(qk.lengths.max())
        if self._dense(tokens):
            pairs = tokens * tokens
        else:
            prefix = self.num_global_tokens
            padded = -(-(tokens - prefix) // self.block_size) * self.block_size
            pairs = padded * view_size(self, prefix, self.causal) + prefix * (prefix if self.causal else tokens)
        return torch.full(qk.q.shape[:2], pairs, dtype=torch.int64, device=qk.k.device)

    def _dense(self, tokens: int) -> bool:
        return tokens - self.num_global_tokens <= 2 * self.block_size

    def _visible_keys(self, valid: Tensor) -> Tensor:
        """`valid` without the first token after the global ones, if that is masked."""
        if not self.mask_first_token or valid.shape[1] <= self.num_global_tokens:
            return valid
        hidden = valid.clone()
        hidden[:, self.num_global_tokens] = False
        return hidden

    def _allowed(self, valid: Tensor, rows: Tensor | None = None) -> Tensor:
        """Pairs of a dense attention, `(B, 1, N, N)` bool, or the rows of some queries."""
        pairs = allowed_pairs(valid, self.causal, rows=rows)
        return pairs & self._visible_keys(valid)[:, None, None, :] if self.mask_first_token else pairs

    def _on_packed(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, dropout: float) -> Tensor:
        seen = self._visible_keys(valid)
        mask = None if known(seen.all()) else seen[:, None, None, :]
        if self._dense(q.shape[2]):
            mask = self._allowed(valid) if self.causal else mask
            return attend(q, k, v, mask, self.normalizer, dropout)
        prefix = self.num_global_tokens
        parts = [self._blocks(q, k, v, seen, layer, dropout)]
        if prefix and self.causal:
            corner = self._allowed(valid)[..., :prefix, :prefix]
            parts.insert(
                0, attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], corner, self.normalizer, dropout)
            )
        elif prefix:
            parts.insert(0, attend(q[:, :, :prefix], k, v, mask, self.normalizer, dropout))
        return torch.cat(parts, dim=2)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, layer: int, dropout: float) -> Tensor:
        """Output of the tokens after the global ones, `(B, H, N − G, D)`."""
        batch, heads, tokens, size = q.shape
        prefix = self.num_global_tokens
        fill = -(tokens - prefix) % self.block_size
        head = (k[:, :, :prefix].flatten(0, 1), v[:, :, :prefix].flatten(0, 1))
        q, k, v = (F.pad(x[:, :, prefix:], (0, 0, 0, fill)) if fill else x[:, :, prefix:] for x in (q, k, v))
        seen = F.pad(seen[:, prefix:], (0, fill))
        rows = seen[:, None].expand(-1, heads, -1).flatten(0, 1)
        if self.has_sparse:
            sparse = choose(q, k, v, seen, self, layer)
            sparse_valid = sparse.valid.flatten(0, 1)
            pair = (sparse.keys.flatten(0, 1), sparse.values.flatten(0, 1))
        else:
            sparse_valid, pair = rows[:, :0], (k.flatten(0, 1)[:, :0], v.flatten(0, 1)[:, :0])
        output = local_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            key_mask=visible(rows, sparse_valid, prefix, self, self.causal),
            sparse=pair,
            global_prefix=head,
            settings=self,
            normalizer=self.normalizer,
            causal=self.causal,
            dropout=dropout,
        )
        return output.view(batch, heads, -1, size)[:, :, : tokens - prefix]

    def view(self, k: Tensor, valid: Tensor) -> Tensor:
        """Keys after the global ones that each block of queries sees, `(B, H, blocks, T)` bool, `T` the text in whole blocks.

        For types that pick tokens. Padding and causality inside the local blocks are not taken out yet.

        Args:
            k: `(B, H, N, D)`, real tokens together, see `pack`.
            valid: `(B, N)` bool, the same.
        """
        prefix, block = self.num_global_tokens, self.block_size
        fill = -(k.shape[2] - prefix) % block
        text = k.shape[2] - prefix + fill
        block_of = torch.arange(text, device=k.device) // block
        each = torch.arange(text // block, device=k.device)
        local = ((each[:, None] - block_of).abs() <= 1).expand(*k.shape[:2], -1, -1)
        if not self.has_sparse:
            return local
        seen = F.pad(self._visible_keys(valid)[:, prefix:], (0, fill))
        return local | self._sparse_view(pick(F.pad(k[:, :, prefix:], (0, 0, 0, fill)), seen, self), text)

    def _block_graph(self, k: Tensor, valid: Tensor, rows: Tensor | None) -> Tensor:
        """Edges of global, local and sparse keys before padding and causality are taken out, `(B, H, S or N, N)` bool."""
        tokens, prefix = k.shape[2], self.num_global_tokens
        queries = torch.arange(tokens, device=k.device) if rows is None else rows
        block = (queries - prefix).clamp_min(0) // self.block_size
        of_text = self.view(k, valid)[:, :, block, : tokens - prefix] | (queries < prefix)[:, None]
        return F.pad(of_text, (prefix, 0), value=True)

    def _sparse_view(self, picked: Tensor, text: int) -> Tensor:
        """`picked (B, H, S)` positions → `(B, H, blocks, text)` bool: the sparse keys in each block's view."""
        width, per_block = self.sparse_block_size, self.sparse_per_block
        index = torch.arange(picked.shape[-1], device=picked.device)
        start = torch.arange(text // self.block_size, device=picked.device)[:, None] * per_block
        left = (index >= start - per_block - width) & (index < start - per_block)
        right = (index >= start + 2 * per_block) & (index < start + 2 * per_block + width)
        in_view = left if self.causal else left | right
        edges = torch.zeros(*picked.shape[:2], len(start), text, dtype=torch.int32, device=picked.device)
        position = picked[:, :, None].expand(-1, -1, len(start), -1)
        edges.scatter_add_(3, position, in_view.int().expand_as(position).contiguous())
        return edges.bool()


class _Packed(NamedTuple):
    """Real tokens brought together, and the way back."""

    valid: Tensor
    bring: Callable[[Tensor], Tensor]
    put_back: Callable[[Tensor, int], Tensor]


def pack(valid: Tensor) -> _Packed:
    """Bring the real tokens of each example together and cut what no example needs.

    Blocks are then counted from an example's own first token, so padding, on whichever side, moves nothing.
    """
    lengths = valid.sum(-1)
    longest = valid.shape[1] if recorded() else max(int(lengths.max()), 1)
    packed = torch.arange(longest, device=valid.device) < lengths[:, None]
    if known((valid[:, :longest] == packed).all()):
        return _Packed(packed, lambda x: x[:, :, :longest], lambda x, n: F.pad(x, (0, 0, 0, n - longest)))
    order = valid.logical_not().argsort(dim=-1, stable=True)
    back = order.argsort(dim=-1)

    def bring(x: Tensor) -> Tensor:
        return _take(x, order[:, :longest])

    def put_back(x: Tensor, tokens: int) -> Tensor:
        return _take(F.pad(x, (0, 0, 0, tokens - longest)), back)

    return _Packed(packed, bring, put_back)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Rows of `x (B, H, N, D)` in the order `(B, n)` of each example."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
