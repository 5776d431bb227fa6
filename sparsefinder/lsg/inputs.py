"""What an LSG model may be given: which tokens are real, and one line for what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.numerics.tracing import exporting, of_this_length


def real_tokens(
    config: Any, longest: int, input_ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Which tokens are real, `(B, N)` bool; raises `UserError` for inputs and masks that do not fit the model."""
    if (input_ids is None) == (embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given = input_ids if input_ids is not None else embeds
    assert given is not None
    batch, tokens = given.shape[:2]
    if tokens > longest:
        raise UserError(
            f"input of {tokens} tokens, and the model's longest is {longest}; cut it (truncation=True) or convert the "
            "model for longer inputs"
        )
    if not config.adaptive and tokens > 2 * config.block_size and tokens % config.block_size:
        raise UserError(
            f"{tokens} tokens are not a multiple of block_size {config.block_size}; pad them, or set adaptive=True"
        )
    if isinstance(tokens, torch.SymInt) and exporting():
        raise UserError(
            "an LSG model is exported for one length: its blocks are counted when it is recorded; leave the length out of "
            "dynamic_shapes (the batch may be in it) and pad texts to it"
        )
    given = of_this_length(given)
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=given.device)
    if mask.shape != (batch, tokens):
        raise UserError(
            f"attention_mask is {tuple(mask.shape)}; LSG attention needs one mark for each token, ({batch}, {tokens})"
        )
    return mask.to(given.device) != 0


def refuse_attentions(config: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `UserError` where probabilities are asked for: there is no N × N table of them, and pooled keys have no tokens."""
    wanted = kwargs.get("output_attentions")
    if config.output_attentions if wanted is None else wanted:
        decoder = (
            "; for those of the decoder, run the encoder first and give its output as encoder_outputs"
            if config.is_encoder_decoder
            else ""
        )
        raise UserError(
            "output_attentions=True: LSG attention never makes the table of all pairs; leave it out, or ask "
            f"config.lsg_attention().graph for the pairs that attend{decoder}"
        )


def padding_that_counts(config: Any, tokens: int) -> int:
    """Positions to add up to whole blocks; 0 unless padding can be seen (`bos_pooling_sees_padding`)."""
    counts = tokens > 2 * config.block_size and config.lsg_attention().pools_padding
    return -tokens % config.block_size if counts else 0


def refuse_cache(cache: Any) -> None:
    """Raise `UserError` if `cache` holds keys: an LSG decoder keeps none."""
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            "an LSG decoder recomputes the text at each step; call it with the whole text and use_cache=False"
        )
