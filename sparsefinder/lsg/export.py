"""The code that a saved LSG model carries, so that it loads where this package is not installed.

It is this package's own: the modules that a model needs, with their imports rewritten to the folder (`sparsefinder.lsg.blocks`
→ `.lsg_blocks`). transformers copies them with a model that was loaded by `trust_remote_code=True`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from sparsefinder.lsg.families import Family
from sparsefinder.store import UserError

MODULES = (
    "settings", "recording", "sparse_keys", "blocks", "attention", "families", "configuration", "ends", "inputs", "modeling",
    "export",
)  # fmt: skip
"""Modules of `sparsefinder.lsg` that are carried along."""

SHARED = ("entmax_kernels", "graphs", "transformers_internals", "transforms")
"""Modules of `sparsefinder` that they need; of `store` only the error."""

_IMPORT = re.compile(r"^( *)from sparsefinder(?:\.lsg)?\.(\w+) import (.+)$", re.MULTILINE)


def auto_map(family: Family) -> dict[str, str]:
    """The entry of `config.json` that leads transformers' Auto classes to the carried code."""
    classes = {auto: f"lsg_modeling.LSG{name}" for auto, name in family.auto_classes().items()}
    return {"AutoConfig": f"lsg_configuration.{family.config_name}", **classes}


def write_code(folder: str | Path) -> None:
    """Write the code into `folder`, over an older copy."""
    folder, here = Path(folder), Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    if Path(__file__).name.startswith("lsg_"):  # this is such a copy
        sources = {file.name: file.read_text(encoding="utf-8") for file in here.glob("lsg_*.py")}
    else:
        files = {name: here / f"{name}.py" for name in MODULES} | {name: here.parent / f"{name}.py" for name in SHARED}
        sources = {f"lsg_{name}.py": file.read_text(encoding="utf-8") for name, file in files.items()}
        sources["lsg_store.py"] = f'"""What a user did wrong."""\n\n\n{inspect.getsource(UserError)}'
    for name, text in sources.items():
        (folder / name).write_text(_IMPORT.sub(_to_folder, text), encoding="utf-8")


def _to_folder(match: re.Match[str]) -> str:
    """One import of this package, as one of a file in the folder."""
    indent, module, names = match.groups()
    return f"{indent}from .lsg_{module} import {names}"
