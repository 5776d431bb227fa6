"""The model families whose attention can be looked at and replaced: what a family is, in one line of one table.

To add a family: a line in `TRAITS`, and tests/models/test_decoders.py compares a tiny random model of it with transformers' own
attention, padded on either side, with grouped heads. A family whose scores are more than products of queries and keys is
refused by name (`REFUSED`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsefinder.errors import UserError

Kind = Literal["encoder", "decoder", "encoder_decoder"]
Convention = Literal["absolute", "after_padding", "offset_two", "sinusoidal", "rotary", "relative"]
Which = Literal[
    "enc", "dec", "cross"
]  # an attention of a model: among what it reads, what it writes, and from that to this


@dataclass(frozen=True)
class Traits:
    """What must be known of a family before one of its models is run.

    Args:
        kind: An encoder guesses masked words, a decoder the next word, an encoder-decoder one text from another.
        positions: How its position table is laid out (`sparsefinder.models.position_tables`).
        biased: Attentions that add a learned bias to their scores, which no plugged attention is given.
    """

    kind: Kind
    positions: Convention
    biased: tuple[Which, ...] = ()

    @property
    def attentions(self) -> tuple[Which, ...]:
        """The attentions that a model of this kind has."""
        of_kinds: dict[Kind, tuple[Which, ...]] = {"encoder": ("enc",), "decoder": ("dec",)}
        return of_kinds.get(self.kind, ("enc", "dec", "cross"))

    @property
    def replaceable(self) -> tuple[Which, ...]:
        """Those of them that another attention can take the place of."""
        return tuple(which for which in self.attentions if which not in self.biased)


TRAITS: dict[str, Traits] = {
    "roberta": Traits("encoder", "after_padding"),
    "bert": Traits("encoder", "absolute"),
    "xlm-roberta": Traits("encoder", "after_padding"),
    "camembert": Traits("encoder", "after_padding"),
    "electra": Traits("encoder", "absolute"),
    "albert": Traits("encoder", "absolute"),
    "distilbert": Traits("encoder", "absolute"),
    "modernbert": Traits("encoder", "rotary"),
    "gpt2": Traits("decoder", "absolute"),
    "gpt_neox": Traits("decoder", "rotary"),
    "llama": Traits("decoder", "rotary"),
    "mistral": Traits("decoder", "rotary"),
    "qwen2": Traits("decoder", "rotary"),
    "qwen3": Traits("decoder", "rotary"),
    "olmo2": Traits("decoder", "rotary"),
    "smollm3": Traits("decoder", "rotary"),
    "lfm2": Traits("decoder", "rotary"),  # most of its layers are convolutions, which are left as they are
    "bart": Traits("encoder_decoder", "offset_two"),
    "mbart": Traits("encoder_decoder", "offset_two"),
    "pegasus": Traits("encoder_decoder", "sinusoidal"),
    "marian": Traits("encoder_decoder", "sinusoidal"),
    "t5": Traits("encoder_decoder", "relative", biased=("enc", "dec")),
}

_BIAS = "adds a bias that grows with the distance (ALiBi) to its scores, which another attention is not given"
_LATENT = "keeps latent vectors instead of keys (MLA), whose scores are no products of queries and keys"
REFUSED: dict[str, str] = {
    "bloom": _BIAS,
    "mpt": _BIAS,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gemma2": "caps its scores by a tanh, which another attention does not know",
    "gpt_oss": "has a learned score that no key has (a sink), which another attention does not know",
    "mamba": "has a state instead of attention: there are no queries and keys",
    "mamba2": "has a state instead of attention: there are no queries and keys",
}
"""Why a family is not in the table, where the reason is known."""


def of_kind(*kinds: Kind) -> tuple[str, ...]:
    """The families of these kinds."""
    return tuple(name for name, traits in TRAITS.items() if traits.kind in kinds)


FAMILIES = of_kind("encoder")
DECODERS = of_kind("decoder")
ENCODER_DECODERS = of_kind("encoder_decoder")
_WORDS: dict[Kind, str] = {
    "encoder": "a masked language model",
    "decoder": "a causal language model",
    "encoder_decoder": "an encoder-decoder model",
}


def check_family(family: str, label: str, kinds: tuple[Kind, ...] = ("encoder", "decoder", "encoder_decoder")) -> None:
    """Refuse a model by its family.

    Args:
        family: Its `model_type`.
        label: What messages call the model.
        kinds: That are wanted.

    Raises:
        UserError: The family is not in `TRAITS`, or of another kind.
    """
    if family in TRAITS and TRAITS[family].kind in kinds:
        return
    wanted = _WORDS[kinds[0]] if len(kinds) == 1 else "a language model"
    why = f"which {REFUSED[family]}" if family in REFUSED else "whose attention cannot be replaced"
    if family in TRAITS:
        why = f"{_WORDS[TRAITS[family].kind]}, and {wanted} was needed"
    raise UserError(
        f"{label} is a {family}, {why}; choose {wanted} of one of these families: {', '.join(of_kind(*kinds))}"
    )


def kind_of(config: Any) -> Kind:
    """What a model with this configuration is; one of `TRAITS`."""
    return TRAITS[config.model_type].kind
