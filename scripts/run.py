"""Run stages of the pipeline: Hydra in, `sparsefinder.pipeline` out. See ``--help``."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import time

import hydra
from omegaconf import DictConfig

from sparsefinder.commandline.checks import check
from sparsefinder.commandline.commands import program, until_stopped
from sparsefinder.commandline.conf_folder import HYDRA, groups, settings_with
from sparsefinder.commandline.messages import EXPECTED, one_line
from sparsefinder.commandline.overrides import HELP, Known, understood
from sparsefinder.commandline.sweeps import run_sweep
from sparsefinder.errors import UserError, meant

SPEAKS = os.environ.get("RANK", "0") == "0"  # of several processes, started by torchrun, the first one


def main(argv: list[str]) -> int:
    """Check the command line, then let Hydra run one job, or many with ``-m``. Returns the exit status."""
    return until_stopped(lambda: outcome(argv), "what is done is kept, and the same command goes on" if SPEAKS else "")


def outcome(argv: list[str]) -> int:
    """As `main`, of a command line that nobody interrupts."""
    try:
        typed = understood(argv, Known(groups(), settings_with))
        if "--version" in typed.options:
            print(f"sparsefinder {importlib.metadata.version('sparsefinder')}")
            return 0
        todo = check(typed)
        named = [f"hydra.help.app_name='{program()}'"] if {*HELP} & {*typed.options} else []
        sys.argv = [sys.argv[0], *typed.options, *named, *typed.settings]  # Hydra takes no flag between two settings
        failures = run_sweep(todo) if todo and not typed.asks else run_once()
    except UserError as error:
        failures = [one_line(error)]
    # what is no file of conf/model was taken for a path or a name on the hub
    failures = [
        f + (meant(groups()["model"], name[1]) if (name := re.match(r"model=(\S+): ", f)) else "") for f in failures
    ]
    for failure in failures if SPEAKS else ():
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def command() -> None:
    """The console command ``sparsefinder``."""
    status = main(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # one in six of several processes that had trained together aborted in Python's own farewell, all work done: torch
        # takes threads apart there that still run
        sys.stdout.flush()
        sys.stderr.flush()
        if status and not SPEAKS:
            time.sleep(2)  # torchrun ends all others when one has failed: the one that says why must come first
        os._exit(status)
    sys.exit(status)


def run_once() -> list[str]:
    """One job. Returns what was wrong with it, in one line, or nothing."""
    failures: list[str] = []

    def job(cfg: DictConfig) -> None:
        from sparsefinder.commandline.job import run  # with torch, which --help and --cfg can do without

        try:
            run(cfg)
        except EXPECTED as error:
            failures.append(one_line(error))

    hydra.main(**HYDRA)(job)()
    return failures


if __name__ == "__main__":
    command()
