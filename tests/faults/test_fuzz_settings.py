"""Hundreds of command lines that nobody should type: one clear line and a non-zero exit each, or the right answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.conftest import GRAPH, ROOT
from tests.faults.test_fuzz_files import COPIES
from tests.nursery import Nursery

VALUES = (
    *("-1", "0", "0.5", "1e999", "-1e999", "nan", "10000000000000000000000", "null", "true", "[]", "{}", "[1,2,null]"),
    *("{a:1}", "''", "x", "' '", "../../etc", "'a=b'", "'" + "x" * 5000 + "'", "'\\n'", "ünï", "???"),
    *("${seed}", "${nothing}", "${oc.env:HOME}", "${seed", "'${'", "__import__", "sparsefinder.storage.files.remove"),
)
ODD = (
    *(
        "=",
        "==",
        "a",
        "=1",
        "seed",
        "seed=",
        "~seed",
        "~seed=0",
        "++seed=1",
        "+seed=1",
        "stage=[",
        "stage={}",
        "stage=[all]",
    ),
    *("stage=[score,score]", "stage=null", "pattern", "pattern=", "pattern=[kmeans,window]", "pattern=../model/tiny"),
    *(
        "corpus=text",
        "corpus=none",
        "model=none",
        "model='a b'",
        "model=a/b/c",
        "experiment=nothing",
    ),
    *(
        "pattern._target_=os.system",
        "score._target_=os.mkdir",
        "model._target_=builtins.exec",
        "corpus._target_=os.getcwd",
    ),
    *("score._target_=sparsefinder.nothing", "finetune._target_=1", "evaluate.adapt=null", "score=null", "corpus=null"),
    *("pattern=kmeans pattern.top_clusters=-1", "pattern=distance pattern.distance=far", "name=a/b", "run_dir="),
    *("-x", "--nothing"),
)
RUN = """
import contextlib, io, json, os, sys, time, traceback
found = []
for arguments in json.loads({cases!r}):
    printed, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            main.__globals__.get("failures", []).clear()  # of the case before
            code = main(arguments)
        except SystemExit as leave:
            code = leave.code
        except BaseException:
            traceback.print_exc(file=printed)
            code = "raised"
    found.append([code, printed.getvalue(), time.monotonic() - began])
with open({file!r}, "w") as file:
    json.dump(found, file)
os._exit(0)
"""


def keys_of(node: object, at: str = "") -> Iterator[str]:
    """Every key of a configuration, by its dots."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from keys_of(value, f"{at}.{key}" if at else key)
    elif at and not at.startswith("hydra") and "defaults" not in at:
        yield at


def test_settings(runs: Nursery, tmp_path: Path) -> None:
    """Every stage is configured; what is right ends at a ``run_dir`` that cannot be made, before anything is done."""
    chance = random.Random(0)
    keys = list(keys_of(yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())))
    keys = [key for key in keys if key not in ("run_dir", "name")]
    keys += ["model.layers", "model.family", "corpus.train", "corpus.max_characters", "pattern.threshold", "model"]
    cases = [[f"{chance.choice(keys)}={chance.choice(VALUES)}"] for _ in range(6 * COPIES)]
    odd = [case.split(" ") if case.startswith("pattern=") else [case] for case in ODD]
    cases += odd if COPIES > 1 else chance.sample(odd, 6)
    cases = [[*case, "run_dir=/proc/none/x"] if not case[0].startswith("run_dir") else case for case in cases]
    file = tmp_path / "found.json"
    done = runs.run(before=RUN.format(cases=json.dumps(cases), file=str(file)))
    assert file.exists(), done.output
    wrong = []
    for case, (code, printed, seconds) in zip(cases, json.loads(file.read_text()), strict=True):
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        usage = code == 2 and "usage:" in printed and "Traceback" not in printed  # of argparse
        if not usage and (
            code != 2 or len(errors) != 1 or "Traceback" in printed or len(errors[0]) > 6000 or seconds > 20
        ):
            wrong.append((case, code, seconds, printed[-300:]))
    assert not wrong, "\n\n".join(map(str, wrong))
    assert not Path("/proc/none").exists()


def test_whole_runs(runs: Nursery, tmp_path: Path) -> None:
    """Scoring with the values of a few settings changed: the exit status tells whether there is a table."""
    given = ["stage=score", *(f"{name}={GRAPH / file}" for name, file in FILES.items())]
    chance = random.Random(1)
    for number in range(3 * COPIES):
        key = chance.choice(
            ("window", "global_tokens", "alpha", "score.samples", "score.map_tokens", "pattern.top_clusters")
        )
        run_dir = tmp_path / str(number)
        done = runs.run(*given, "pattern=kmeans", f"{key}={chance.choice(VALUES)}", f"run_dir={run_dir}")
        if done.status:
            done.refused()
        assert (run_dir / "score.json").exists() == (done.status == 0)


FILES = {
    "qk": "golden_enc-attn.pt",
    "qk_validation": "golden_enc-attn.pt",
    "projections": "golden_projections.pickle",
    "centroids": "golden_centroids.pickle",
}
