"""Tidy tables on disk, and all tables of many runs as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsefinder.store import UserError, read_manifest


def tidy(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table; whole numbers stay whole where some rows have none (empty in CSV)."""
    return pd.DataFrame(rows).convert_dtypes(convert_string=False, convert_floating=False)


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
        if read_manifest(path.parent) is not None:
            part = pd.read_parquet(path)
            part.insert(0, "run", str(path.parent.parent.relative_to(run_dir)))
            found.append(part)
    if not found:
        raise UserError(f"no finished {table} at or below {run_dir}: run stage={folder} there first")
    return pd.concat(found, ignore_index=True)
