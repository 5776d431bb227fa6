"""The model families that LSG attention is built into: one row each.

A row says what differs between families; everything else stands in transformers' own tables. To add a family, add a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sparsefinder.errors import UserError
from sparsefinder.models.position_tables import CONVENTIONS, Convention, reserved_rows
from sparsefinder.models.transformers_internals import auto_classes


@dataclass(frozen=True)
class Family:
    """What the model layer and the converter must know of a family."""

    name: str
    """`model_type` of its checkpoints."""
    stem: str
    """What its class names begin with."""
    default: str
    """Architecture of a checkpoint that names none."""
    encoder_decoder: bool = False
    """Whether the LSG encoder feeds a decoder (which stays as it is)."""
    globals_have_type: bool = False
    """Whether the published converter adds token type 0 to the global tokens, which stand where tokens have one."""
    attention: str = "SelfAttention"
    """What the name of its self-attention class ends with."""
    stack: str = "encoder"
    """Attribute of the base model that holds its layers."""

    @property
    def model_type(self) -> str:
        """`model_type` of its LSG checkpoints; not the source's, or transformers would load them as plain models."""
        return f"lsg-{self.name}"

    @property
    def positions(self) -> Convention:
        """How its position table is laid out."""
        return CONVENTIONS[self.name]

    @property
    def config_name(self) -> str:
        """Class of its LSG configuration."""
        return f"LSG{self.stem}Config"

    @property
    def base(self) -> str:
        """Class of its plain base model."""
        return f"{self.stem}Model"

    def reserved(self, config: Any) -> int:
        """Leading rows of its position table that belong to no token."""
        return reserved_rows(self.positions, config.pad_token_id or 0)

    def tokens(self, config: Any) -> int:
        """Longest input, in tokens; only RoBERTa and its relatives count reserved rows in `max_position_embeddings`."""
        in_config = self.reserved(config) if self.positions == "after_padding" else 0
        return int(config.max_position_embeddings) - in_config

    def auto_classes(self) -> dict[str, str]:
        """The plain class behind each Auto class: `{"AutoModelForMaskedLM": "RobertaForMaskedLM", …}`."""
        return auto_classes(self.name)

    def architectures(self) -> tuple[str, ...]:
        """Its plain model classes, each once."""
        return tuple(dict.fromkeys(self.auto_classes().values()))


FAMILIES = {
    family.name: family
    for family in (
        Family("albert", "Albert", "AlbertForPreTraining", False, True, "Attention"),
        Family("bart", "Bart", "BartForConditionalGeneration", True, attention="Attention"),
        Family("bert", "Bert", "BertForPreTraining", globals_have_type=True),
        Family("camembert", "Camembert", "CamembertForMaskedLM"),
        Family("distilbert", "DistilBert", "DistilBertForMaskedLM", stack="transformer"),
        Family("electra", "Electra", "ElectraForPreTraining", globals_have_type=True),
        Family("mbart", "MBart", "MBartForConditionalGeneration", True, attention="Attention"),
        Family("pegasus", "Pegasus", "PegasusForConditionalGeneration", True, attention="Attention"),
        Family("roberta", "Roberta", "RobertaForMaskedLM"),
        Family("xlm-roberta", "XLMRoberta", "XLMRobertaForMaskedLM"),
    )
}

ALIASES = {"barthez": "mbart"}
"""Model types that are another family's under their own name."""


def family_of(model_type: str | None) -> Family:
    """The row of a `model_type`, plain or LSG. Raises `UserError` naming the supported ones."""
    name = (model_type or "").removeprefix("lsg-")
    family = FAMILIES.get(ALIASES.get(name, name))
    if family is None:
        choices = ", ".join(sorted({*FAMILIES, *ALIASES}))
        raise UserError(f"model type {model_type!r} has no LSG form; supported are {choices}")
    return family


def architecture_of(family: Family, name: str | None) -> str:
    """The name of a plain class of a family.

    Args:
        family: its family.
        name: with or without "LSG" in front; None: the family's default.

    Returns:
        The name without "LSG".

    Raises:
        UserError: for a class that the family does not have; it names the supported ones.
    """
    plain = (name or family.default).removeprefix("LSG")
    if plain not in family.architectures():
        raise UserError(
            f"architecture {name!r} is not one of model type {family.name!r}; supported are "
            f"{', '.join(family.architectures())}"
        )
    return plain


@cache
def plain_class(name: str) -> Any:
    """A class of transformers by its name."""
    import transformers

    return getattr(transformers, name)
