"""How many rows of a position table belong to no token: one answer for loading, converting and LSG."""

import pytest

from sparsefinder import models
from sparsefinder.lsg.families import FAMILIES
from sparsefinder.models.position_tables import CONVENTIONS, reserved_rows, reserved_rows_of
from tests.tiny_models import tiny_config


def test_reserved_rows_of_each_convention() -> None:
    assert reserved_rows("absolute") == 0
    assert reserved_rows("sinusoidal") == 0
    assert reserved_rows("offset_two", padding_idx=7) == 2
    assert reserved_rows("after_padding", padding_idx=1) == 2
    assert reserved_rows("after_padding", padding_idx=0) == 1
    with pytest.raises(ValueError, match="padding id"):
        reserved_rows("after_padding")


def test_every_family_says_how_its_positions_are_laid_out() -> None:
    assert {*models.FAMILIES, *FAMILIES} <= set(CONVENTIONS)


@pytest.mark.parametrize("family", sorted({*models.FAMILIES} & set(FAMILIES)))
def test_loading_and_lsg_count_the_same_rows(family: str) -> None:
    config = tiny_config(family, pad_token_id=3)
    assert (
        reserved_rows_of(config)
        == FAMILIES[family].reserved(config)
        == (4 if family.endswith(("roberta", "camembert")) else 0)
    )
