"""The console commands: each looks whether what it needs is installed, before it imports anything, and says what is missing.

The attention, the patterns and the converters need torch and transformers alone; everything else is in extras of pyproject.toml.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

_REPORT = ("jinja2", "markupsafe", "matplotlib", "pandas", "pyarrow")
EXTRAS = {"report": _REPORT, "fit": ("sklearn",), "pipeline": ("accelerate", "datasets", "hydra", "sklearn", *_REPORT)}
"""Names of extras, with the modules that they bring."""


def run() -> None:
    """``sparsefinder``: every stage."""
    _start("run", "pipeline")


def collect() -> None:
    """``sparsefinder-collect``: one table of many runs."""
    _start("collect", "report")


def split() -> None:
    """``sparsefinder-split``: files of queries and keys, by length."""
    _start("split_by_length")


def convert() -> None:
    """``sparsefinder-convert``: checkpoints for long inputs."""
    _start("convert_checkpoint")


def sparsify() -> None:
    """``sparsefinder-sparsify``: checkpoints with a predicted sparse attention."""
    _start("sparsify", "fit")


def _start(script: str, extra: str | None = None) -> None:
    """Run a module of ``sparsefinder.scripts``; one line and status 2 where a module of its extra is not installed."""
    missing = [name for name in EXTRAS.get(extra or "", ()) if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed: pip install 'sparsefinder[{extra}]'", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"sparsefinder.scripts.{script}").command()
