"""A package of its own, installed beside this one: its patterns are found, run and checked by name, and faults are one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.config_store import ConfigStore

from scripts import run
from sparsefinder.commandline import conf_folder
from sparsefinder.commandline.checks import check
from sparsefinder.commandline.overrides import Typed
from sparsefinder.errors import UserError
from sparsefinder.experiment import named
from sparsefinder.experiment.configuration import LOADERS
from sparsefinder.patterns.window import Window
from sparsefinder.sparse_model.named_patterns import named_pattern
from sparsefinder.testing import CHECKS, random_qk
from sparsefinder.testing import __main__ as conformance
from sparsefinder.testing.by_name import learned
from tests.conftest import GRAPH
from tests.tiny_models import save_tiny

CODE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from sparsefinder.patterns.support.cost import Free

@dataclass(frozen=True)
class Near(Free):
    reach: int = 2
    alpha: float = 9.0
    sparsity_parameter: ClassVar[str | None] = "reach"
    needs: ClassVar[tuple[str, ...]] = ()
    sweep: ClassVar[tuple[int, ...]] = (0, 2, 5)

    def __call__(self, qk, layer):
        qk.one_text("Near")
        near = (qk.positions[:, :, None] - qk.positions[:, None, :]).abs() <= self.reach
        return near[:, None] & qk.allowed.expand(-1, qk.q.shape[1], -1, -1)

@dataclass(frozen=True)
class Leaky(Near):
    def __call__(self, qk, layer):
        return torch.ones_like(super().__call__(qk, layer))  # padding and the future, too

@dataclass(frozen=True)
class Letters:
    words: int = 9
    seed: int = 0

    def documents(self, split, cache=None):
        for start in range(40):
            yield " ".join(("the model attends to keys that its query needs".split() * 9)[start % 9 :][: self.words])

    def fingerprint(self):
        return f"letters {self.words} {self.seed}"

@dataclass(frozen=True)
class Mean:  # of all values: an attention with a graph of its own
    normalizer: object
    share: float = 1.0
    causal: bool = False

    def __call__(self, q, k, v, valid, layer, query_valid=None):
        weights = valid[:, None, :, None] * self.share
        return ((v * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)).expand_as(q)

    def graph(self, qk, layer):
        return qk.allowed.expand(qk.graph_shape)

    def computed_pairs(self, qk, layer):
        return torch.zeros(qk.q.shape[:2], dtype=torch.int64)
"""
OTHERS = "[sparsefinder.corpora]\nletters = beside_{n}:Letters\n[sparsefinder.attentions]\nmean = beside_{n}:Mean\n"
PATTERNS = "[sparsefinder.patterns]\nnear = beside_{n}:Near\nleaky = beside_{n}:Leaky\n"

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package with these entry points and this code; its name comes back."""
    made: list[str] = []

    def package(entries: str = PATTERNS, code: str = CODE) -> str:
        name = f"beside_{len(made)}"
        folder = tmp_path / name
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(entries.format(n=len(made)))
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        made.append(name)
        return name

    yield package
    for name in made:
        sys.modules.pop(name, None)
    for group, name in (("pattern", "near"), ("pattern", "leaky"), ("corpus", "letters"), ("attention", "mean")):
        ConfigStore.instance().repo.get(group, {}).pop(f"{name}.yaml", None)


def test_it_is_chosen_by_all_and_by_name(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr(sys, "argv", ["run.py"])
    common = [f"qk={GRAPH / 'golden_enc-attn.pt'}", "stage=score", f"run_dir={tmp_path / 'run'}"]
    assert run.main([*common, "patterns=[near,window]"]) == 0
    table = pd.read_csv(tmp_path / "run" / "score" / "metrics.csv")
    assert {*table["pattern"]} == {"near", "window"}
    near = table[table["pattern"] == "near"]
    assert {*near["reach"]} == {0, 2, 5}
    assert {*near["alpha"]} == {1.5}, "a field that is called as a setting of the experiment takes it"
    window = table[(table["pattern"] == "window") & (table["width"] == 11)]
    assert near[near["reach"] == 5]["recall"].mean() == pytest.approx(window["recall"].mean())
    todo = check(Typed(("-m",), ("pattern=near,window", "name=x", "stage=score")))
    assert ["pattern=near" in point.settings for point in todo] == [True, False]


def test_it_passes_or_fails_conformance_by_its_name(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install()
    assert conformance.main([]) == 1, "those of all other packages"
    said = capsys.readouterr().out
    assert f"\nnear: {len(CHECKS)} of {len(CHECKS)} promises are kept\n" in said
    assert "leaky breaks the promise “allowed:" in said
    assert conformance.main(["nearby"]) == 2
    assert "did you mean near?" in capsys.readouterr().err


def test_it_is_learned_for_and_restored_by_name(install: Install) -> None:
    install()
    found = named_pattern("near", 1.5, 3)
    assert (found.pattern.reach, found.pattern.alpha, found.sweep) == (2, 1.5, (0, 2, 5))
    assert named_pattern(found.pattern, 1.5, 3).name == "near"
    qk = random_qk([7])
    assert torch.equal(found.pattern(qk, 0), Window(5)(qk, 0))


def test_corpora_and_attentions_have_groups_too(install: Install) -> None:
    install(OTHERS)
    assert "letters" in conf_folder.groups()["corpus"]
    assert named.settings_of("corpus", "letters") == {"_target_": "beside_0.Letters", "words": 9, "seed": "${seed}"}
    settings = {"_target_": "beside_0.Mean", "share": 1.0, "causal": "${causal}"}
    assert named.settings_of("attention", "mean") == settings, "its normalizer is given to it"


def test_an_attention_and_a_corpus_are_run_by_name(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of evaluate beside our own, on texts that the other package gives."""
    install(OTHERS)
    save_tiny(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    common = ["stage=evaluate", f"model={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}", "patterns=[window]"]
    few = ["evaluate.samples=4", "evaluate.batch_size=2", "evaluate.measured=1"]
    assert run.main([*common, *few, "corpus=letters", "corpus.words=7", "attention=mean", "attention.share=0.5"]) == 0
    table = pd.read_csv(tmp_path / "run" / "evaluate" / "results.csv")
    mean = table.iloc[-1]
    assert mean["variant"] == "mean (softmax)", "as the model attends"
    assert (mean["sparsity"], mean["share"], mean["computed_density"]) == (0, 0.5, 0)
    manifest = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert manifest["parents"]["corpus"] == "letters 7 0"


def test_what_is_left_out_may_be_broken(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that cannot be imported stops pattern=all, by name; who names others goes on."""
    install(code="import nothing_of_that_name")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    common = [f"qk={GRAPH / 'golden_enc-attn.pt'}", "stage=score", f"run_dir={tmp_path / 'run'}"]
    assert run.main(common) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "pattern=leaky of the package beside_0 cannot be imported" in said[0]
    assert not (tmp_path / "run" / "score").exists()
    assert run.main([*common, "patterns=[window]"]) == 0


@pytest.mark.parametrize(
    ("entries", "code", "said"),
    [
        (
            PATTERNS,
            "import nothing_of_that_name",
            "pattern=near of the package beside_0 cannot be imported from beside_0:",
        ),
        (
            PATTERNS,
            "x = 1",
            "pattern=near of the package beside_0 cannot be imported from beside_0:Near (AttributeError",
        ),
        (
            "[sparsefinder.patterns]\nnear = beside_{n}:Letters\n",
            CODE,
            "beside_0:Letters is no pattern; needed is a frozen",
        ),
        (
            "[sparsefinder.corpora]\nletters = beside_{n}:Near\n",
            CODE,
            "beside_0:Near is no corpus; needed is a class with `documents(split, cache)`",
        ),
        ("[sparsefinder.corpora]\nletters = beside_{n}:Letters\n", "1 +", "cannot be imported from beside_0:Letters ("),
        (
            "[sparsefinder.attentions]\nmean = beside_{n}:Near\n",
            CODE,
            "beside_0:Near is no attention; needed is a class made with a `normalizer`",
        ),
        (
            "[sparsefinder.attentions]\nmean = beside_{n}:Mean\n",
            "raise OSError('no\\nlibrary')",
            "attention=mean of the package beside_0 cannot be imported from beside_0:Mean (OSError: no library)",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(
    install: Install,
    entries: str,
    code: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(entries, code)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    group = next(group for group, whose in named.GROUPS.items() if whose in entries)
    name = {"pattern": "near", "corpus": "letters", "attention": "mean"}[group]
    assert run.main([f"stage={'score' if group == 'pattern' else 'evaluate'}", f"{group}={name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert named.settings_of("pattern", "window")["width"], "others are as they were"


def test_names_that_are_taken(install: Install) -> None:
    install("[sparsefinder.patterns]\nwindow = beside_{n}:Near\nnear = beside_{n}:Near\n")
    with pytest.raises(
        UserError, match="pattern=window is the name of two: sparsefinder itself and the package beside_0"
    ):
        named.settings_of("pattern", "window")
    install()
    with pytest.raises(UserError, match="the package beside_1 and the package beside_0 have one; rename one"):
        named.settings_of("pattern", "near")


def test_artefacts_that_conformance_makes_up() -> None:
    assert {*learned().artefacts} == {*LOADERS}
    assert (
        learned(3).artefacts["centroids"].layers[0].shape[-1]
        == 3 * learned().artefacts["centroids"].layers[0].shape[-1]
    )
