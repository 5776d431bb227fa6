"""Join a table of any number of runs, the points of their sweeps included, into one: as CSV and as Parquet.

python scripts/collect.py runs/tiny runs/large --out both
python scripts/collect.py runs --table evaluate/results
"""

import sys
import tempfile
from pathlib import Path

from sparsefinder.commandline.commands import Parser, until_stopped
from sparsefinder.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all went well, 2 for wrong input."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run_dir of a run, or a folder of several")
    parser.add_argument("--table", default="score/metrics", help="score/metrics (the default), evaluate/results, …")
    parser.add_argument("--out", default="collected", help="path without ending; default: collected.csv and .parquet")
    given = parser.parse_args(arguments)
    return until_stopped(lambda: outcome(given.runs, given.table, Path(given.out)), "run the same command again")


def outcome(runs: list[str], table: str, out: Path) -> int:
    """As `join`, with the exit status."""
    try:
        join(runs, table, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def join(runs: list[str], table: str, out: Path) -> None:
    """Write ``out``.csv and ``out``.parquet, whole or not at all."""
    from sparsefinder.storage import sweep_points, tables

    joined = tables.collect_runs(runs, table)
    for point in dict.fromkeys(point for run in runs for point in sweep_points.not_done(Path(run))):
        print(f"not done, what is there of it is from an earlier time: {point}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            tables.write(joined, Path(folder), out.name)
            for written in Path(folder).iterdir():
                written.replace(out.parent / written.name)
    except OSError as error:
        raise UserError(f"cannot write {out}.csv: {error.strerror}; choose another --out") from error
    print(f"{out}.csv and {out}.parquet: {len(joined)} rows of {joined['run'].nunique()} runs")


def command() -> None:
    """The console command ``sparsefinder-collect``."""
    sys.exit(main())


if __name__ == "__main__":
    command()
