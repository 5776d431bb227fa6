"""What an attention module of a model carries while another attention is plugged into it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefinder.attention import Dense
from sparsefinder.errors import UserError
from sparsefinder.graphs import Attention
from sparsefinder.models.masks import is_past, split_mask
from sparsefinder.models.packing import Sentences, read_mask, read_mask_between
from sparsefinder.numerics.normalizers import is_recorded

_WORTH_CUTTING = 256  # tokens of a padded batch


class ForwardPass(threading.local):
    """What is known within one forward pass, of each thread apart: a server may run a model in several."""

    def __init__(self) -> None:
        self.calls: dict[Plug, int] = {}  # of modules that are shared over depth
        # the mask that was read last, as all layers get the same, and what it says
        self.read: tuple[Tensor | None, Tensor, Sentences | None] | None = None
        # (B, N_q), real tokens of the text that is written; None where nobody said
        self.written: Tensor | None = None


class Socket:
    """An attention, and what the modules of the model that it is plugged into share.

    Copies and pickles with its model, without what belongs to a forward pass.

    Args:
        attention: ``(q, k, v, valid, layer) → output``.
        owner: What stays attached; None for what is plugged in for a while.
    """

    def __init__(self, attention: Attention, owner: Any = None):
        self.attention = attention
        self.owner = owner
        self.now = ForwardPass()

    def __getstate__(self) -> dict[str, Any]:
        return {"attention": self.attention, "owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, now=ForwardPass())

    def begin(self, named: Mapping[str, Any]) -> None:
        """Forget the last forward pass.

        Args:
            named: What the model is given by name in the one that begins.
        """
        self.now.calls.clear()
        self.now.read = None
        self.now.written = named.get("decoder_attention_mask")

    def queries_of(self, q: Tensor) -> Tensor:
        """Which queries ``(B, H, N_q, D)`` of cross-attention are real, ``(B, N_q)`` bool: the mask is of the keys alone."""
        written = self.now.written
        if written is None or written.shape != q.shape[::2]:  # a part of the text, with a cache
            return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        return written.bool()

    def reading(self, mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Sentences | None]:
        """Which tokens are real, and the sentences in a row: see `sparsefinder.models.packing.read_mask`."""
        read = self.now.read
        if read is None or read[0] is not mask:
            read = self.now.read = (mask, *read_mask(mask, q, k, getattr(self.attention, "causal", False)))
        return read[1], read[2]


class Plug:
    """A layer's way to the attention of its socket.

    Args:
        socket: Shared by the modules of a model.
        layers: What the module is called as: several numbers where it is shared over depth.
        crosses: Whether queries and keys are tokens of two texts.
    """

    def __init__(self, socket: Socket, layers: tuple[int, ...], crosses: bool = False):
        self.socket = socket
        self.layers = layers
        self.crosses = crosses

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if is_recorded():
            raise UserError(
                "a plugged attention decides by looking at the numbers of a batch, which a traced or exported model would "
                "repeat for every other: export the model without it"
            )
        calls = self.socket.now.calls
        layer = self.layers[calls.get(self, 0)]
        if len(self.layers) > 1:
            calls[self] = calls.get(self, 0) + 1
        if self._is_softmax(q, k, mask, layer):  # as transformers does it: what is not sparse should cost nothing
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
        # float32 also under autocast: predictions, thresholds and the sum of a row do not survive half precision
        with torch.autocast(q.device.type, enabled=False):
            if self.crosses:
                between: Any = self.socket.attention
                valid, queries = read_mask_between(mask, k), self.socket.queries_of(q)
                output: Tensor = between(q, k, v, valid, layer, query_valid=queries)
                return output
            if self._continues(q, k):  # the new words are few, and attend densely to all that was read
                own: Any = self.socket.attention
                return Dense(own.normalizer).attend(q, k, v, None if mask is None else split_mask(mask)[0])
            valid, sentences = self.socket.reading(mask, q, k)
            if sentences is None:
                return self.socket.attention(q, k, v, valid, layer)
            q_apart, k_apart, v_apart = map(sentences.apart, (q, k, v))
            output = self.socket.attention(q_apart, k_apart, v_apart, sentences.valid, layer)
            return sentences.together(output, q.shape)

    def _continues(self, q: Tensor, k: Tensor) -> bool:
        """Whether queries are new words of a text that a decoder read before, into a cache; of what is attached to stay alone,
        since who measures an attention wants it to be used."""
        causal = getattr(self.socket.attention, "causal", False)
        return causal and self.socket.owner is not None and k.shape[2] != q.shape[2]

    def _is_softmax(self, q: Tensor, k: Tensor, mask: Tensor | None, layer: int) -> bool:
        settled = getattr(self.socket.attention, "is_softmax", None)
        if settled is None or self.crosses or k.shape[2] != q.shape[2]:
            return False
        # of longer padded texts `Dense` attends with each one apart, which saves more than it costs
        short = q.shape[2] < _WORTH_CUTTING
        plain = mask is None or (mask.dtype == torch.bool and short and not is_past(mask, q.shape[2]))
        return plain and bool(settled(q, k, layer))
