"""Certificates: they collect, they refuse, and a refused conversion leaves nothing behind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsefinder.conversions.card import write
from sparsefinder.conversions.certificate import Certificate, at_most, equals, holds, read, states
from sparsefinder.conversions.checks import check_finite, check_ids, check_lengths, max_difference
from sparsefinder.conversions.staging import staged_folder
from sparsefinder.errors import UserError


def good() -> Certificate:
    return Certificate(source="owner/name", target="longformer", settings={"attention_window": 8}).with_checks(
        at_most("difference", 1e-7, 1e-4, "ten | lengths"),
        equals("rows", 4, 4),
        holds("tied", True),
        states("gap", 0.3),
    )


def test_checks_say_what_passed() -> None:
    assert at_most("x", 1.0, 1.0).passed
    assert not at_most("x", 1.1, 1.0).passed
    assert not at_most("x", math.nan, 1.0).passed
    assert not equals("x", 3, 4).passed
    assert states("x", math.inf).passed
    assert good().passed
    assert not Certificate("a", "b").passed


def test_require_names_every_failed_check_in_one_line() -> None:
    bad = good().with_checks(at_most("long input", 0.5, 0.1), holds("ids inside", False))
    assert [check.name for check in bad.failed] == ["long input", "ids inside"]
    with pytest.raises(UserError, match=r"long input: measured 0.5, allowed 0.1; ids inside: measured False") as error:
        bad.require()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not checked"):
        Certificate("a", "b").require()


def test_difference_counts_real_tokens_only() -> None:
    expected = torch.zeros(2, 3, 4)
    found = expected.clone()
    found[0, 2] = 9
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert max_difference(expected, found, valid) == 0
    assert max_difference(expected, found) == 9
    assert max_difference(expected, found[:, :2]) == math.inf
    found[1, 0, 0] = math.nan
    assert math.isnan(max_difference(expected, found, valid))
    assert not check_finite("finite", [found]).passed


def test_ids_and_lengths() -> None:
    tokenizer = SimpleNamespace(
        get_vocab=lambda: {"a": 0, "b": 9}, mask_token="<mask>", mask_token_id=10, pad_token="<pad>", pad_token_id=1,
        model_max_length=8,
    )  # fmt: skip
    failed = [check.name for check in check_ids(tokenizer, 10) if not check.passed]
    assert failed == ["id of mask_token"]
    assert all(check.passed for check in check_lengths(tokenizer, 8, rows=10, reserved=2))
    assert [check.passed for check in check_lengths(tokenizer, 9, rows=10, reserved=2)] == [False, False]


def test_written_with_the_model_and_read_back(tmp_path: Path) -> None:
    certificate = good().with_checks(states("infinite", math.inf))
    (tmp_path / "README.md").write_text("# My model\n\nText.\n")
    write(certificate, tmp_path)
    write(certificate, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# My model\n\nText.\n")
    assert card.count("## Conversion certificate") == 1
    assert "| difference | 1e-07 | 0.0001 | yes | ten \\| lengths |" in card
    content = json.loads((tmp_path / "conversion.json").read_text())
    assert content["passed"] is True
    assert content["checks"][-1]["measured"] == "inf"
    back = read(tmp_path)
    assert back.checks[:4] == certificate.checks[:4]
    assert back.settings == certificate.settings


def test_a_new_card_has_metadata(tmp_path: Path) -> None:
    write(good(), tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---\nbase_model: owner/name\nlibrary_name: transformers\n")


def test_no_certificate_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        read(tmp_path)
    (tmp_path / "conversion.json").write_text("[]")
    with pytest.raises(UserError, match="no conversion certificate"):
        read(tmp_path)


def test_staged_folder_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as folder:
        (folder / "weights").write_text("x")
        assert not out.exists()
    assert (out / "weights").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    with pytest.raises(UserError, match="exists"), staged_folder(out):
        pass
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "new") as folder:
        folder.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write into"), staged_folder(tmp_path / "file" / "out"):
        pass
