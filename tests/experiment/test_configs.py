"""Every file of conf is composed, and everything that it names is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from sparsefinder import pipeline
from sparsefinder.commandline import choices, conf_folder, job
from sparsefinder.commandline.composition import build, plain
from sparsefinder.commandline.messages import one_line
from sparsefinder.commandline.overrides import Known, understood
from sparsefinder.errors import UserError
from sparsefinder.storage.store import Store
from tests.conftest import GRAPH, ROOT

CONF = ROOT / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
STAGES = list(pipeline.STAGES)
KNOWN = Known(conf_folder.FILES, list)


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
    group: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = compose(f"{group}={name}")
    monkeypatch.setattr(choices, "chosen", lambda g: cfg.hydra.runtime.choices[g])
    settings = {stage: settings_of(cfg, stage) for stage in STAGES}
    assert settings["score"].configurations
    assert settings["evaluate"].attentions
    assert settings["finetune"].model is not None
    # the stages of an experiment make all that they read: a UserError otherwise
    pipeline.check_needs(pipeline.chosen_stages(plain(cfg.stage)), settings, Store(tmp_path))


def test_all_attentions_are_those_that_are_not_only_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("all", "auto"):
        cfg = compose(f"attention={name}")
        monkeypatch.setattr(choices, "chosen", lambda g, cfg=cfg: cfg.hydra.runtime.choices[g])
        found[name] = {choice.name: choice for choice in choices.attentions(cfg)}
    assert {"masked", "bucketed", "lsg_norm"} <= set(found["all"])
    assert "auto" not in found["all"]
    assert set(found["auto"]) == {"auto"}
    assert "only_by_name" not in found["auto"]["auto"].options


def settings_of(cfg: DictConfig, stage: str) -> Any:
    return build(cfg[stage], **choices.objects(cfg, stage))


WRONG = {  # settings of the command line → what the one line about them says
    "stage=finetune model.vocabulary_size=1e4": "model.vocabulary_size must be int, got 10000.0",
    "adapt_steps=1e2": "adapt_steps must be int, got 100.0",
    "finetune.attention=5": "finetune.attention: 5 is no arm; give a pattern, an attention or a reading, with its settings",
    "stage=compare arms=window": "arms=window: give a list in quotation marks, such as 'arms=[{pattern: window, ",
    "finetune.attention={pattern:kmeens}": "finetune.attention: pattern=kmeens is unknown; ",
    "finetune.attention={pattern:kmeans,top:2}": "KMeans has no setting top; its settings are top_clusters, ",
    "finetune.attention={pattern:kmeans}": "finetune.attention=kmeans works with projections and centroids: finetune.learned=",
    "finetune.learned=runs/tiny": "finetune.learned is for the pattern of finetune.attention",
    "evaluate.task=summary": "evaluate.task=summary is unknown; choose one of masked_lm, causal_lm, seq2seq_lm, embedding, ",
    "evaluate.head.steps=0": "evaluate.head.steps must be 1 or more, got 0",
    "evaluate.labels.test=train": "evaluate.labels takes train=train and test=train from the same rows",
    "evaluate.adapt=null": "evaluate.adapt must be AdaptSettings, got None",
    "finetune.corpus=5": "finetune.corpus must be Corpus, got 5",
    "stage=extract corpus=datasets corpus.data_files=a.jsonl": "must be a mapping {str: str or a list of str} or null",
    "stage=extract corpus=text corpus.max_documents=2.5": "corpus.max_documents must be int or null, got 2.5",
    "stage=extract corpus.train=numpy": "corpus.train must be a list of str, got 'numpy'",
    "stage=extract ~corpus.train": "corpus.train is missing, which Docstrings needs: set corpus.train=VALUE",
    "score._target_=sparsefinder.nothing": "score._target_=sparsefinder.nothing cannot be used",
    "attention=bucketed +attention.foo=1": "Bucketed has no setting foo; its settings are pattern,",
    "attention=bucketed +attention.queries_at_once=many": "attention.queries_at_once must be int, got 'many'",
    "attention=bucketed +attention.normalizer=1": "attention.normalizer is no setting",
    "attention=bucketed attention._target_=nothing": "attention._target_=nothing cannot be used",
    "attention=bucketed attention._target_=os": "is not a callable object",
    "run_dir=true": "run_dir=True: a folder is needed",
    "run_dir=[a]": "a folder is needed",
    "qk=[a]": "the path of an artefact is needed, or null",
    "stage=5": "stage=5 is no stage: give one by its name, a list such as",
    "stage=true": "stage=True is no stage",
    "stage=[[score]]": "is no stage: give one by its name, a list such as",
    "report.levels=0.1": "report.levels must be a list of float, got 0.1",
    "stage=score report.levels=0.1": "report.levels must be a list of float, got 0.1",
    "report.levels=null": "report.levels must be a list of float, got None",
    "report.levels=[a]": "report.levels must be a list of float, got ['a']",
    "stage=score pattern=kmeans pattern.sweep=3": "pattern.sweep=3: the values of a sweep are a list",
    "seed=-1": "seed=-1: a seed must be a whole number from 0 to 4294967295",
    "seed=4294967296": "seed=4294967296: a seed must be",
    "seed=0.5": "seed=0.5: a seed must be",
    "target=5": "target must be str or null, got 5",
    "alpha=much": "alpha must be float, got 'much'",
    "stage=score score.alpha=much": "score.alpha must be float, got 'much'",
    "stage=score pattern=oracle alpha=much": "alpha must be float, got 'much'",
    "stage=score pattern=oracle alpha=1.5 pattern.alpha=much": "pattern.alpha must be float, got 'much'",
    "stage=evaluate pattern=distance attention=bucketed": "attention=bucketed cannot run pattern=distance",
    "stage=extract extract.seed=-1": "extract.seed=-1: a seed must be",
}


@pytest.mark.parametrize("settings", WRONG)
def test_a_wrong_setting_is_one_line_before_any_work(
    settings: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = [] if "run_dir=" in settings else [f"run_dir={tmp_path / 'run'}"]
    cfg = compose(*settings.split(), *own)
    monkeypatch.setattr(choices, "chosen", lambda g: cfg.hydra.runtime.choices[g])
    with pytest.raises(UserError) as error:
        job.run(cfg)
    said = one_line(error.value)
    assert WRONG[settings] in said
    assert said.startswith(WRONG[settings]) or "alpha" not in settings
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["2024", "2024_01", "1e3", "007"])
def test_a_path_may_look_like_a_number(name: str) -> None:
    cfg = compose(*understood([f"{key}={name}" for key in ("run_dir", "qk")], KNOWN).settings)
    store = job.store_of(cfg, [], None)
    assert (store.run_dir, store.given["qk"]) == (Path(name), Path(name))
    cfg.run_dir = 2024  # in a file, where nothing puts quotes
    assert job.store_of(cfg, [], None).run_dir == Path("2024")


def test_a_run_prints_its_numbers_at_the_levels_of_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = GRAPH / "golden_enc-attn.pt"
    given = [f"qk={file}", f"qk_validation={file}", f"run_dir={tmp_path}"]
    cfg = compose("stage=score", "pattern=window", "report.levels=[0.15]", *given)
    monkeypatch.setattr(choices, "chosen", lambda g: cfg.hydra.runtime.choices[g])
    job.run(cfg)
    printed = capsys.readouterr().out
    assert "Recall at 15 % of the pairs is read from a frontier" in printed
    assert not re.search(r"\b(2|5|10|20|30) %", printed)


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


def test_all_sweeps_every_pattern_and_adds_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose("window=3")
    monkeypatch.setattr(choices, "chosen", lambda g: cfg.hydra.runtime.choices[g])
    swept = list(choices.all_configurations(cfg, sweep=True))
    once = list(choices.all_configurations(cfg, sweep=False))
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


@pytest.mark.parametrize("experiment", ["smoke", "tiny", "frontier", "wikitext103"])
def test_every_experiment_takes_a_model_by_path(experiment: str) -> None:
    settings = [f"experiment={experiment}", *understood(["model=./a/folder"], KNOWN).settings]
    cfg = hydra.compose("config", overrides=settings)
    assert build(cfg.model).name_or_path == "./a/folder"
