"""The attention that transformers calls for models with α-entmax attention, and while another attention is plugged into one.

`sparsefinder.models.entmax_configuration` enters `attend` into transformers' registry of attention functions and, under the
same name, a boolean mask into that of mask functions: without the second, transformers hands over no mask and padding is
attended, silently. What `attend` does is decided by the module that it is called from:

- dense attention with the normalizer that the model's configuration remembers, for each head where it has one for each;
- whatever is plugged into the module (`sparsefinder.models.plugged`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsefinder.attention import Dense
from sparsefinder.errors import UserError
from sparsefinder.models.entmax_configuration import ALPHA, PUBLISHED
from sparsefinder.models.masks import causal_of, keys_seen, pairs_of, split_mask, window_of
from sparsefinder.models.replacement.each_head import alphas_of, temperature_of
from sparsefinder.models.transformers_internals import weights_are_collected
from sparsefinder.numerics.normalizers import Normalizer, PerHead, is_recorded

PLUG = "_sparsefinder_plug"  # attribute of an attention module while something is plugged in

_UNKNOWN = ("softcap", "s_aux")  # what some models do to scores, and this attention does not


class Plugged(Protocol):
    """What an attention module carries while something is plugged in."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor: ...


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: ``(B, H, N, D)`` → ``(B, N, H, D)``, and the probabilities where there are any.

    Keys and values may have fewer heads, which are shared, or be those of another text. ``attention_mask``: None, or
    ``(B, 1, N, N)``, ``(B, 1, 1, N)`` where all queries see the same keys, or `band` or `past` of `sparsefinder.models.masks`;
    bool with True where a query may attend, or numbers that are added to the scores. Probabilities are a matrix ``N × N``, and
    made only where they are asked for.
    """
    if unknown := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise UserError(f"{type(module).__name__} attends with {unknown[0]}, which entmax attention does not know")
    if (bias := others.get("position_bias")) is not None:
        attention_mask = _with_bias(attention_mask, bias)
    natural = 1.0 / math.sqrt(query.shape[-1])
    if scaling is not None and not math.isclose(scaling, natural):
        query = query * (scaling / natural)
    if (temperature := temperature_of(module.config, module)) is not None:
        query = temperature(query, keys_seen(attention_mask, query, key))
    plug: Plugged | None = module.__dict__.get(PLUG)
    if plug is not None:
        if others.get("output_attentions") or weights_are_collected():
            raise UserError(
                "another attention is in the place of this model's own, and gives no weights: leave out output_attentions, or "
                "call sparsefinder.detach(model) first; sparsefinder.explain says what is attended to"
            )
        output = plug(module, query, key, value, attention_mask)
        return output.transpose(1, 2).contiguous(), None
    dense = Dense(normalizer_at(module.config, module), dropout=dropout if module.training else 0.0)
    if others.get("output_attentions") or weights_are_collected() or is_recorded() or _adds(attention_mask):
        return _with_probabilities(query, key, value, attention_mask, dense)
    # float32 also under autocast: the support and the sum of a row do not survive half precision
    with torch.autocast(query.device.type, enabled=False):
        return _attend(module, query, key, value, attention_mask, dense).transpose(1, 2).contiguous(), None


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dense: Dense) -> Tensor:
    """Dense attention under a boolean mask; of a sliding layer the band alone."""
    size = getattr(module, "sliding_window", None)
    reach = (
        0 if size is None else size - 1
    )  # as transformers' own layers count: the token itself is one of `sliding_window`
    band = window_of(mask, reach, q.shape[2]) if reach > 0 else None
    if band is None:
        real = causal_of(mask, q.shape[2])
        if real is not None:
            return replace(dense, causal=True)(q, k, v, real.expand(q.shape[0], -1))
        return dense.attend(q, k, v, None if mask is None else pairs_of(mask, q.shape[2]))
    valid, causal = band
    banded = replace(dense, causal=causal, window=2 * reach + 1)
    if dense.normalizer.sparse:
        return banded.attend(q, k, v, valid[:, None, None])
    # softmax is ours only while something is plugged in, and then padded queries get zeros in the other layers too
    return banded(q, k, v, valid.expand(q.shape[0], -1))


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor | None:
    """A mask with a bias on the scores ``(1 or B, H, N_q, N_k)``; one that is zero everywhere, as between T5's texts, is none."""
    if not bool(bias.any()):
        return mask
    if mask is None:
        return bias
    present, added = split_mask(pairs_of(mask, bias.shape[2]))
    return (bias if added is None else bias + added).masked_fill(~present, -math.inf)


def _adds(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def normalizer_at(config: Any, module: Any) -> Normalizer | PerHead:
    """The normalizer that a configuration remembers for one attention module of its model; α = 1 where it remembers none."""
    of_heads = alphas_of(config, module)
    if of_heads is not None:
        return of_heads
    if getattr(config, ALPHA, None) is None:
        if getattr(module, "sliding_window", None) is not None:
            return Normalizer(1.0)
        published = getattr(config, PUBLISHED, 1.0)
        if isinstance(published, (list, tuple)):
            return Normalizer(published[module.layer_idx])
    return normalizer_of(config)


def normalizer_of(config: Any) -> Normalizer:
    """The one normalizer of the (global) layers as a whole that a configuration remembers; α = 1 where it remembers none.

    Raises:
        UserError: The layers, or their heads, have more than one α.
    """
    own: Any = getattr(config, ALPHA, None)
    alpha: Any = getattr(config, PUBLISHED, 1.0) if own is None else own
    if own is not None and isinstance(own, (list, tuple)):
        raise UserError(
            f"{ALPHA} in this model's configuration differs from head to head, and one α for all was needed here: recorded "
            "files, patterns and conversions know no other. The model itself attends, trains and is saved with its own "
            "(finetune.per_head.alpha=false finetunes it with one)"
        )
    if isinstance(alpha, (list, tuple)):
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(alpha)
        distinct = {each for each, kind in zip(alpha, kinds, strict=True) if kind != "sliding_attention"}
        if len(distinct) > 1:
            raise UserError(f"{PUBLISHED}={list(alpha)} differs from layer to layer, and one α for all was needed here")
        alpha = distinct.pop() if distinct else 1.0
    return Normalizer(alpha)


def _with_probabilities(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dense: Dense
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            present, bias = split_mask(pairs_of(mask, query.shape[2]))
            if bias is not None:
                scores = scores + bias.float()
            scores = scores.masked_fill(~present, -math.inf)
        probabilities = nn.functional.dropout(dense.normalizer(scores), dense.dropout).to(value.dtype)
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities
