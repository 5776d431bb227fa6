"""The light part works without what the extras bring, and a command says which extra it misses."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conversions.tiny_sources import make_source, make_tokenizer

from sparsefinder.commandline import console_scripts
from tests.conftest import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# jinja2 and markupsafe are in an extra, but torch brings them as well
IN_EXTRAS = (
    "accelerate",
    "datasets",
    "entmax",
    "hydra",
    "matplotlib",
    "omegaconf",
    "pandas",
    "pyarrow",
    "sklearn",
    "triton",
)
NEED_EXTRAS = (
    *(
        "commandline.checks",
        "commandline.choices",
        "commandline.composition",
        "commandline.conf_folder",
        "commandline.job",
        "commandline.messages",
        "commandline.sweeps",
    ),
    *(
        "analysis",
        "calibrate",
        "compare",
        "evaluate",
        "evaluation",
        "experiment.calibration",
        "executors.triton.block_sparse",
        "executors.triton.dense_kernels",
        "executors.triton.kernels",
    ),
    *("pipeline", "report", "reporting", "score", "storage.growing_table", "storage.tables"),
)

WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({IN_EXTRAS!r}))  # as if they were not installed
"""
LIGHT = """
import importlib, json
for name in json.loads(sys.argv.pop()):
    importlib.import_module(name)

import torch
from sparsefinder.attention import Bucketed
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.combine import Union
from sparsefinder.patterns.window import Window
from sparsefinder.testing import random_qk

qk = random_qk([12])
assert Bucketed(Window(3), Normalizer(1.5))(qk.q, qk.k, qk.q, qk.valid, 0).shape == qk.q.shape

from sparsefinder.commandline import console_scripts
console_scripts.convert()
"""


def modules() -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sparsefinder").rglob("*.py")]
    return sorted(".".join((path.parent if path.name == "__init__" else path).parts) for path in paths)


def started(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{WITHOUT}sys.path.insert(0, {str(ROOT)!r})\nsys.path.insert(0, '.')\n{code}"]
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=200)


def test_attention_patterns_and_converters_need_no_extra(tmp_path: Path) -> None:
    make_source("ForMaskedLM").save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    needing = tuple(f"sparsefinder.{name}" for name in NEED_EXTRAS)
    light = [name for name in modules() if not any(name == other or name.startswith(f"{other}.") for other in needing)]
    assert len(light) > 80
    # the installed package holds its scripts; a checkout has them beside it
    code = "import scripts, scripts.convert_checkpoint\n" + LIGHT.replace(
        "console_scripts.convert()",
        "sys.modules['sparsefinder.scripts.convert_checkpoint'] = scripts.convert_checkpoint\nconsole_scripts.convert()",
    )
    arguments = ["--initial_model", "source", "--model_name", "lsg", "--max_sequence_length", "64"]
    given = [*arguments, "--model_kwargs", '{"block_size": 8, "sparse_block_size": 8}', json.dumps(light)]
    done = started(code, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lsg" / "conversion.json").is_file()


@pytest.mark.parametrize(("command", "extra"), [("run", "pipeline"), ("collect", "report")])
def test_a_command_says_which_extra_it_misses(command: str, extra: str, tmp_path: Path) -> None:
    done = started(f"from sparsefinder.commandline import console_scripts\nconsole_scripts.{command}()", cwd=tmp_path)
    assert done.returncode == 2
    missing = ", ".join(name for name in console_scripts.EXTRAS[extra] if name in IN_EXTRAS)
    assert done.stderr == f"error: {missing} not installed: pip install 'sparsefinder[{extra}]'\n"


def test_extras_are_those_of_the_project() -> None:
    """Modules that a command looks for are those of the distributions that its extra installs."""
    modules_of = {"scikit-learn": "sklearn", "hydra-core": "hydra"}
    for extra, found in console_scripts.EXTRAS.items():
        declared = set()
        waiting = [extra]
        while waiting:
            for requirement in PROJECT["optional-dependencies"][waiting.pop()]:
                if requirement.startswith("sparsefinder["):
                    waiting.append(requirement.removeprefix("sparsefinder[").removesuffix("]"))
                else:
                    name = requirement.partition(">")[0]
                    declared.add(modules_of.get(name, name))
        assert declared == set(found)


def test_console_commands_start_what_exists() -> None:
    for name, target in PROJECT["scripts"].items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
