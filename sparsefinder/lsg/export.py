"""The code that a saved LSG model carries, so that it loads where this package is not installed.

It is this package's own: the modules that a model needs, with their imports rewritten to the folder
(`sparsefinder.executors.local_sparse_global.block_layout` → `.lsg_block_layout`). transformers copies them with a model that
was loaded by `trust_remote_code=True`.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsefinder.lsg.families import Family

MODULES = (
    *("errors", "graphs", "numerics.entmax_newton", "numerics.normalizers", "numerics.pairs", "numerics.tracing"),
    *(f"executors.local_sparse_global.{name}" for name in ("settings", "sparse_keys", "block_layout", "attention")),
    *("models.families", "models.position_tables", "models.transformers_internals"),
    *("lsg.families", "lsg.configuration", "lsg.input_and_output", "lsg.inputs", "lsg.modeling", "lsg.export"),
)
"""Modules of `sparsefinder` that are carried along, each under the last part of its name (but for `_RENAMED`)."""

_RENAMED = {"models.families": "traits"}  # beside `lsg.families`
_IMPORT = re.compile(r"^( *)from sparsefinder\.([\w.]+) import ", re.MULTILINE)


def _carried(module: str) -> str:
    """The name of a module in the folder."""
    return f"lsg_{_RENAMED.get(module, module.rpartition('.')[2])}"


def auto_map(family: Family) -> dict[str, str]:
    """The entry of `config.json` that leads transformers' Auto classes to the carried code."""
    classes = {auto: f"lsg_modeling.LSG{name}" for auto, name in family.auto_classes().items()}
    return {"AutoConfig": f"lsg_configuration.{family.config_name}", **classes}


def write_code(folder: str | Path) -> None:
    """Write the code into `folder`, over an older copy."""
    folder, here = Path(folder), Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    if Path(__file__).name.startswith("lsg_"):  # this is such a copy
        sources = {file.name: file for file in here.glob("lsg_*.py")}
    else:
        package = here.parent
        sources = {f"{_carried(name)}.py": package / f"{name.replace('.', '/')}.py" for name in MODULES}
    for name, file in sources.items():
        text = _IMPORT.sub(lambda line: f"{line[1]}from .{_carried(line[2])} import ", file.read_text(encoding="utf-8"))
        (folder / name).write_text(text, encoding="utf-8")
