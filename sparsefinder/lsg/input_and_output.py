"""The two ends of an LSG encoder: how the text goes in, behind the global tokens, and how it comes out again.

Padding on the left is turned to the right on the way in and back on the way out. So blocks, positions and the first token are
those of the text, wherever its padding lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefinder.numerics.tracing import known


class Turn(NamedTuple):
    """A text of N tokens whose padding stands on the left, and the same text with this padding on the right."""

    there: Tensor
    """Where each token of the turned text comes from, `(B, N)`."""
    back: Tensor
    """Where each token of the text comes from in the turned one, `(B, N)`; position 0, where heads look, takes the first."""

    def turned(self, x: Tensor) -> Tensor:
        """`x (B or 1, N)` or `(B or 1, N, E)`, turned."""
        return _taken(x, self.there)

    def unturned(self, x: Tensor) -> Tensor:
        """States `(B, N, E)` of the turned text, in the order of the text."""
        return _taken(x, self.back)


def turn_of(valid: Tensor) -> Turn | None:
    """The turn of texts whose real tokens are `valid (B, N)`; None where no padding is on the left."""
    first = valid.int().argmax(-1, keepdim=True)
    if known((first == 0).all()):
        return None
    each = torch.arange(valid.shape[1], device=valid.device)
    back = (each - first) % valid.shape[1]
    return Turn((each + first) % valid.shape[1], torch.cat([torch.zeros_like(first), back[:, 1:]], dim=1))


def global_rows(table: nn.Embedding, count: int, like: Tensor) -> Tensor:
    """The first learned tokens.

    Looked up and not cut out: weights that are offloaded are there only while their own module is called.

    Args:
        table: of all learned tokens.
        count: `G`, how many of them.
        like: on the device that is wanted.

    Returns:
        `(G, E)`.
    """
    rows: Tensor = table(torch.arange(count, device=like.device))
    return rows.to(like.device)


def put_globals_in_front(config: Any, embeddings: Any, args: Any, output: Tensor) -> Tensor:
    """Hook of BERT-like embeddings: layer norm and dropout work on each token alone, so the global ones get theirs here."""
    rows = global_rows(embeddings.global_embeddings, config.num_global_tokens, output)
    globals_ = embeddings.dropout(embeddings.LayerNorm(rows))
    return torch.cat([globals_.expand(output.shape[0], -1, -1).to(output.dtype), output], dim=1)


def fill_up(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Hook before an encoder: hidden states as long as the mask, with zeros (`padding_that_counts`)."""
    states = args[0] if args else kwargs["hidden_states"]
    mask = kwargs["attention_mask"] if "attention_mask" in kwargs else args[1]
    states = F.pad(states, (0, 0, 0, mask.shape[-1] - states.shape[1]))
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def take_globals_off(config: Any, stack: Any, args: Any, output: Any) -> Any:
    """Hook of the encoder's end; with `pool_with_global` the first token's output becomes that of the first global token."""
    states = output.last_hidden_state
    text = states[:, config.num_global_tokens :]
    output.last_hidden_state = torch.cat([states[:, :1], text[:, 1:]], dim=1) if config.pools_with_global else text
    return output


def layers_of_text(layers: Any, before: Tensor, text: Tensor, end: int, turn: Turn | None) -> Any:
    """Hidden states of the layers, of the text alone.

    Args:
        layers: states `(B, G + end, E)` of each layer, global tokens first; None in it, or for it: nobody asked.
        before: the last hidden state as transformers gave it; found among `layers` by identity.
        text: `(B, N, E)`, stands in the place of `before`.
        end: positions that the layers saw, without the global tokens before them.
        turn: how padding on the left was turned to the right, to be undone; None: it was not.

    Returns:
        `(B, N, E)` of each layer, or None.
    """
    if layers is None:
        return None
    return tuple(
        # None: a layer that nobody asked for
        layer if layer is None else text if layer is before else _text(layer, text.shape[1], end, turn)
        for layer in layers
    )


def positions_of_text(config: Any, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook before a position table: count the text only. BART's takes a tensor, Pegasus' a shape."""
    shape, *others = args
    count = config.num_global_tokens
    text = shape[:, count:] if isinstance(shape, Tensor) else torch.Size((shape[0], shape[1] - count))
    return (text, *others)


def no_positions_in_front(config: Any, module: Any, args: Any, output: Tensor) -> Tensor:
    """Hook after a position table: a learned global token contains its position."""
    return F.pad(output, (0, 0, config.num_global_tokens, 0))


def _text(state: Tensor, tokens: int, end: int, turn: Turn | None) -> Tensor:
    text = state[:, state.shape[1] - end :][:, :tokens]
    return text if turn is None else turn.unturned(text)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x (B or 1, N[, E])` in the order `index (B, n)`."""
    x = x.expand(index.shape[0], *x.shape[1:])
    return x.gather(1, index if x.ndim == 2 else index[..., None].expand(-1, -1, x.shape[-1]))
