"""Another attention that stays in a model, until it is taken out: through copies, pickles, other dtypes and training.

`sparsefinder.models.plugged` replaces an attention within a block; here it is replaced from now on. What is attached lies in
the model's own modules and nowhere else, so whoever holds a part of the model (its base without the head, a wrapper around
it) holds it too.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsefinder.errors import UserError
from sparsefinder.graphs import Attention
from sparsefinder.models.dense_normalizer import SOFTMAX
from sparsefinder.models.entmax_configuration import REGISTERED
from sparsefinder.models.replacement.carried_by_module import Plug, Socket
from sparsefinder.models.replacement.context_manager import check_length, plugs_of
from sparsefinder.models.replacement.registered_function import PLUG
from sparsefinder.models.transformers_internals import attention_name


class Begin:
    """A hook at the begin of every forward pass of a model that has an attention attached.

    Args:
        socket: That of the model.
        before: The name of the attention that the model called before.
    """

    handle: RemovableHandle  # to itself; it follows a copy of the model

    def __init__(self, socket: Socket, before: str | None):
        self.socket = socket
        self.before = before

    def __call__(self, base: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.socket.begin(named)
        if (name := attention_name(base.config)) != REGISTERED:
            raise UserError(
                f"this model has a sparse attention attached and was told afterwards to attend with {name}: call "
                "sparsefinder.detach(model) before set_attn_implementation"
            )
        check_length(base, inputs, named)


def attach(model: PreTrainedModel, attention: Attention, owner: Any) -> None:
    """Every (global) self-attention layer calls ``attention`` from now on; what was attached before goes.

    Args:
        model: of one of `FAMILIES`, changed in place.
        attention: as `sparsefinder.models.plugged` takes it.
        owner: what `owner_of` is to return; not None.

    Raises:
        UserError: for a model whose attention cannot be replaced, and within a block of `sparsefinder.models.plugged`.
    """
    _refuse_within_a_block(model)
    plugs = plugs_of(model, socket := Socket(attention, owner))
    if _begin(model) is not None:
        detach(model)
    begin = Begin(socket, attention_name(model.config))
    for module, plug in plugs.items():
        module.__dict__[PLUG] = plug
    model.set_attn_implementation(REGISTERED)
    begin.handle = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)


def detach(model: PreTrainedModel) -> None:
    """The attention that the model had before `attach`.

    Raises:
        UserError: where nothing is attached, and within a block of `sparsefinder.models.plugged`.
    """
    _refuse_within_a_block(model)
    begin = _begin(model)
    if begin is None:
        raise UserError(f"nothing is attached to this {type(model).__name__}: call sparsefinder.attach first")
    for module in model.modules():
        module.__dict__.pop(PLUG, None)
    begin.handle.remove()
    model.set_attn_implementation(begin.before or SOFTMAX)


def owner_of(model: nn.Module) -> Any:
    """What was attached to the model, or to a part of it; None where nothing is."""
    begin = _begin(model)
    return None if begin is None else begin.socket.owner


def is_whole(model: PreTrainedModel) -> bool:
    """Whether what is attached belongs to the model itself, and not to a model inside of it."""
    return any(isinstance(hook, Begin) for hook in model.base_model._forward_pre_hooks.values())


def _begin(model: nn.Module) -> Begin | None:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, Begin)), None)


def _refuse_within_a_block(model: nn.Module) -> None:
    for module in model.modules():
        plug = module.__dict__.get(PLUG)
        if isinstance(plug, Plug) and plug.socket.owner is None:
            raise UserError(
                "another attention is plugged into this model for a while: attach or detach after that block"
            )
