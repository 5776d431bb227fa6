"""docs/reference/published_options.md: every counterpart that it names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from sparsefinder.pipeline import STAGES
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "reference" / "published_options.md"
GROUPS = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())


def rows() -> Iterator[tuple[str, list[str]]]:
    """Each row's published options, and what is marked as code in its counterpart."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 2 and cells[0] != "published" and set(cells[0]) != {"-"}:
            yield cells[0], re.findall(r"`([^`]+)`", cells[1])


ROWS = list(rows())


@cache
def composed(*choices: str) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=list(choices))


def check(name: str, value: str, before: list[str]) -> None:
    """One ``key`` or ``key=value``: a file of conf, stages, or a setting, with the last file chosen ``before`` it in its row."""
    if name in GROUPS and value:
        assert (ROOT / "conf" / name / f"{value}.yaml").is_file(), f"{name}={value}"
    elif name == "stage":
        assert {*value.strip("[]").split(",")} <= STAGES.keys(), value
    else:
        group = name.split(".")[0]
        files = [each for each in before if each.startswith(f"{group}=")] if group in GROUPS else []
        whole, parts = composed(*files[-1:]), name.split(".")
        parent = OmegaConf.select(whole, ".".join(parts[:-1])) if parts[:-1] else whole
        assert parent is not None, name
        assert parts[-1] in parent, f"there is no setting {name}"


@pytest.mark.parametrize(("published", "ours"), ROWS, ids=[published[:40] for published, _ in ROWS])
def test_what_is_named_exists(published: str, ours: list[str]) -> None:
    named = [each for each in ours if not each.startswith(("-", "CUDA_"))]
    for place, each in enumerate(named):
        name, _, value = each.partition("=")
        if name.endswith(".py"):
            assert (ROOT / name).is_file(), name
        elif "/" not in name and not name.endswith(".pickle"):
            check(name, value, named[:place])


def test_the_page_has_every_option_of_the_readme_command() -> None:
    everything = " ".join(published for published, _ in ROWS)
    for option in (
        *(
            "--data",
            "--rounds",
            "--share-projectors",
            "--rescale-queries",
            "--batch-size",
            "--lr",
            "--epochs",
            "--eval-steps",
        ),
        *("--add-cls-mask", "--window-size", "--grouping kmeans", "--top_clusters", "--bucket_size", "--threshold"),
        *(
            "--block-size",
            "--save",
            "--num-layers",
            "--cluster-rounds",
            "--projections_path",
            "--centroids_path",
            "--cls_size",
        ),
        *(
            "--finetune_part",
            "--attn_variant",
            "--nsamples",
            "--batchsize",
            "--model_path",
            "--out",
            "--wikipath",
            "--outdir",
        ),
    ):
        assert f"`{option}" in everything, option


def test_a_name_that_does_not_exist_is_seen() -> None:
    for name, value in (("pattern.bucket_sizes", ""), ("score.bins", ""), ("rouds", ""), ("pattern", "kmean")):
        with pytest.raises(AssertionError):
            check(name, value, ["pattern=quantize"])
