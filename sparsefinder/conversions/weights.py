"""Loading foreign weights in two passes: loosely, to account for every key by name, then strictly.

The habit is that of LennartKeller/roberta2longformer; there it covers the encoder, here every weight of the model and
its head.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sparsefinder.errors import UserError


@dataclass(frozen=True)
class Account:
    """Where the weights of a converted model came from; names are those of the state dictionaries."""

    copied: int
    """How many tensors of the target are the source's."""
    added: tuple[str, ...]
    """Tensors of the target that the source has no counterpart for."""
    dropped: tuple[str, ...]
    """Tensors of the source that the target has no counterpart for."""


def load_in_two_passes(
    target: nn.Module, state: Mapping[str, Tensor], *, added: Mapping[str, Tensor], dropped: Collection[str] = ()
) -> Account:
    """Fill a model with weights by name, and account for every one of them.

    The first pass loads `state` loosely. Every name it reports missing must be among `added`, and every name it reports
    unexpected among `dropped`. The second pass loads the sum strictly. Dtypes follow the target.

    Args:
        target: the model, changed in place.
        state: tensors, named as the target names them.
        added: the tensors that `state` lacks.
        dropped: names in `state` that the target has no counterpart for.

    Returns:
        Where each weight came from.

    Raises:
        UserError: for a name too many or too few, or a tensor of another shape; the names are listed.
    """
    shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
    wrong = [name for name, tensor in state.items() if name in shapes and tensor.shape != shapes[name]]
    if wrong:
        shown = ", ".join(f"{name} {tuple(state[name].shape)} for {tuple(shapes[name])}" for name in wrong)
        raise UserError(f"weights of another shape than the target's: {shown}; check the source's configuration")
    missing, unexpected = target.load_state_dict(dict(state), strict=False)
    unaccounted = sorted({*missing} ^ {*added})
    if unaccounted:
        raise UserError(f"the source lacks weights that the target needs: {', '.join(unaccounted)}; is it complete?")
    foreign = sorted({*unexpected} - {*dropped})
    if foreign:
        raise UserError(
            f"the source has weights that the target has no counterpart for: {', '.join(foreign)}; remove them"
        )
    kept = {name: tensor for name, tensor in state.items() if name not in unexpected}
    target.load_state_dict({**kept, **added}, strict=True)
    return Account(len(kept), tuple(added), tuple(sorted(unexpected)))
