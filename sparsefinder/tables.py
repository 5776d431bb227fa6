"""Tidy tables on disk, and all tables of many runs as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsefinder.store import UserError, content_hash, file_stats, read_manifest


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


def write(table: pd.DataFrame, folder: Path, name: str) -> None:
    """``name.csv`` for people and ``name.parquet`` for programs."""
    table.to_csv(folder / f"{name}.csv", index=False)
    table.to_parquet(folder / f"{name}.parquet", index=False)


def collect(run_dir: Path | str, table: str = "score/metrics") -> pd.DataFrame:
    """Join one table of all finished runs at and below ``run_dir``, the points of a sweep for instance.

    ``table``: ``score/metrics``, ``evaluate/results`` or ``evaluate/layers``. A column ``run`` holds each row's folder. A run
    without a manifest is not finished and is left out.
    """
    folder, name = table.split("/")
    found = []
    for path in sorted(Path(run_dir).rglob(f"{folder}/{name}.parquet")):
        if (manifest := read_manifest(path.parent)) is not None:
            if manifest.stat != file_stats(path.parent) and manifest.content != content_hash(path.parent):
                raise UserError(
                    f"{path.parent} is not what stage={folder} wrote: it was damaged or replaced; run that stage there again"
                )
            part = pd.read_parquet(path)
            part.insert(0, "run", str(path.parent.parent.relative_to(run_dir)))
            found.append(part)
    if not found:
        raise UserError(f"no finished {table} at or below {run_dir}: run stage={folder} there first")
    return pd.concat(found, ignore_index=True)
