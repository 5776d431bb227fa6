"""``python -m sparsefinder.testing NAME …``: whether patterns keep the promises of all patterns, each by its name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparsefinder.errors import UserError
from sparsefinder.experiment import named
from sparsefinder.testing import CHECKS, broken_promises
from sparsefinder.testing.by_name import subject_named


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each pattern and each promise that it breaks.

    Args:
        arguments: Names of patterns; without any, those of all other packages.

    Returns:
        0 where all promises are kept, 1 where one is broken, 2 for a name that is not there.
    """
    parser = argparse.ArgumentParser(prog="python -m sparsefinder.testing", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: the patterns of all other packages")
    names = parser.parse_args(arguments).names or list(named.installed("pattern"))
    status = 0 if names else 2
    if not names:
        print("no other package brings a pattern: give the name of one of conf/pattern", file=sys.stderr)
    for name in names:
        try:
            broken = broken_promises(subject_named(name))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{name}: {len(CHECKS) - len(broken)} of {len(CHECKS)} promises are kept", *broken, sep="\n  ")
        status = max(status, int(bool(broken)))
    return status


if __name__ == "__main__":
    sys.exit(main())
