"""transformers' own common model tests, on LSG models of every family: which fail, beside those that the plain models fail too.

    python benchmarks/transformers_tests.py                      # every family, one after another; half an hour on two cores
    python benchmarks/transformers_tests.py roberta bart

The tests come with the source distribution of the installed transformers, which pip fetches into a folder that is thrown away;
without an index they are skipped, and this says so. The models are those of `transformers_cases.py`. Exits non-zero where a
test fails that passes for the plain model and has no row in the table of ``docs/reference/lsg.md``.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from sparsefinder.lsg.families import FAMILIES

HERE = Path(__file__).parent
ABSENT = {"exporters/test_export": "ExportTesterMixin", "generation/test_utils": "GenerationTesterMixin"}
"""Modules of tests that the source distribution lacks, and the class that is taken from each: an empty one stands in."""


def fetch(folder: Path) -> bool:
    """Put the package `tests` of transformers into `folder`, and what it imports; False where pip finds no index."""
    version = importlib.metadata.version("transformers")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "--dest",
        str(folder),
        f"transformers=={version}",
    ]
    found = all(
        subprocess.run([*pip, *arguments], check=False).returncode == 0
        for arguments in (["download", *source], ["install", "--target", str(folder), "--no-deps", "parameterized"])
    )
    if not found:
        return False
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        tests = [member for member in archive.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        archive.extractall(folder, tests, filter="data")
    (folder / f"transformers-{version}" / "tests").rename(folder / "tests")
    for module, name in ABSENT.items():
        file = folder / "tests" / f"{module}.py"
        file.parent.mkdir()
        file.write_text(f"class {name}:\n    pass\n", encoding="utf-8")
    for package in (folder / "tests", *(folder / "tests" / module for module in ("exporters", "generation"))):
        (package / "__init__.py").touch()
    return True


def failures(folder: Path, family: str, kind: str) -> tuple[str, set[str]]:
    """How the tests of one family ended, in words, and the names of those that failed; `kind`: lsg or plain."""
    report = folder / f"{family}.{kind}.xml"
    path = os.pathsep.join([str(folder), str(HERE.parent)])
    environment = {**os.environ, "FAMILY": family, "KIND": kind, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE / "transformers_cases.py"), "--quiet", "--timeout", "120"]
    command += ["-c", os.devnull, "--rootdir", str(folder), "--import-mode", "importlib", "-p", "no:cacheprovider"]
    command += ["-o", "python_files=transformers_cases.py", "--disable-warnings", f"--junit-xml={report}"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        return f"broke off: {ended.stderr.strip().splitlines()[-1:] or ended.returncode}", {"collection"}
    failed = {
        re.sub(r"\W.*", "", case.get("name", ""))
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    }
    return ended.stdout.strip().splitlines()[-1], failed


def explained() -> Iterator[str]:
    """Names of the tests in the table of `docs/reference/lsg.md`, where each has its reason."""
    yield from re.findall(
        r"^\| `(test_\w+)` \|",
        (HERE.parent / "docs" / "reference" / "lsg.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )


def main() -> int:
    """Run the families that were named, print a line each, and say what is new."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    families = parser.parse_args().families or list(FAMILIES)
    if unknown := sorted(set(families) - set(FAMILIES)):
        parser.error(f"no family {', '.join(unknown)}; choose of {', '.join(FAMILIES)}")
    new = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not fetch(folder):
            print("skipped: pip cannot fetch the source distribution of transformers (no index is reached)")
            return 0
        for family in families:
            ended, failed = failures(folder, family, "lsg")
            print(f"{family}: {ended}", flush=True)
            plain = failures(folder, family, "plain")[1] if failed - set(explained()) else set()
            for name in sorted(failed):
                known = (
                    "in docs/reference/lsg.md"
                    if name in explained()
                    else "the plain model, too"
                    if name in plain
                    else "NEW"
                )
                print(f"    {name}: {known}")
                new |= {f"{family}: {name}"} if known == "NEW" else set()
    print(f"{len(new)} tests fail that pass for the plain models and are not explained in docs/reference/lsg.md")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
