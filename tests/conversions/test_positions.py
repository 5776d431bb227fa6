"""Position tables: repeated by tokens, reserved rows kept, and an audit that can fail."""

import numpy as np
import pytest
import torch
from torch import nn

from sparsefinder.conversions.positions import (
    audit,
    audit_sinusoidal,
    replace_embedding,
    resize_buffers,
    sinusoidal_rows,
    tile_rows,
)
from sparsefinder.errors import UserError


def numbered(rows: int) -> torch.Tensor:
    """A table whose row r holds only the number r."""
    return torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 3).contiguous()


@pytest.mark.parametrize("reserved", [0, 2, 5])
@pytest.mark.parametrize("length", [8, 9, 16, 21])
def test_token_i_reads_row_i_mod_source_length(reserved: int, length: int) -> None:
    tiled = tile_rows(numbered(reserved + 8), length, reserved=reserved)
    expected = [*range(reserved), *(reserved + i % 8 for i in range(length))]
    assert tiled[:, 0].tolist() == expected
    assert audit(numbered(reserved + 8), tiled, reserved=reserved).passed


def test_targets_that_reserve_fewer_or_more_rows() -> None:
    source = numbered(10)
    assert tile_rows(source, 9, reserved=2, target_reserved=0)[:, 0].tolist() == [*range(2, 10), 2]
    assert tile_rows(source, 9, reserved=1, target_reserved=2)[:, 0].tolist() == [0, 0, *range(1, 10)]
    assert tile_rows(source, 9, reserved=3, target_reserved=2)[:, 0].tolist() == [1, 2, *range(3, 10), 3, 4]
    for reserved, target_reserved in [(2, 0), (1, 2), (3, 2)]:
        tiled = tile_rows(source, 19, reserved=reserved, target_reserved=target_reserved)
        assert audit(source, tiled, reserved=reserved, target_reserved=target_reserved).passed


def test_tiling_keeps_dtype_and_shares_no_memory() -> None:
    source = numbered(6).half()
    tiled = tile_rows(source, 4, reserved=2)
    tiled.zero_()
    assert tiled.dtype == torch.float16
    assert source[-1, 0] == 5


def test_shorter_target_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="maximum length 7 is shorter than the source model's 8") as error:
        tile_rows(numbered(10), 7, reserved=2)
    assert "\n" not in str(error.value)


def test_audit_finds_the_published_mistake() -> None:
    """Rows 0..n-3 repeated, reserved ones among them, and the last two appended: the converter's table (its issue 2)."""
    source = numbered(10)
    wrong = torch.cat([source[:-2], source[:-2], source[-2:]])
    found = audit(source, wrong, reserved=2)
    assert not found.passed
    assert found.wrong_rows == (8, 9)
    assert found.rows_checked == 18
    assert found.max_difference > 0


def test_audit_counts_a_nan_as_wrong_and_takes_off_a_shift() -> None:
    source = numbered(10)
    tiled = tile_rows(source, 12, reserved=2)
    shift = torch.tensor([1.0, 2.0, 3.0])
    assert audit(source, tiled + shift, reserved=2, target_shift=shift).passed
    tiled[5] = float("nan")
    assert audit(source, tiled, reserved=2).wrong_rows == (5,)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_sinusoidal_rows_follow_the_formula(size: int, layout: str) -> None:
    rows = sinusoidal_rows(9, size, layout=layout)
    values = np.array([[p / 10000 ** (2 * (c // 2) / size) for c in range(size)] for p in range(9)])
    columns = list(range(0, size, 2)) + list(range(1, size, 2))
    for place, column in enumerate(columns if layout == "halves" else range(size)):
        wave = np.sin(values[:, column]) if column % 2 == 0 else np.cos(values[:, column])
        np.testing.assert_allclose(rows[:, place].numpy(), wave, atol=1e-6)
    assert audit_sinusoidal(rows[:4], rows, layout=layout).passed
    spoiled = rows.clone()
    spoiled[6, 0] += 0.1
    assert audit_sinusoidal(rows[:4], spoiled, layout=layout).wrong_rows == (6,)


def test_buffers_and_embedding_grow_in_place() -> None:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3, padding_idx=1)
            self.register_buffer("position_ids", torch.arange(2, 6)[None], persistent=False)
            self.register_buffer("token_type_ids", torch.zeros(1, 4, dtype=torch.long))
            self.register_buffer("other", torch.zeros(4))

    model = nn.Sequential(Embeddings())
    replace_embedding(model[0].table, tile_rows(model[0].table.weight.data, 10, reserved=2))
    assert resize_buffers(model, 12) == ("0.position_ids", "0.token_type_ids")
    assert model[0].position_ids.tolist() == [list(range(2, 14))]
    assert model[0].token_type_ids.tolist() == [[0] * 12]
    assert model[0].other.shape == (4,)
    assert "0.position_ids" not in model.state_dict()
    assert "0.token_type_ids" in model.state_dict()
    assert model[0].table.num_embeddings == 12
    model[0].table(torch.tensor([11])).sum().backward()
    assert model[0].table.weight.grad is not None
