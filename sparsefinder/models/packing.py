"""Sentences packed into one row, by a mask ``(B, 1, N, N)``: taken apart before an attention, put together after it.

An attention here is given ``valid (B, N)``, which tokens are real. Such a mask says more: who may see whom. Where that is nothing
but "tokens of one sentence see each other", each sentence becomes a row of its own, so that any attention, a pattern that
ranks keys and one that pools them too, does with it what it does with the sentence alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.models.masks import is_past, pairs_of, split_mask


@dataclass(frozen=True)
class Sentences:
    """The sentences of a batch: ``S`` of them, the longest of ``M`` tokens."""

    index: Tensor  # (S, M) int64, positions of their tokens among B·N; any position where they are shorter
    valid: Tensor  # (S, M) bool

    def apart(self, x: Tensor) -> Tensor:
        """``(B, H, N, D)`` → ``(S, H, M, D)``."""
        return x.transpose(1, 2).flatten(0, 1)[self.index].transpose(1, 2)

    def together(self, x: Tensor, shape: torch.Size) -> Tensor:
        """``(S, H, M, D)`` → ``shape``, which is ``(B, H, N, D)``; zeros for tokens of no sentence."""
        batch, heads, tokens, size = shape
        flat = x.new_zeros(batch * tokens, heads, size)
        flat = flat.index_put((self.index[self.valid],), x.transpose(1, 2)[self.valid])
        return flat.unflatten(0, (batch, tokens)).transpose(1, 2)


def read_mask_between(mask: Tensor | None, k: Tensor) -> Tensor:
    """Which keys of cross-attention are real: ``(B, N_k)`` bool.

    Args:
        mask: None, or ``(B, 1, N_q or 1, N_k)``, as an attention of transformers gets it.
        k: keys ``(B, H_k, N_k, D)``.

    Raises:
        UserError: for a mask that is not padding.
    """
    batch, _, keys, _ = k.shape
    if mask is None:
        return torch.ones(batch, keys, dtype=torch.bool, device=k.device)
    pairs = _pairs(mask)[:, 0]
    if bool((pairs != pairs[:, :1]).any()):
        raise UserError("a mask of cross-attention that differs from query to query is not honoured by this attention")
    return pairs[:, 0].expand(batch, keys)


def _pairs(mask: Tensor) -> Tensor:
    """Where a query may attend, ``(B, 1, …)``; a `UserError` for a mask that says more."""
    pairs, bias = split_mask(mask)
    if bias is not None and bool((bias[pairs] != 0).any()):
        raise UserError("a mask that adds other numbers than 0 to the scores is not honoured here; give a boolean one")
    if bool((pairs != pairs[:, :1]).any()):
        raise UserError(
            "a mask that differs from head to head is not honoured here; give one mask (B, 1, N, N) for all"
        )
    return pairs


def read_mask(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Sentences | None]:
    """Which tokens are real and, where a row holds several sentences, these.

    Args:
        mask: None, ``(B, 1, N, N)``, ``(B, 1, 1, N)`` for padding, or `sparsefinder.models.masks.past`, as an attention of
            transformers gets it.
        q: queries ``(B, H, N, D)``.
        k: keys ``(B, H_k, N, D)``.
        causal: whether the attention sees no later key by itself.

    Returns:
        ``valid (B, N)`` bool, and the sentences; None where each row is one.

    Raises:
        UserError: for a mask that is neither padding nor packing, which nothing but dense attention can honour.
    """
    batch, _, tokens, _ = q.shape
    if k.shape[2] != tokens:
        raise UserError(
            f"this attention needs as many keys as queries, got {k.shape[2]} and {tokens}: read whole texts, use_cache=False"
        )
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=q.device), None
    if causal and is_past(mask, tokens):
        return mask[:, 0, 0].expand(batch, tokens), None
    pairs = _pairs(pairs_of(mask, tokens))
    if pairs.shape[-2] == 1:
        return pairs[:, 0, 0].expand(batch, tokens), None
    pairs = pairs[:, 0].expand(batch, tokens, tokens)
    seen = pairs.any(-2)
    if bool((pairs == seen[:, None]).all()):  # all rows are one, as in whatever was made from a mask (B, N)
        return seen, None
    valid = pairs.diagonal(dim1=-2, dim2=-1)
    first = pairs.byte().argmax(-1)  # of the keys that a token sees: one and the same for those of a sentence
    expected = (first[:, :, None] == first[:, None]) & valid[:, None]
    if causal:
        expected = expected.tril()
    if bool(((pairs != expected) & valid[:, :, None]).any()) or bool((pairs & ~valid[:, None]).any()):
        raise UserError(
            "a mask (B, 1, N, N) that is neither padding nor sentences side by side is not honoured by this attention; "
            "use the model's own dense attention, without another plugged in"
            + ("" if causal else " (for a causal mask: an attention with causal=True)")
        )
    key = (first + torch.arange(batch, device=first.device)[:, None] * tokens)[valid]  # one for each sentence
    of, lengths = torch.unique(key, return_inverse=True, return_counts=True)[1:]
    if len(lengths) == int(valid.any(-1).sum()):
        return valid, None
    position = torch.arange(len(key), device=key.device)
    order = torch.argsort(of, stable=True)
    first = lengths.cumsum(0) - lengths
    index = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64, device=key.device)
    index[of[order], position - first[of[order]]] = valid.flatten().nonzero()[:, 0][order]
    return valid, Sentences(index, torch.arange(index.shape[1], device=key.device) < lengths[:, None])
