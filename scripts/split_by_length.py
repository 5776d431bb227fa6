"""Split a file of queries and keys by the number of tokens of its samples.

python scripts/split_by_length.py runs/tiny/qk_enc-attn.pt qk --lengths 10 20 30 40

writes qk-10-20.pt, qk-20-30.pt, qk-30-40.pt and qk-40-up.pt, each with the samples of at least the first and less than the second
number of tokens, and each a file for qk=PATH.
"""

import sys
from pathlib import Path

from sparsefinder.commandline.commands import Parser, until_stopped
from sparsefinder.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all went well, 2 for wrong input."""
    parser = Parser(__doc__)
    parser.add_argument(
        "data", type=Path, help="a file of stage=extract or of the published script, or a folder of them"
    )
    parser.add_argument("out", type=Path, help="beginning of the paths of what is written")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[10, 20, 30, 40], metavar="N", help="default: 10 20 30 40"
    )
    given = parser.parse_args(arguments)
    return until_stopped(lambda: outcome(given.data, given.out, given.lengths), "run the same command again")


def outcome(data: Path, out: Path, lengths: list[int]) -> int:
    """Write the files, and name them. Returns the exit status."""
    from sparsefinder.storage.splitting import split_file

    try:
        for path, count in split_file(data, out, lengths).items():
            print(f"{path}: {count} samples")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def command() -> None:
    """The console command ``sparsefinder-split``."""
    sys.exit(main())


if __name__ == "__main__":
    command()
