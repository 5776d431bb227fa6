"""Another attention for the length of a ``with`` block: `plugged`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefinder.errors import UserError
from sparsefinder.graphs import Attention
from sparsefinder.models.position_tables import CONVENTIONS, longest_input, reserved_rows_of
from sparsefinder.models.replacement.attention_calls import calls_of, installed, is_sliding
from sparsefinder.models.replacement.carried_by_module import Plug, Socket


@contextlib.contextmanager
def plugged(model: PreTrainedModel, attention: Attention, which: str | None = None) -> Iterator[None]:
    """Within the block every (global) layer of one attention calls ``attention(q, k, v, valid, layer) → output``.

    The old attention is put back at the end, after an exception too. Blocks may be nested: the innermost counts, and the three
    attentions of an encoder-decoder do not touch each other. Dropout on attention probabilities belongs to the dense path and is
    not applied.

    Args:
        model: a model of one of `sparsefinder.models.families.TRAITS`.
        attention: gets ``q (B, H, N_q, D)``, ``k`` and ``v (B, H_k, N_k, D)`` in the model's dtype, ``q`` not rescaled; ``valid
            (B, N_k)`` bool, True on real tokens; and ``layer``, 0 to `ModelShape.layers` − 1. It returns ``(B, H, N_q, D)``. In a
            causal language model it must be causal by itself. Of cross-attention it gets ``query_valid`` besides, all True, since
            a model does not say there which of its queries are padding. Sentences packed into one row by a mask ``(B, 1, N, N)``
            are given as rows of their own.
        which: ``enc``, ``dec`` or ``cross`` of an encoder-decoder; None for the one attention of another model.

    Raises:
        UserError: for a model whose attention cannot be replaced; within the block, for any other mask but padding, and for a
            text longer than the model.
    """
    plugs = plugs_of(model, socket := Socket(attention), which)

    def begin(base: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        socket.begin(named)
        check_length(base, inputs, named)

    start = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with installed(model, plugs):
            yield
    finally:
        start.remove()


def plugs_of(model: PreTrainedModel, socket: Socket, which: str | None = None) -> dict[nn.Module, Plug]:
    """A plug into the socket for each (global) module of an attention of the model.

    Raises:
        UserError: for a model whose attention cannot be replaced.
    """
    calls = calls_of(model, which)
    layers: dict[nn.Module, list[int]] = {}
    for layer, call in enumerate(each for each in calls if not is_sliding(each.module, model.config)):
        layers.setdefault(call.module, []).append(layer)
    return {module: Plug(socket, tuple(numbers), calls[0].which == "cross") for module, numbers in layers.items()}


def check_length(base: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """A text beyond the table of positions would end in an index error of torch; families without a table read any length.

    Args:
        base: the model without its head, whose forward pass begins.
        inputs: what it is given by position: token ids first.
        named: what it is given by name.

    Raises:
        UserError: for a text longer than the model.
    """
    config: Any = base.config
    if CONVENTIONS[config.model_type] in ("rotary", "relative"):
        return
    longest = longest_input(config)
    ids: Tensor | None = inputs[0] if inputs else named.get("input_ids")
    tokens = ids if ids is not None else named.get("inputs_embeds")
    positions = named.get("position_ids")
    length = 0 if tokens is None else tokens.shape[1]
    if positions is not None:
        length = int(positions.max()) + 1 - reserved_rows_of(config) if positions.numel() else 0
    if length > longest:
        raise UserError(
            f"this text has {length} tokens, and the model reads {longest} at most: cut it into blocks, or convert the model to "
            "a longer one"
        )
