"""Defaults stand in the dataclasses; conf/config.yaml shows them, and what is shared by several stages agrees with them."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from scripts.write_config import fields_of, in_yaml, written
from tests.conftest import ROOT

FILE = ROOT / "conf" / "config.yaml"
TEXT = FILE.read_text(encoding="utf-8")


def test_the_file_is_what_the_classes_say() -> None:
    assert written(TEXT) == TEXT, "run: python scripts/write_config.py"


@pytest.mark.parametrize(
    ("there", "drifted"),
    [
        ("  steps: 3000  # updates;", "  steps: 2000  # updates;"),  # a default
        ("    streaming: false\n", "    streaming: true\n"),  # of a block in a block
        ("  warmup: 500  # steps\n", "  warmup: 500  # of the rate\n"),  # a comment
        ("  warmup: 500  # steps\n", "  warmup: 500\n  thaw: 3\n"),  # a setting that no class has
        ("  dpi: 200  # of the figures as PNG\n", ""),  # the last field of a class
        ("  # tensorboard, wandb, …,", "  # weather, …,"),  # a comment that has a line to itself
    ],
)
def test_what_differs_is_mended(there: str, drifted: str) -> None:
    assert TEXT.count(there) == 1
    assert written(TEXT.replace(there, drifted)) == TEXT


def test_values_from_elsewhere_and_the_order_stay() -> None:
    text = TEXT.replace("  nsamples: ${nsamples}  #", "  nsamples: ${n_clusters}  #")
    assert text != TEXT
    assert written(text) == text


def test_every_field_can_be_typed_but_those_chosen_in_other_folders() -> None:
    whole = OmegaConf.load(FILE)
    left_out = {
        f"{stage}.{field.name}"
        for stage, block in blocks(whole)
        for field in dataclasses.fields(pkgutil.resolve_name(block._target_))
        if field.name not in block
    }
    chosen = {"calibrate.dialled", "score.configurations", "export.configurations", "compare.arms"}
    assert left_out == chosen | {f"evaluate.{name}" for name in ("configurations", "attentions", "conversions")}


def blocks(node: DictConfig, name: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every block with a ``_target_``, those inside others included."""
    for key in node:
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node._get_node(key)):
            if "_target_" in node[key]:
                yield f"{name}{key}", node[key]
            yield from blocks(node[key], f"{name}{key}.")


def test_every_value_is_the_default_also_where_it_is_taken_from_another_setting() -> None:
    """A stage called from Python does by default what it does from the command line."""
    whole = OmegaConf.load(FILE)
    seen = 0
    for name, block in blocks(whole):
        for key, field in fields_of(block._target_).items():
            if field.default is not dataclasses.MISSING:
                value = tuple(block[key]) if OmegaConf.is_list(block[key]) else block[key]
                assert value == field.default, f"{name}.{key}"
                seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((3e-5, "3.0e-5"), (1.5e-5, "1.5e-5"), (1e-10, "1.0e-10"), (0.001, "1.0e-3"), (0.01, "0.01"), (0.0, "0.0")),
        *((250_000, "250_000"), (-1, "-1"), (None, "null"), (True, "true"), ("none", "none"), ("null", "'null'")),
        *(((0.02, 0.5), "[0.02, 0.5]"), (1024.0, "1024.0"), (dataclasses.MISSING, "???")),
    ],
)
def test_a_default_is_typed_as_people_would(value: Any, text: str) -> None:
    assert in_yaml(value) == text
    if value is not dataclasses.MISSING:
        read = OmegaConf.create(f"x: {text}").x
        assert (tuple(read) if OmegaConf.is_list(read) else read) == value
