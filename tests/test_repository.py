"""What is around the code: workflows, forms and hooks parse, and say what the rest of the repository says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # all texts: no `on` that means true


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path: Path) -> None:
    workflow = read(path)
    assert {"name", "on", "permissions", "jobs"} <= set(workflow)
    assert workflow["permissions"] == {"contents": "read"}, "what needs more, says so in its job"
    jobs = workflow["jobs"]
    for job in jobs.values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= set(jobs)
    for step in steps(path):
        assert ("uses" in step) != ("run" in step), step
        assert "uses" not in step or re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step["uses"]), step
        for target in re.findall(r"\bmake (\S+)", step.get("run", "")):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{path.name}: there is no `make {target}`"


def test_the_oldest_and_the_newest_python_are_tested() -> None:
    said = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    tested = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [said[0], said[-1]]


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names: of two that share one, the second is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_a_release_needs_no_password_and_a_tag_that_is_the_version() -> None:
    path = ROOT / ".github" / "workflows" / "release.yml"
    publish = read(path)["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets" not in path.read_text(encoding="utf-8")
    (check,) = [step["run"] for step in steps(path) if "GITHUB_REF_NAME" in step.get("run", "")]
    line = check.split('"', 1)[1].rpartition('"')[0].replace('\\"', '"').replace("${GITHUB_REF_NAME#v}", r"[\d.]+")
    assert re.search(rf"^{line}$", PROJECT, re.MULTILINE), "pyproject.toml has no such line"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_can_be_shown(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert len({part["id"] for part in asked}) == len(asked)
    assert all(part["attributes"]["label"] for part in asked)
    assert all(part["attributes"]["options"] for part in asked if part["type"] in ("dropdown", "checkboxes"))


def test_there_is_a_form_for_each_kind_of_news() -> None:
    assert {path.stem for path in FORMS} == {"fault", "new_pattern", "new_result"}


def test_hooks_ask_what_make_check_asks() -> None:
    (repo,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    asked = {hook["entry"].removesuffix(" --force-exclude") for hook in repo["hooks"]}
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    checked = {
        re.sub(r"\$\(BIN\)/| --check| \.$", "", line) for line in recipe[1].strip().replace("\t", "").splitlines()
    }
    assert asked == checked


def test_files_that_they_name_exist() -> None:
    paths = [*WORKFLOWS, *FORMS, *ROOT.glob("*.md"), ROOT / ".github" / "pull_request_template.md"]
    for path in paths:
        for name in re.findall(r"\b(?:docs|tests|scripts)/[\w/]+\.(?:md|py)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"
