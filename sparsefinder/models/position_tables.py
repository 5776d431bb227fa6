"""Position tables: how a family lays out its own, and which rows of it belong to no token.

A learned position table has `reserved_rows` leading rows that no token ever uses, and then one row for each token.
"""

from __future__ import annotations

import sys
from typing import Any

from sparsefinder.models.families import TRAITS, Convention

CONVENTIONS: dict[str, Convention] = {
    **{family: traits.positions for family, traits in TRAITS.items()},
    "longformer": "after_padding",
}
"""`model_type` of a family -> how its positions are laid out."""


def reserved_rows(convention: Convention, padding_idx: int | None = None) -> int:
    """How many leading rows of a position table belong to no token.

    Args:
        convention: `absolute` (BERT, ALBERT, ELECTRA, DistilBERT, GPT-2), `sinusoidal` (Pegasus, Marian), and `rotary`
            (ModernBERT, Llama) and `relative` (T5), which have no table: 0. `after_padding` (RoBERTa, XLM-R, CamemBERT,
            Longformer): `padding_idx + 1`, since token positions count on from the padding id. `offset_two` (BART, mBART,
            BARThez): 2, whatever the padding id.
        padding_idx: id of the padding token; only `after_padding` reads it.

    Returns:
        A number of rows, 0 or more.

    Raises:
        ValueError: for another convention, or if `after_padding` has no padding id.
    """
    if convention in ("absolute", "sinusoidal", "rotary", "relative"):
        return 0
    if convention == "offset_two":
        return 2
    if convention == "after_padding":
        if padding_idx is None:
            raise ValueError("after_padding needs the padding id: positions count on from it")
        return padding_idx + 1
    raise ValueError(
        f"{convention!r} is no convention; needed: absolute, after_padding, offset_two, sinusoidal, rotary or relative"
    )


def longest_input(config: Any) -> int:
    """Tokens that a model with this configuration reads at most, special ones included; `sys.maxsize` where there is no end.

    ``max_position_embeddings`` counts the reserved rows of RoBERTa's kin, and leaves them out in BART's.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if longest is None or CONVENTIONS[config.model_type] == "relative":
        return sys.maxsize
    return longest - (reserved_rows_of(config) if CONVENTIONS[config.model_type] == "after_padding" else 0)


def reserved_rows_of(config: Any) -> int:
    """`reserved_rows` of a model's configuration, whose `model_type` is one of `CONVENTIONS`."""
    return reserved_rows(CONVENTIONS[config.model_type], config.pad_token_id)
