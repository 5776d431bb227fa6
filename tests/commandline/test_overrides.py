"""From what people type to what Hydra reads; in this process, so that many mistakes can be tried."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from scripts import run
from sparsefinder import pipeline
from sparsefinder.commandline.conf_folder import FILES
from sparsefinder.commandline.overrides import Known, quoted, understood
from tests.conftest import GRAPH

KNOWN = Known(FILES, lambda: ["window", "nsamples", "qk", "finetune.learning_rate"])


def read(*arguments: str) -> list[str]:
    return list(understood(arguments, KNOWN).settings)


@pytest.mark.parametrize(
    "path",
    [
        "runs/lr=0.1/qk.pt",
        "über/ñandú.pt",
        "with space/qk.pt",
        "o'brien/qk.pt",
        'a"b.pt',
        "list[1].pt",
        "(copy) qk.pt",
        "{x}.pt",
        "2024_01",
        "1e5",
        ".5",
        "nan",
        "a&b;c#d!.pt",
        "日本.pt",
    ],
)
def test_every_path_arrives_as_it_was_typed(path: str) -> None:
    for key in ("qk", "run_dir", "corpus.train", "model.name_or_path"):
        [setting] = read(f"{key}={path}")
        assert OverridesParser.create().parse_override(setting).value() == path
    model = read(f"model={path}")
    assert model[0] == "model=pretrained"
    assert OverridesParser.create().parse_override(model[1]).value() == path


def test_paths_in_lists_and_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parse = OverridesParser.create().parse_override
    [setting] = read("corpus.train=[a=b.txt, ~/ü.txt,'c,d.txt',plain]")
    assert parse(setting).value() == ["a=b.txt", "/home/me/ü.txt", "c,d.txt", "plain"]
    [setting] = read("corpus.data_files={train: ~/a=b.json, validation: c.json}")
    assert parse(setting).value() == {"train": "/home/me/a=b.json", "validation": "c.json"}
    assert read("qk=~/x.pt") == ["qk=/home/me/x.pt"]
    assert read("-m", "target=density=0.1,recall=0.9") == ["target='density=0.1','recall=0.9'"]


@pytest.mark.parametrize("text", ["a'b", "a\\'b", "end\\", "end\\\\", "'", "a\\b", ""])
def test_quotes_keep_every_letter(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


@pytest.mark.parametrize(
    "setting",
    [
        *("window=3", "stage=[score,report]", "pattern.threshold=-1.5e-3", "qk=null", "run_dir=runs/${name}/x"),
        *("alpha=1.5", "corpus.path=allenai/c4", "stage='score'", "pattern.sweep=[1,2,[3,4]]", "+seed=1"),
        *("-m window=range(1,9,2)", "-m window=null,3,11", "-m window=choice(1,3)", "hydra/launcher=joblib"),
    ],
)
def test_what_hydra_reads_is_left_alone(setting: str) -> None:
    *flags, setting = setting.split()
    assert read(*flags, setting) == [setting]


SCORE = ["stage=score", "pattern=window", f"qk={GRAPH / 'golden_enc-attn.pt'}"]
WRONG = {
    ("--experiment", "smoke"): "settings are written without dashes, as KEY=VALUE: experiment=smoke",
    ("--stage=score",): "KEY=VALUE: stage=score",
    ("--window", "3"): "KEY=VALUE: window=3",
    ("--window",): "KEY=VALUE: window=VALUE",
    ("--multrun", "window=3"): "there is no option --multrun; settings are KEY=VALUE, options are --multirun",
    ("-x",): "there is no option -x",
    ("--config-name", "foo"): "there is no option --config-name",
    ("--cfg",): "--cfg needs a word after it: --cfg job",
    ("--cfg", "jobs"): "did you mean job?",
    ("--cfg", "job", "foo=1"): "there is no setting foo",
    ("--help", "windw=1"): "there is no setting windw; `--cfg job` shows all of them; did you mean window?",
    ("--help=3",): "--help takes no value",
    ("--resolve",): "add --cfg job",
    ("--info", "foo"): "'foo' sets nothing",
    ("-m",): "write -m pattern=kmeans,distance, or leave out -m",
    ("-m", "stage=score"): "write -m pattern=kmeans,distance, or leave out -m",
    ("-m", "window=3,"): "nothing stands before or after a comma",
    ("-m", "model=tiny,a/b"): "over both at once",
    ("window",): "did you mean window=VALUE?",
    ("kmeans",): "did you mean pattern=kmeans?",
    ("score",): "did you mean stage=score?",
    ("smok",): "give settings as KEY=VALUE",
    ("=3",): "is no name of a setting",
    ("fenêtre=3",): "'fenêtre' is no name of a setting",
    ("~window",): "cannot be taken away",
    ("window=",): "window= has no value: write window=VALUE",
    ("qk=",): "qk= has no value",
    ("nsamples=1", "nsamples=2"): "nsamples is set twice, to 1 and to 2: leave one out",
    ("window=3", "++window=5"): "window is set twice",
    ("pattern=[kmeans,window]",): "patterns=[kmeans,window] with pattern=all takes these, -m pattern=kmeans,window",
    ("attention=[masked]",): "give one name, or sweep with -m attention=masked",
    ("pattern=null",): "pattern=null: one is needed; choose one of all, bigbird",
    ("pattern=kmens",): "did you mean kmeans?",
    ("experiment=smok",): "did you mean smoke?",
    ("corpus=doc",): "did you mean docstrings?",
    ("attention=buckted",): "did you mean bucketed?",
    ("model=null",): "model=null: one is needed",
    ("name=null",): "name=null: one is needed",
    ("stage=null",): "give stage=NAME",
    ("stage=[score,", "report]"): "write it without blanks, stage=[score,report]",
    ("stage=score,report",): "several stages are a list, stage=[score,evaluate]",
    ("window=3,5",): "add --multirun, or -m; a list is window=[3,5]",
    ("qk=a,b.pt",): "a path with a comma is quoted",
    ("hydra.run.dir=x",): "lies in one folder, run_dir=PATH",
    ("hydra.mode=MULTIRUN",): "a sweep is started with -m",
    ("qk=${",): "qk='${' cannot be read: ${KEY} stands for the value of another setting",
    (*SCORE, "window=${foo}"): "window: Interpolation key 'foo' not found; ${KEY} stands for",
    (*SCORE, "window=9999999999999999999"): "window=9999999999999999999 is too large",
    ("pattern._target_=x",): "there is no setting pattern._target_; `--cfg job` shows all of them",
    ("hydra.foo=1",): "there is no setting hydra.foo",
    ("learning_rate=1",): "did you mean finetune.learning_rate or project.learning_rate or bilinear.learning_rate",
    ("pattern=window", "pattern.widht=3"): "did you mean pattern.width?",
    ("+windw=3",): "there is no setting windw; `--cfg job` shows all of them; did you mean window?",
    (*SCORE, "window={a"): "window must be int or null, got '{a'",
    (*SCORE, "window='3"): 'window must be int or null, got "\'3"',
    (*SCORE, "window=true"): "window must be int or null, got True",
    (*SCORE, "window=-3"): "got -3: try 1",
    (*SCORE, "alpha=nan"): "alpha must be a finite number, got nan",
    (*SCORE, "score.alpha=inf"): "score.alpha must be a finite number, got inf",
    ("stage=score", "patterns=[kmeens]"): "did you mean kmeans?",
    ("stage=finetune", "finetune.learning_rate=nan"): "finetune.learning_rate must be a finite number, got nan",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_one_line_and_no_work(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline, "run_stages", lambda *_: pytest.fail("something was run"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main(list(arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert WRONG[arguments] in line
    assert not list(tmp_path.iterdir())
