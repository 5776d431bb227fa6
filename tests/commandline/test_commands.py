"""What the commands share: Ctrl-C and SIGTERM, wrong arguments, and the name in their help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import collect, convert_checkpoint, run, split_by_length
from sparsefinder.commandline.commands import Parser, program, until_stopped
from tests.conftest import ROOT


def kill(number: int) -> int:
    os.kill(os.getpid(), number)
    return 0


def wrapped(number: int) -> int:
    """What a library makes of an interruption."""
    try:
        return kill(number)
    except KeyboardInterrupt:
        raise RuntimeError("of a library") from None


def swallowed(number: int) -> int:
    try:
        return kill(number)
    except KeyboardInterrupt:
        return 0


@pytest.fixture
def _heard() -> Iterator[None]:
    """Whoever starts the tests in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", [kill, wrapped, swallowed])
def test_an_interruption_is_one_line(
    work: Callable[[int], int], number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    assert until_stopped(lambda: work(number), "go on") == 128 + number
    assert capsys.readouterr().err == f"error: interrupted by {number.name}; go on\n"
    assert signal.getsignal(number) is before


def test_without_an_interruption_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert until_stopped(lambda: 2, "go on") == 2
    with pytest.raises(RuntimeError, match="of nobody"):
        until_stopped(lambda: fail("of nobody"), "go on")
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(until_stopped(lambda: 3, "go on")))  # may handle no signals
    thread.start()
    thread.join()
    assert found == [3]
    assert capsys.readouterr().err == ""


def fail(message: str) -> int:
    raise RuntimeError(message)


def test_signals_of_somebody_else_stay_theirs() -> None:
    met: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: met.append(number))
    try:
        assert until_stopped(lambda: kill(signal.SIGTERM), "go on") == 0
        assert met == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("sweep", "number"), [([], signal.SIGINT), (["-m", "seed=1,2"], signal.SIGTERM)], ids=["once", "swept"]
)
def test_a_run_that_is_interrupted(sweep: list[str], number: signal.Signals, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).write_text("\n".join(f"the {split} of {i} green stones" for i in range(200)))
    model = [
        "model.layers=1",
        "model.heads=2",
        "model.hidden_size=16",
        "model.max_length=16",
        "model.vocabulary_size=300",
    ]
    corpus = ["corpus=text", f"corpus.train={tmp_path / 'train'}", f"corpus.validation={tmp_path / 'validation'}"]
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), *sweep, "stage=finetune", *corpus, *model]
    running = subprocess.Popen(
        [*command, "finetune.steps=1000000", "finetune.batch_size=2", f"run_dir={tmp_path / 'run'}"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who ignores a signal, hands that on
    )
    assert running.stderr is not None
    said = ""
    while "corpus: train" not in said:  # it has begun
        line = running.stderr.readline()
        assert line, said
        said += line
    running.send_signal(number)
    rest = running.stderr.read()
    assert running.wait(60) == 128 + number
    lines = [
        line for line in (said + rest).splitlines() if not line.startswith(("corpus: ", "finetune: ", "seed=1 → "))
    ]
    assert lines == [f"error: interrupted by {number.name}; what is done is kept, and the same command goes on"]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not list((tmp_path / "run").rglob("model.json"))


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (collect.main, [], "the following arguments are required: RUN"),
        (collect.main, ["--ouy", "x", "runs"], "unrecognized arguments: --ouy; did you mean --out?"),
        (collect.main, ["--ou", "x", "runs"], "did you mean --out?"),
        (collect.main, ["runs", "--out"], "argument --out: expected one argument"),
        (convert_checkpoint.main, ["--initial_modle", "x"], "arguments are required: --initial_model"),
        (convert_checkpoint.main, ["--initial_model", "x", "--model_name", "y", "--sed", "1"], "did you mean --seed?"),
        (split_by_length.main, ["a"], "arguments are required: out"),
    ],
)
def test_wrong_arguments_are_one_line(
    main: Callable[[list[str]], int], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("started", "name"), [("/usr/bin/sparsefinder", "sparsefinder"), ("/a/scripts/run.py", "python scripts/run.py")]
)
def test_help_speaks_of_the_program_by_its_name(
    started: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program() == name
    with pytest.raises(SystemExit):
        run.main(["--help"])
    shown = capsys.readouterr().out
    assert f"  {name} stage=extract nsamples=50" in shown
    assert ("scripts/run.py" in shown) == started.endswith(".py")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sparsefinder-collect"])
    assert "scripts" not in Parser(collect.__doc__).format_help()
