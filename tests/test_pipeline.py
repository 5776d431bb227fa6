"""The main job on a model that somebody else made: every stage on a folder, for each family, and again."""

from __future__ import annotations

import dataclasses
import logging
import random
from pathlib import Path
from typing import Any

import hydra
import pytest

from sparsefinder import pipeline
from sparsefinder.commandline import choices, conf_folder, job
from sparsefinder.commandline.overrides import Known, understood
from sparsefinder.errors import UserError
from sparsefinder.models import get_normalizer, load_masked_lm
from sparsefinder.storage import tables
from sparsefinder.storage.manifests import PRETRAINED, manifest_path, read_manifest, write_manifest
from sparsefinder.storage.samples import load_samples
from sparsefinder.storage.store import Store
from tests.conftest import ROOT
from tests.tiny_models import WORDS, save_tiny, tiny_model

# every stage, each with as little as it takes
LITTLE = (
    *("experiment=smoke", "patterns=[kmeans,distance,window]", "attention=masked", "nsamples=3"),
    *("extract.nsamples_validation=2", "finetune.batch_size=4", "finetune.eval_blocks=4", "finetune.eval_steps=2"),
    *(
        "project.epochs=1",
        "bilinear.steps=2",
        "bilinear.indexer_steps=2",
        "bilinear.n_clusters=4",
        "route.n_clusters=4",
        "route.rank=4",
    ),
    *("evaluate.samples=4", "evaluate.measured=1", "report.dpi=20"),
)
# left out without a target, and without arms
MADE = [stage for stage in pipeline.STAGES if stage not in ("calibrate", "compare")]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """A corpus of the words that the tiny tokenizer knows."""
    draw = random.Random(0)
    for name, documents in (("train", 24), ("valid", 12)):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(documents)]
        (tmp_path / name).write_text("\n\n".join(lines))
    return ["corpus=text", f"corpus.train={tmp_path / 'train'}", f"corpus.validation={tmp_path / 'valid'}"]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    text: list[str],
    tmp_path: Path,
) -> Any:
    """Runs a command line in this process and returns what it logged."""

    def command(*arguments: str) -> str:
        caplog.clear()
        caplog.set_level(logging.INFO)
        typed = understood(arguments, Known(conf_folder.FILES, list)).settings
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            everything = [*LITTLE, *text, f"run_dir={tmp_path / 'run'}", *typed]
            cfg = hydra.compose("config", overrides=everything, return_hydra_config=True)
            monkeypatch.setattr(choices, "chosen", lambda group: cfg.hydra.runtime.choices[group])
            job.run(cfg)
        return caplog.text

    return command


@pytest.mark.parametrize(
    ("family", "steps"), [("roberta", 2), ("bert", 0), ("distilbert", 2), ("albert", 0), ("modernbert", 2)]
)
def test_every_stage_on_a_folder_and_again(family: str, steps: int, run: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "given", tiny_model(family))
    settings = [f"model={folder}", f"finetune.steps={steps}"]
    run(*settings)
    store = Store(tmp_path / "run")
    assert get_normalizer(load_masked_lm(store.path("model"))[0]).alpha == 1.5
    assert set(tables.collect(store.run_dir, "score/metrics").pattern) == {"kmeans", "distance", "window"}
    assert len(tables.collect(store.run_dir, "evaluate/results")) > 3
    assert (store.path("report") / "index.html").is_file()
    again = run(*settings)
    assert [
        line.partition(": done and unchanged")[0].split()[-1] for line in again.splitlines() if "skipped" in line
    ] == MADE


def test_one_stage_after_the_other(run: Any, tmp_path: Path) -> None:
    """What was finetuned is what later commands read, also where they spell the folder in another way."""
    settings = [f"model={save_tiny(tmp_path / 'given')}", "finetune.steps=0", "patterns=[kmeans]"]
    for stage in ("finetune", "extract", "[project,cluster]", "score"):
        run(*settings, f"stage={stage}")
    store = Store(tmp_path / "run")
    manifest = store.manifest("qk")
    assert manifest is not None
    assert manifest.parents["model"] == store.content("model")
    assert "skipped" in run(f"model={tmp_path}/./given/", "stage=extract")


def test_a_model_finetuned_by_an_earlier_version_is_kept(run: Any, tmp_path: Path) -> None:
    """Its manifest has the hash of the given folder under the name of what was made."""
    settings = [f"model={save_tiny(tmp_path / 'given')}", "finetune.steps=0"]
    run(*settings, "stage=finetune")
    model = tmp_path / "run" / "model"
    manifest = read_manifest(model)
    assert manifest is not None
    parents = {"model" if name == PRETRAINED else name: content for name, content in manifest.parents.items()}
    write_manifest(model, dataclasses.replace(manifest, parents=parents))
    assert "model" in manifest_path(model).read_text()
    assert read_manifest(model) == manifest
    assert "finetune: done and unchanged, skipped" in run(*settings, "stage=[finetune,extract]")


def test_an_input_may_not_be_called_like_an_artefact(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        needs: tuple[str, ...] = ()

        @property
        def inputs(self) -> dict[str, str]:
            return {"qk": "0"}

    with pytest.raises(ValueError, match="the input qk needs a name that no artefact has"):
        pipeline.run_stages([pipeline.STAGES["finetune"]], {"finetune": Settings()}, Store(tmp_path), 0)


def test_a_run_does_not_write_into_the_model_it_was_given(run: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "given")
    with pytest.raises(UserError, match="is what this stage writes: choose another run_dir"):
        run(f"model={folder}", f"run_dir={folder}", "stage=finetune")


@pytest.mark.parametrize("stage", ["finetune", "extract", "evaluate"])
def test_blocks_longer_than_the_model_are_refused_by_every_stage(stage: str, run: Any, tmp_path: Path) -> None:
    """The one setting for all of them is named where it was typed, and a stage's own where that was."""
    settings = [f"model={save_tiny(tmp_path / 'given')}", f"stage={stage}", "finetune.steps=0", "pattern=window"]
    with pytest.raises(UserError, match=r"^length=39, but the model takes at most 38 tokens: give 38 or fewer"):
        run(*settings, "length=39")
    with pytest.raises(UserError, match=rf"^{stage}\.length=39, but the model takes at most 38"):
        run(*settings, f"{stage}.length=39")
    with pytest.raises(UserError, match=r"^length=7: blocks of 7 tokens are too short"):
        run(*settings, "length=7")


def test_one_length_for_all_stages(run: Any, tmp_path: Path) -> None:
    run(f"model={save_tiny(tmp_path / 'given')}", "finetune.steps=0", "stage=[finetune,extract]", "length=16")
    assert max(load_samples(tmp_path / "run" / "qk_enc-attn.pt").lengths) == 16
