"""Every file of conf is composed, and everything that it names is built."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from sparsefinder import pipeline
from sparsefinder.store import Store
from tests.conftest import ROOT

CONF = ROOT / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
STAGES = list(pipeline.STAGES)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/run.py as a module."""
    spec = importlib.util.spec_from_file_location("run_script", ROOT / "scripts" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def hydra_here() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def compose(*overrides: str) -> DictConfig:
    needed = ["model.name_or_path=x"] if "model=pretrained" in overrides else []
    if "corpus=text" in overrides:
        needed += [f"corpus.train={__file__}", f"corpus.validation={ROOT / 'tests' / 'conftest.py'}"]
    if "corpus=datasets" in overrides:
        needed += ["corpus.path=x", "corpus.max_documents=1"]
    return hydra.compose("config", overrides=[*overrides, *needed], return_hydra_config=True)


@pytest.mark.parametrize(("group", "name"), FILES, ids=[f"{group}-{name}" for group, name in FILES])
def test_every_file_composes_and_every_stage_can_be_set_up(
    group: str, name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = compose(f"{group}={name}")
    monkeypatch.setattr(script, "chosen", lambda g: cfg.hydra.runtime.choices[g])
    settings = {stage: settings_of(cfg, stage, script) for stage in STAGES}
    assert settings["score"].configurations
    assert settings["evaluate"].attentions
    assert settings["finetune"].model is not None
    # the stages of an experiment make all that they read: a UserError otherwise
    pipeline.check_needs(pipeline.chosen_stages(script.plain(cfg.stage)), settings, Store(tmp_path))


def settings_of(cfg: DictConfig, stage: str, script: ModuleType) -> Any:
    return script.build(cfg[stage], **script.objects(cfg, stage))


def test_the_default_is_the_tiny_experiment() -> None:
    cfg = compose()
    assert cfg.name == "tiny"
    assert str(cfg.run_dir) == "runs/tiny"
    assert (cfg.window, cfg.global_tokens, cfg.last_token, cfg.causal) == (None, 0, False, False)


def test_the_published_recipe() -> None:
    cfg = compose("experiment=wikitext103")
    assert cfg.model.name_or_path.endswith("roberta-base")
    recipe = {
        key: cfg.finetune[key] for key in ("steps", "learning_rate", "warmup", "weight_decay", "adam_epsilon", "clip")
    }
    assert recipe == {
        "steps": 3000,
        "learning_rate": 3e-5,
        "warmup": 500,
        "weight_decay": 0.01,
        "adam_epsilon": 1e-6,
        "clip": 5.0,
    }
    assert cfg.finetune.batch_size * cfg.finetune.accumulation == 64
    assert cfg.finetune.mask_fraction == 0.15
    assert compose("experiment=wikitext103", "finetune.length=512").finetune.length == 512


def test_all_sweeps_every_dial_and_adds_surroundings(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose("window=3")
    monkeypatch.setattr(script, "chosen", lambda g: cfg.hydra.runtime.choices[g])
    swept = list(script.all_configurations(cfg, sweep=True))
    once = list(script.all_configurations(cfg, sweep=False))
    names = {path.stem for path in (CONF / "pattern").glob("*.yaml")} - {"all"}
    assert {c.name for c in swept} == {c.name for c in once} == names
    kmeans = OmegaConf.load(CONF / "pattern" / "kmeans.yaml").sweep
    assert sorted(c.pattern.top_clusters for c in swept if c.name == "kmeans") == sorted([*kmeans, *kmeans])
    assert {c.window for c in swept if c.name == "kmeans"} == {3, 11}
    assert {c.window for c in swept if c.name == "oracle"} == {3}


def test_every_yaml_of_a_choice_says_what_it_is() -> None:
    for group, name in FILES:
        first = Path(CONF / group / f"{name}.yaml").read_text().splitlines()
        assert first[0].startswith("#"), f"{group}/{name}.yaml starts with a comment that says what it is"
