"""Splits in the syntax of ``datasets``, such as ``train[5:](pct1_dropremainder)+test``; which rows they name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsefinder.errors import UserError

SIZE = 10**9  # rows of a split, whose size is not known here: so many that a number of rows is less than one per cent


@dataclass(frozen=True)
class Rows:
    """Rows of a split, as if it had `SIZE` of them.

    Args:
        name: Of the split.
        first: First row.
        end: Row after the last.
    """

    name: str
    first: int = 0
    end: int = SIZE


def rows_of(split: str) -> list[Rows]:
    """The parts of a split, in their order.

    Args:
        split: One split, a slice of one, or several joined by ``+``.

    Raises:
        UserError: ``datasets`` would not understand it.
    """
    # a plain name, which is what most people give, need not wait for a library that takes a second and a half to import
    if split.isidentifier():
        return [Rows(split)]
    from datasets import ReadInstruction

    parts = []
    for part in re.split(r"\s*\+\s*", split.strip()):
        try:
            instruction = ReadInstruction.from_spec(part)
            name = instruction.to_spec().partition("[")[0]
            (rows,) = instruction.to_absolute({name: SIZE})
        except ValueError as error:
            raise UserError(
                f"{split} is no split of a data set ({' '.join(str(error).split())}): give a name such as train, a slice such as "
                "train[:1%], or several joined by +"
            ) from error
        parts.append(Rows(name, rows.from_, rows.to))
    return parts
