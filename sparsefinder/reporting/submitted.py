"""Results that people send: a folder each, checked before it is shown, and one page made of all of them.

A folder of ``results/`` holds ``configuration.json`` (the settings of each stage, but for the list of patterns, which the command
names), ``environment.json`` (`NEEDED`: what was measured by which command, on which machine, with which versions),
``recall.csv`` (that of the report) and, where the model was evaluated, ``model.csv`` (a row for each variant).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsefinder.analysis.method_families import BOUNDS, OURS, PUBLISHED, TOP_K, family_of
from sparsefinder.errors import UserError
from sparsefinder.storage.store import Store

NEEDED = ("title", "command", "machine", "date", "versions", "content")
"""Keys of ``environment.json``; ``note`` may stand beside them, ``content`` is the hash of the table of each stage."""
OF_RECALL = ("pattern", "surroundings", "quadratic", "density", "recall", "recall_low", "recall_high")
_ONE_EACH = ("pattern", "surroundings", "density")  # columns of recall.csv that name a row
OF_MODEL = ("variant", "loss", "loss_minus_entmax", "sparsity", "recall")
_STAGES = ("model", "qk", "projections", "centroids", "key_centroids", "score", "evaluate")
_LISTS = ("configurations", "attentions", "conversions")
_SHARE = "a share between 0 and 1"
_LEVELS = (0.05, 0.1, 0.2)


def taken_from(run: Path, folder: Path, title: str, command: str, machine: str, note: str = "") -> None:
    """Make the folder of a result from a run with a report.

    Args:
        run: Its run directory.
        folder: The folder to make.
        title: In a few words: model and corpus.
        command: That measured it.
        machine: Processor or GPU, and threads.
        note: What a reader must know, such as other work on that machine.

    Raises:
        UserError: ``folder`` is there already or has no name for a result, or the run has no report, or a damaged one.
    """
    if fault := _fault_of_name(folder):
        raise UserError(f"{folder.name or folder}: {fault}")
    store = Store(run)
    recall = run / "report" / "recall.csv"
    score = store.manifest("score")
    if score is None or not recall.is_file():
        raise UserError(f"{run} has no score or no report: run stage=[score,report] there first")
    if folder.exists():
        raise UserError(f"{folder} is there already: give another name")
    manifests = {name: found for name in _STAGES if (found := store.manifest(name)) is not None}
    settings = {
        found.stage: _without_paths({key: value for key, value in found.settings.items() if key not in _LISTS})
        for found in manifests.values()
    }
    environment = {
        "title": title,
        "command": command,
        "machine": machine,
        "date": score.created[:10],
        "versions": score.versions,
        "content": {name: manifests[name].content for name in ("score", "evaluate") if name in manifests},
    } | ({"note": note} if note else {})
    if damaged := list(_faults_of_table(recall, OF_RECALL)):
        raise UserError(f"{run}: {damaged[0]}; run stage=report there again")
    tables = {"recall": _rounded(pd.read_csv(recall)[list(OF_RECALL)])}
    if "evaluate" in manifests:
        variants = pd.read_parquet(store.path("evaluate") / "results.parquet")
        tables["model"] = _rounded(variants[[name for name in OF_MODEL if name in variants]])
    folder.mkdir(parents=True)
    for name, content in (("configuration", settings), ("environment", environment)):
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=name == "configuration")
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)


def faults(folder: Path) -> list[str]:
    """What is wrong with the folder of a result, a line each; empty where nothing is."""
    return [f"{folder.name}: {fault}" for fault in _faults(folder)]


def copies(folders: Sequence[Path]) -> list[str]:
    """Results of which another folder has the same tables, a line each."""
    first: dict[str, str] = {}
    lines = []
    for folder in folders:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        measured = json.dumps(environment["content"], sort_keys=True)
        if measured in first:
            lines.append(f"{folder.name}: is {first[measured]} once more, of the same tables; leave out one of the two")
        first.setdefault(measured, folder.name)
    return lines


def _fault_of_name(folder: Path) -> str:
    known = re.fullmatch(r"[a-z0-9][a-z0-9-]*", folder.name)
    return "" if known else "its name must be small letters, digits and dashes"


def _faults(folder: Path) -> Iterator[str]:
    if fault := _fault_of_name(folder):
        yield fault
    missing = [
        name for name in ("configuration.json", "environment.json", "recall.csv") if not (folder / name).is_file()
    ]
    if missing:
        yield f"{', '.join(missing)} missing: scripts/join_results.py --add RUN makes them"
        return
    for name in ("configuration.json", "environment.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            yield f"{name} cannot be read ({' '.join(str(error).split())})"
            continue
        if not isinstance(content, dict):
            yield f"{name} must be names with values, as scripts/join_results.py --add RUN writes it"
            continue
        yield from (f"{name} names a path of your machine: {path}" for path in _paths(content))
        if name == "environment.json":
            yield from _faults_of_environment(content)
    yield from _faults_of_table(folder / "recall.csv", OF_RECALL)
    if (folder / "model.csv").is_file():
        yield from _faults_of_table(folder / "model.csv", ("variant", "loss"))


def _faults_of_environment(content: dict[str, Any]) -> Iterator[str]:
    yield from (f"environment.json lacks {key}" for key in NEEDED if not content.get(key))
    versions, measured, date = (content.get(name) for name in ("versions", "content", "date"))
    if versions and not (isinstance(versions, dict) and {"sparsefinder", "torch"} <= {*versions}):
        yield "environment.json: versions must name sparsefinder and torch, each with its version"
    elif isinstance(versions, dict):
        unknown = [f"{name} {version}" for name, version in versions.items() if not re.match(r"\d", str(version))]
        yield from (f"environment.json: {version} is no version, which begins with a number" for version in unknown)
    if measured and not (isinstance(measured, dict) and "score" in measured):
        yield "environment.json: content must name the table of score, with its hash"
    if date and not re.fullmatch(r"\d{4}-\d\d-\d\d", str(date)):
        yield f"environment.json: date must be written as 2026-11-29, got {date}"


def _faults_of_table(path: Path, columns: Sequence[str]) -> Iterator[str]:
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        yield f"{path.name} cannot be read ({' '.join(str(error).split())})"
        return
    if lacking := [name for name in columns if name not in table]:
        yield f"{path.name} lacks the columns {', '.join(lacking)}"
        return
    if table.empty:
        yield f"{path.name} has no rows"
        return
    if unnamed := [name for name in ("pattern", "variant", "density") if name in table and table[name].isna().any()]:
        yield f"{path.name}: {unnamed[0]} is missing in a row"
        return
    if "quadratic" in table and table["quadratic"].dtype != bool:
        yield f"{path.name}: quadratic must be True or False"
    shares = ("density", "recall", "sparsity", "recall_low", "recall_high")
    numbers = {name: pd.to_numeric(table[name], errors="coerce") for name in (*shares, "loss") if name in table}
    wrong = [name for name, values in numbers.items() if (table[name].notna() & values.isna()).any()]
    yield from (f"{path.name}: {name} must be {'a number' if name == 'loss' else _SHARE}" for name in wrong)
    for name in shares:
        if name in numbers and name not in wrong and not numbers[name].dropna().between(0, 1).all():
            yield f"{path.name}: {name} must be {_SHARE}"
    if "recall_low" in numbers and (numbers["recall_low"] > numbers["recall_high"] + 1e-6).any():
        yield f"{path.name}: recall_low is above recall_high"
    if set(_ONE_EACH) <= set(columns) and table.duplicated(list(_ONE_EACH)).any():
        twice = table.loc[table.duplicated(list(_ONE_EACH)), "pattern"].iloc[0]
        yield f"{path.name}: {twice} has two rows of one density"


def page(folders: Sequence[Path]) -> str:
    """What the results say, in Markdown: one table of all, then a section for each."""
    heads = ["result", "pairs", "best that skips work", "recall", "best published", "recall", "true scores, top k"]
    lines = [_row(heads), f"|{'---|' * len(heads)}"]
    sections = []
    for folder in folders:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        table = pd.read_csv(folder / "recall.csv", keep_default_na=True).dropna(subset=["recall"])
        table = table.assign(family=table["pattern"].map(family_of), surroundings=table["surroundings"].fillna(""))
        for level in _LEVELS:
            lines.append(
                _row([environment["title"] if level == _LEVELS[0] else "", f"{level:.0%}", *_cells(table, level)])
            )
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        about = [
            f"## {environment['title']}",
            f"`{environment['command']}`, {environment['date']}, {environment['machine']}; {versions}.",
            *([environment["note"]] if environment.get("note") else []),
            f"Settings, all rows and their intervals: `results/{folder.name}/`.",
        ]
        sections.append("\n\n".join(about))
    return "\n".join(lines) + "\n\n" + "\n\n".join(sections)


def _cells(table: pd.DataFrame, level: float) -> list[str]:
    at = table[(table["density"] - level).abs() < 1e-9]
    usable = at[~at["quadratic"].astype(bool) & (at["family"] != BOUNDS)]
    cells: list[str] = []
    for rows in (usable, at[at["family"] == PUBLISHED]):
        if rows.empty:
            cells += ["–", "–"]
        else:
            best = rows.loc[rows["recall"].idxmax()]
            beside = f" + {best['surroundings']}" if best["surroundings"] else ""
            ours = " (ours)" if best["family"] == OURS else ""
            cells += [f"`{best['pattern']}`{beside}{ours}", _recall(best)]
    top = at[at["pattern"] == TOP_K]
    return [*cells, "–" if top.empty else _recall(top.iloc[0])]


def _recall(row: Any) -> str:
    half = (row["recall_high"] - row["recall_low"]) / 2
    return f"{row['recall']:.3f}" + (f" ±{half:.3f}" if pd.notna(half) else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    return table.round(5)


def _paths(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for value in content.values():
            yield from _paths(value)
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value)
    elif isinstance(content, str) and re.match(r"(/|~|[A-Za-z]:\\)", content):
        yield content


def _without_paths(content: Any) -> Any:
    """Paths of the machine as the last part of their name."""
    if isinstance(content, dict):
        return {key: _without_paths(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_paths(value) for value in content]
    return Path(content).name if isinstance(content, str) and list(_paths(content)) else content
