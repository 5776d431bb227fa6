"""What went wrong, in one line: the messages of other libraries in the words of the command line."""

from __future__ import annotations

import re

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

from sparsefinder.errors import UserError

EXPECTED = (UserError, InstantiationException, OmegaConfBaseException)
"""Errors that say to people what to do next; any other one is a fault of the program."""


def one_line(error: BaseException) -> str:
    """The innermost message that was written for people, on one line; of Hydra's and OmegaConf's what people can mend."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return " ".join(str(seen).split())
        seen = seen.__cause__
    text = " ".join(str(error).replace("\n\t", ", ").split())
    if unknown := re.match(r"Could not override '([^']*)'", text):
        return f"there is no setting {unknown[1]}; `--cfg job` shows all of them"
    if missing := re.match(
        r"(?:In '\S+': )?Could not find '([^']*)/([^'/]*)' Available options in '[^']*':,? (.*?) Config", text
    ):
        return f"{missing[1]}={missing[2]} is unknown; choose one of {missing[3]}"
    stands = "${KEY} stands for the value of another setting"
    if broken := re.match(r"Error merging override (.*)", text):
        return f"{broken[1]} cannot be read: {stands}"
    message, _, key = text.partition(" full_key: ")
    return f"{key.split()[0]}: {message}; {stands}" if "nterpolation" in message and key else message
