"""Tidy tables on disk, and all tables of many runs as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsefinder.errors import UserError
from sparsefinder.storage import sweep_points
from sparsefinder.storage.manifests import content_hash, file_stats, read_manifest


def tidy(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table; whole numbers and truth values stay what they are where some rows have none (empty in CSV)."""
    table = pd.DataFrame(rows, dtype=object)
    for name in table:
        present = [value for value in table[name] if value is not None and value == value]
        kinds = {type(value) for value in present}
        if kinds == {bool}:
            table[name] = table[name].astype("boolean" if len(present) < len(table) else bool)
        elif kinds == {int}:
            table[name] = table[name].astype("Int64" if len(present) < len(table) else "int64")
        elif kinds <= {int, float}:
            table[name] = table[name].astype("float64")
    return table


def write(table: pd.DataFrame, folder: Path | str, name: str) -> None:
    """``name.csv`` for people and ``name.parquet`` for programs."""
    folder = Path(folder)
    table.to_csv(folder / f"{name}.csv", index=False)
    table.to_parquet(folder / f"{name}.parquet", index=False)


def collect(run_dir: Path | str, table: str = "score/metrics") -> pd.DataFrame:
    """Join one table of all finished runs at and below a folder, the points of a sweep for instance.

    Args:
        run_dir: The folder; a run without a manifest is not finished and is left out.
        table: ``score/metrics``, ``evaluate/results`` or ``evaluate/layers``.

    Returns:
        All rows; the column ``run`` holds each row's folder.

    Raises:
        UserError: There is no such table, or one was damaged.
    """
    root = Path(run_dir)
    return join([_read(folder, table, str(folder.relative_to(root))) for folder in _finished(root, table)])


def collect_runs(run_dirs: Sequence[Path | str], table: str = "score/metrics") -> pd.DataFrame:
    """As `collect`, for several folders. A run that is below two of them is there once.

    Args:
        run_dirs: The folders.
        table: As in `collect`.

    Returns:
        All rows; ``run`` starts with the folder as it was given, ``point`` says what a sweep set.

    Raises:
        UserError: Nothing is finished below one of the folders, or a table was damaged.
    """
    parts, met = [], set()
    for root in map(Path, run_dirs):
        for folder in _finished(root, table):
            if folder.resolve() not in met:
                met.add(folder.resolve())
                part = _read(folder, table, str(folder))
                part.insert(1, "point", sweep_points.read(folder).point)
                parts.append(part)
    return join(parts)


def _finished(root: Path, table: str) -> list[Path]:
    """Run directories at and below ``root`` that have a finished ``table``."""
    stage, _, name = table.partition("/")
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the run_dir of a run, or a folder of several")
    folders = [
        path.parent.parent for path in sorted(root.rglob(f"{stage}/{name}.parquet")) if read_manifest(path.parent)
    ]
    if not folders:
        others = {f"{p.parent.name}/{p.stem}" for p in root.rglob("*/*.parquet") if read_manifest(p.parent)}
        there = f"; there are {', '.join(sorted(others))}" if others else f": run stage={stage} there first"
        raise UserError(f"no finished {table} at or below {root}{there}")
    return folders


def _read(folder: Path, table: str, run: str) -> pd.DataFrame:
    path = folder / f"{table}.parquet"
    manifest = read_manifest(path.parent)
    if manifest is None or (manifest.stat != file_stats(path.parent) and manifest.content != content_hash(path.parent)):
        raise UserError(
            f"{path.parent} is not what stage={path.parent.name} wrote: it was damaged or replaced; run that stage there again"
        )
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())}); remove it and run its stage again"
        ) from error
    rows.insert(0, "run", run)
    return rows


def join(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; whole numbers and truth values stay what they are where some tables have no such column."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    filled = [part.dropna(axis="columns", how="all") for part in parts]
    partly = {name for name in names if not all(name in part for part in filled)}
    kinds = {"int64": "Int64", "bool": "boolean"}
    filled = [
        part.astype(
            {name: kinds[str(part[name].dtype)] for name in part if name in partly and str(part[name].dtype) in kinds}
        )
        for part in filled
    ]
    return pd.concat(filled, ignore_index=True).reindex(columns=names)
