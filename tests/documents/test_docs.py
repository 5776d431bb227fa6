"""Every command of the documents is run, as it is printed, on a sliver of data; one that cannot be says why.

Each document gets a folder of its own with the files that it names, and shares one small run with the others. All code
blocks run in their order, in one process. A block after a comment ``<!-- not run: reason -->`` is listed instead, below.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conversions.tiny_sources import LENGTH, make_source

from sparsefinder.corpora import train_tokenizer
from sparsefinder.storage.samples import load_samples
from sparsefinder.storage.store import ARTEFACTS
from tests.conftest import GRAPH, ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"docs/how-to/adding_a_pattern.md": "tests/patterns/test_adding_a_pattern.py"}  # a test of its own

NOT_RUN = {
    ("CONTRIBUTING.md", "adds a folder to results/; tests/scripts/test_join_results.py does the same elsewhere"),
    ("README.md", "installs; tests/test_package.py builds the wheel and runs its commands"),
    ("README.md", "sets up an environment, then minutes of work; `make -n` is what tests can do"),
    ("docs/how-to/command_line.md", "needs the Hugging Face hub and a GPU"),
    ("docs/explanation/measured.md", "minutes, on a quiet machine"),
    ("docs/explanation/measured.md", "needs a model and text of yours, and ten minutes on a quiet machine"),
    (
        "docs/how-to/long_documents.md",
        "needs an encoder and text, and five minutes in which the machine does nothing else",
    ),
    ("docs/explanation/measured.md", "trains at every budget, which takes minutes"),
    ("docs/explanation/predictors.md", "needs an encoder and text of yours"),
    ("docs/explanation/equal_cost.md", "needs an encoder and text of yours, and half an hour"),
    ("docs/explanation/equal_cost.md", "needs an encoder and text of yours, and half an hour on a quiet machine"),
    ("docs/explanation/equal_cost.md", "needs an encoder and text of yours, and minutes"),
    ("docs/explanation/equal_cost.md", "needs the default run, and some minutes"),
    (
        "CONTRIBUTING.md",
        "sets up environments and runs the suite that this test is part of; `make -n` is what it can do",
    ),
    ("docs/how-to/releasing.md", "hours of work, and needs uv; `make -n` is what tests can do"),
    (
        "docs/how-to/cluster.md",
        "needs a Slurm cluster; tests/scripts/test_sweeps.py runs the same with a stand-in for sbatch",
    ),
    (
        "docs/reference/families.md",
        "trains for minutes; tests/test_causal.py and tests/test_seq2seq.py run the experiments in short",
    ),
    (
        "docs/how-to/decoders.md",
        "trains for minutes; tests/test_causal.py and tests/test_compare.py run the same stages in short",
    ),
    ("docs/how-to/decoders.md", "trains for minutes; tests/test_seq2seq.py runs the same stages in short"),
    ("docs/explanation/each_head.md", "trains four models for minutes"),
    (
        "docs/how-to/every_length.md",
        "trains for half an hour and compares as long; tests/test_compare.py runs the stage in short",
    ),
    ("docs/how-to/every_length.md", "trains for minutes; tests/test_finetune.py trains under another attention"),
    ("docs/reference/lsg.md", "needs the Hugging Face hub"),
    ("docs/how-to/other_packages.md", "needs that package; tests/experiment/test_named.py makes one and does the same"),
    ("docs/how-to/tasks.md", "needs the Hugging Face hub"),
    ("docs/how-to/tasks.md", "needs a model of yours"),
    ("docs/tutorial/first_hour.md", "sets up an environment; `make -n` is what tests can do"),
    ("docs/tutorial/first_hour.md", "installs; tests/test_package.py builds the wheel and runs its commands"),
    (
        "docs/tutorial/first_hour.md",
        "the tiny experiment takes minutes; the same stages run in every other command of this page",
    ),
}

# appended to a command unless it says something else: seconds instead of minutes
SMALL = {
    "experiment": "smoke",
    "pattern": "kmeans",
    "attention": "bucketed",
    "nsamples": "4",
    "extract.nsamples_validation": "2",
    "corpus.max_characters": "100000",
    "finetune.steps": "4",
    "finetune.eval_steps": "2",
    "project.epochs": "1",
    "evaluate.samples": "2",
    "evaluate.measured": "1",
    "evaluate.head.steps": "2",
    "report.dpi": "30",
}
BUT_IN = {"frontier": {"model": "smoke", "score.seeds": "2", "bilinear.steps": "10", "bilinear.indexer_steps": "2"}}
BUT_WITH_A_MODEL = {"experiment": "tiny", "finetune.eval_blocks": "4"}  # smoke describes a model of its own

# runs a list of tasks in one process, so that libraries are imported once
DRIVER = """
import json, os, runpy, subprocess, sys
from pathlib import Path
for task in json.loads(Path(sys.argv[1]).read_text()):
    print("####", task["shown"], file=sys.stderr, flush=True)
    os.chdir(task["folder"])
    if task["kind"] == "python":
        exec(compile(task["code"], task["shown"], "exec"), {"__name__": "__main__"})
    elif task["kind"] == "process":
        subprocess.run(task["command"], cwd=task.get("cwd"), check=True)
    else:
        sys.argv = task["command"]
        try:
            runpy.run_path(task["command"][0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                sys.exit(f"exit status {stop.code}")
print("#### done", file=sys.stderr)
"""


@dataclass(frozen=True)
class Block:
    document: str
    language: str
    text: str
    reason: str  # why it is not run; empty where it is

    @property
    def lines(self) -> list[str]:
        """Commands without comments, continued lines joined."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def blocks(path: Path) -> list[Block]:
    pattern = re.compile(r"(?:<!-- not run: ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    name = str(path.relative_to(ROOT))
    found = pattern.findall(path.read_text(encoding="utf-8"))
    return [Block(name, language, text, reason) for reason, language, text in found]


ALL = [block for path in DOCUMENTS for block in blocks(path)]


PARTS = 3  # each well within its time on a slow machine that does other things too


@pytest.mark.timeout(900)  # a minute and a half on an idle machine
@pytest.mark.parametrize("part", range(PARTS))
def test_what_documents_show_runs(part: int, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    make_files(shared)
    todo = [{"folder": str(shared), **script("python scripts/run.py")}]
    for number, path in enumerate(DOCUMENTS[part::PARTS]):
        if str(path.relative_to(ROOT)) not in ELSEWHERE:
            folder = tmp_path / str(number)
            folder.mkdir()
            for file in shared.iterdir():
                (folder / file.name).symlink_to(file)
            found = [task for block in blocks(path) if not block.reason for task in tasks(block)]
            if path.parent.name == "patterns":  # pages that say the same need no second run
                known = [task.get("command") for task in todo]
                found = [task for task in found if task["command"] not in known]
            todo += [{"folder": str(folder), **task} for task in found]
    (tmp_path / "tasks.json").write_text(json.dumps(todo))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "tasks.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[done.stderr.rfind("####") :]
    assert done.stderr.count("####") == len(todo) + 1
    assert "#### done" in done.stderr


def make_files(folder: Path) -> None:
    """The files that documents name: text, files of the published form, a model called roberta-base, and a place for runs."""
    (folder / "runs" / "smoke").mkdir(parents=True)
    (folder / "runs" / "tiny").symlink_to("smoke")
    for name in ("scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    (folder / "train.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "validation.txt").write_text(max(texts, key=len), encoding="utf-8")
    (folder / "runs" / "large" / "qk_enc-attn.pt").mkdir(parents=True)  # an artefact in several files
    samples = load_samples(GRAPH / "golden_enc-attn.pt")
    for name in ("qk.pt", "runs/large/qk_enc-attn.pt/0.pt", "runs/large/qk_enc-attn.pt/1.pt"):
        samples.save(folder / name)
    samples.part(0, len(samples) - 1).save(folder / "qk_validation.pt")  # others than those that are learned from
    for name in ("projections.pickle", "centroids.pickle"):
        (folder / name).write_bytes((GRAPH / f"golden_{name}").read_bytes())
    tokenizer = train_tokenizer(texts, 300, LENGTH)
    make_source("ForMaskedLM", vocab_size=len(tokenizer)).save_pretrained(folder / "roberta-base")
    tokenizer.save_pretrained(folder / "roberta-base")


def tasks(block: Block) -> list[dict[str, Any]]:
    if block.language == "python":
        return [{"kind": "python", "code": block.text, "shown": f"{block.document}: {block.text[:60]!r}"}]
    return [script(line) for line in block.lines] if block.language == "bash" else []


def script(line: str) -> dict[str, Any]:
    """What the driver does for a line of a document; a kind of command that nobody thought of is an error."""
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "pytest"]:
        return {"kind": "process", "command": [sys.executable, *words[1:]], "cwd": str(ROOT), "shown": line}
    if words[0] == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", words[1]]
        return {
            "kind": "process",
            "command": [*start, *script(f"python {shlex.join(words[2:])}")["command"]],
            "shown": line,
        }
    assert words[0] == "python", f"{line}: mark it as not run, or teach this test to run it"
    assert (ROOT / words[1]).is_file(), line
    arguments = words[2:]
    if words[1] == "scripts/run.py" and not {"--help", "--cfg"} & set(arguments):
        given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        small = SMALL | BUT_IN.get(given.get("experiment", ""), {}) | (BUT_WITH_A_MODEL if "model" in given else {})
        arguments += [f"{key}={value}" for key, value in small.items() if key not in given]
    return {"kind": "script", "command": [str(ROOT / words[1]), *arguments], "shown": line}


def test_what_is_not_run_is_known_and_says_why() -> None:
    found = [(block.document, block.reason) for block in ALL if block.reason]
    print(f"{len(found)} of {len(ALL)} blocks are not run:", *(f"{name}: {why}" for name, why in found), sep="\n  ")
    assert set(found) == NOT_RUN
    assert len(found) == len(NOT_RUN)


def test_every_target_of_make_exists() -> None:
    commands = [shlex.split(line, comments=True) for block in ALL if block.language == "bash" for line in block.lines]
    named = {words[1] for words in commands if words[0] == "make"}
    assert {"run", "test", "setup", "test-lowest"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_artefact_is_described() -> None:
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    for artefact in ARTEFACTS.values():
        assert f"`{artefact.path}" in page, f"docs/reference/files.md says nothing about {artefact.path}"


def test_commands_are_marked_as_such() -> None:
    """A command in a block without a language would not be run."""
    for block in ALL:
        if block.language not in ("bash", "python"):
            assert not re.search(r"^(python|make|pip|sparsefinder[\w-]*) [\w-]", block.text, re.MULTILINE), block


def test_every_file_that_a_document_names_exists() -> None:
    for path in DOCUMENTS:
        for name in set(re.findall(r"`((?:[\w.]+/)+[\w]+\.(?:py|md|ipynb|yaml))`", path.read_text(encoding="utf-8"))):
            if "powers" not in name and "/ours" not in name:
                assert (ROOT / name).exists() or (ROOT / "sparsefinder" / name).exists(), f"{path.name}: {name}"
