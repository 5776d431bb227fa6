"""Check the results that people sent, and write the page that shows them.

python scripts/join_results.py                # checks results/, writes docs/reference/results.md
python scripts/join_results.py --check        # checks alone
python scripts/join_results.py --add runs/tiny --name tiny-two-cores --title "…" --command "make run" --machine "…"
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparsefinder.commandline.commands import Parser, until_stopped
from sparsefinder.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: scripts/join_results.py writes what follows -->\n", "\n<!-- end of results -->"


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all is well, 2 for wrong input and for a result that cannot be shown."""
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="the folder of results")
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "reference" / "results.md", help="the page to write"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--add", type=Path, metavar="RUN", help="make the folder of a result from this run")
    for name, words in (
        ("name", "of the new folder"),
        ("title", "model and corpus, in a few words"),
        ("command", "that measured it"),
        ("machine", "processor or GPU, and threads"),
        ("note", "what a reader must know"),
    ):
        parser.add_argument(f"--{name}", default="", help=words)
    given = parser.parse_args(arguments)
    return until_stopped(lambda: outcome(given), "run the same command again")


def outcome(given: object) -> int:
    """As `main`, of parsed arguments."""
    try:
        join(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def join(given: object) -> None:
    """Add, check and write, as was asked for.

    Raises:
        UserError: A result has a fault, or something that ``--add`` needs is not given.
    """
    from sparsefinder.reporting import submitted

    asked = vars(given)
    if asked["add"] is not None and asked["check"]:
        raise UserError("--check writes nothing, and --add makes a folder: leave out one of the two")
    if asked["add"] is None and not asked["results"].is_dir():
        raise UserError(f"there is no folder {asked['results']}: give the one that the results are in")
    before, after = ("", "") if asked["check"] else _around(asked["page"])
    if asked["add"] is not None:
        words = {name: asked[name] for name in ("title", "command", "machine")}
        if missing := [f"--{name}" for name in ("name", *words) if not asked[name]]:
            raise UserError(f"--add needs {', '.join(missing)}")
        if Path(asked["name"]).name != asked["name"]:
            raise UserError(f"--name {asked['name']}: its name must be small letters, digits and dashes")
        submitted.taken_from(asked["add"], asked["results"] / asked["name"], **words, note=asked["note"])
    folders = sorted(path for path in asked["results"].iterdir() if path.is_dir())
    if wrong := [fault for folder in folders for fault in submitted.faults(folder)] or submitted.copies(folders):
        raise UserError("; ".join(wrong))
    print(f"{len(folders)} results, nothing wrong with them")
    if not asked["check"]:
        asked["page"].write_text(f"{before}{BEGIN}\n{submitted.page(folders)}\n{END}{after}", encoding="utf-8")


def _around(page: Path) -> tuple[str, str]:
    """What stands before and after the results on their page."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{page} cannot be read ({' '.join(str(error).split())}): give the page of the results"
        ) from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page} has no place for the results: it needs the lines {BEGIN.strip()} and {END.strip()}")
    return before, after


if __name__ == "__main__":
    sys.exit(main())
