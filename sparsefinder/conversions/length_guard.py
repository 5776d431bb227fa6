"""One clear line for an input that is too long, where transformers would index beyond a table.

The guard is a hook on the model in memory. It cannot travel with saved weights: after `from_pretrained`, call
`guard_length` again (for an LED once for the encoder and once for the decoder: `generate` calls the encoder alone), or rely
on the tokenizer, whose `model_max_length` does travel.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsefinder.errors import UserError


@dataclass(frozen=True)
class LengthGuard:
    """A forward pre-hook that refuses inputs longer than `length` tokens."""

    length: int
    """Longest input in tokens, those of a cache included."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at `input_ids (B, N)` or `inputs_embeds (B, N, E)`; raises `UserError` for a wrong N."""
        cache = kwargs.get("past_key_values")
        length = input_length(args, kwargs) + (0 if cache is None else cache.get_seq_length())
        if length > self.length:
            raise UserError(
                f"input of {length} tokens, and the model's longest is {self.length}; cut it (truncation=True) or "
                "convert the model for longer inputs"
            )


def input_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of the input in the arguments of a model's `forward`, padding included; 0 if it has none."""
    inputs = kwargs.get("input_ids", args[0] if args else None)
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    return 0 if inputs is None else int(inputs.shape[1])


def guard_length(base: nn.Module, length: int) -> RemovableHandle:
    """Make a model refuse longer inputs with a `UserError`.

    Args:
        base: a model without its head, or one side of an LED.
        length: the longest input in tokens.

    Returns:
        torch's handle: `handle.remove()` takes the guard off.
    """
    return base.register_forward_pre_hook(LengthGuard(length), with_kwargs=True)
