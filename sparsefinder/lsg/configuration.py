"""Configurations of LSG models: those of transformers, with the settings of the attention added.

`LSGRobertaConfig`, `LSGBartConfig`, … are made on demand, one for each row of `families`. The fields have the names and
defaults that the published converter writes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.executors.local_sparse_global.settings import MAX_GLOBAL_TOKENS
from sparsefinder.lsg.families import FAMILIES, Family, plain_class
from sparsefinder.numerics.normalizers import Normalizer


class LSGFields:
    """What every LSG configuration has beside the fields of its family; mixed in before the plain class."""

    lsg_fields: ClassVar[dict[str, tuple[Any, Any]]] = {
        # pad inputs that are longer than two blocks to whole blocks; without it such a length is an error
        "adaptive": (bool, True),
        "block_size": (int, 128),
        # groups of padding stay in view of `bos_pooling`, as in the published models; False makes padding harmless there too
        "bos_pooling_sees_padding": (bool, True),
        "lsh_num_pre_rounds": (int, 1),
        "lsh_seed": (int, 123),
        "mask_first_token": (bool, False),
        # α of the normalizer: 1 softmax, 1.5 entmax, 2 sparsemax
        "normalizer_alpha": (float | int, 1.0),
        "num_global_tokens": (int, 1),
        # encoder-decoder only: the decoder sees the global tokens too
        "pass_global_tokens_to_decoder": (bool, True),
        # the first token's output is that of the first global token
        "pool_with_global": (bool, True),
        "sparse_block_size": (int, 128),
        "sparsity_factor": (int, 2),
        "sparsity_type": (str | None, "norm"),
    }

    def lsg_attention(self: Any) -> LSGAttention:
        """The attention that these settings describe; raises `UserError` where they are wrong."""
        if not 1 <= self.num_global_tokens <= MAX_GLOBAL_TOKENS:
            raise UserError(
                f"num_global_tokens is {self.num_global_tokens}; an LSG model has 1 to {MAX_GLOBAL_TOKENS} of them"
            )
        return LSGAttention(
            sparsity_type=self.sparsity_type,
            block_size=self.block_size,
            sparse_block_size=self.sparse_block_size,
            sparsity_factor=self.sparsity_factor,
            num_global_tokens=self.num_global_tokens,
            mask_first_token=self.mask_first_token,
            lsh_num_pre_rounds=self.lsh_num_pre_rounds,
            padding_in_pools=self.bos_pooling_sees_padding,
            seed=self.lsh_seed,
            normalizer=Normalizer(self.normalizer_alpha),
            causal=bool(getattr(self, "is_decoder", False)) and not self.is_encoder_decoder,
        )

    @property
    def pools_with_global(self: Any) -> bool:
        """`pool_with_global`, which hiding the first token implies: nothing has read that token's output."""
        return bool(self.pool_with_global or self.mask_first_token)


def config_class(family: Family) -> Any:
    """The LSG configuration of a family, made once."""
    return globals().get(family.config_name) or _make(family)


def _make(family: Family) -> Any:
    plain = plain_class(f"{family.stem}Config")
    fields = LSGFields.lsg_fields
    namespace = {
        "__module__": __name__,
        "__doc__": f"Configuration of an LSG {family.stem}: `{plain.__name__}` and the settings of `LSGFields`.",
        "__annotations__": {name: kind for name, (kind, _) in fields.items()},
        **{name: default for name, (_, default) in fields.items()},
        "model_type": family.model_type,
        # the README of the published converter spells the setting in this way, too
        "attribute_map": {**plain.attribute_map, "lsg_num_pre_rounds": "lsh_num_pre_rounds"},
    }
    made = type(family.config_name, (LSGFields, plain), namespace)
    globals()[family.config_name] = made
    return made


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if name == family.config_name:
            return config_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
