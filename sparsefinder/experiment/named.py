"""What can be chosen by name: the files of ``conf``, and patterns, attentions and corpora of other packages.

A package beside this one names its classes in its metadata (``[project.entry-points."sparsefinder.patterns"]`` of its
pyproject.toml), and nothing here is changed for it. Its names are read without importing it; it is imported where one of them
is asked for, by itself or by ``pattern=all``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import yaml

from sparsefinder.errors import UserError, one_of
from sparsefinder.experiment.instantiate import PLAIN, class_named

_PACKAGE = Path(__file__).resolve().parent.parent
# inside the package once it is installed, beside it in the repository: see setup.py
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
GROUPS = {
    "pattern": "sparsefinder.patterns",
    "attention": "sparsefinder.attentions",
    "corpus": "sparsefinder.corpora",
}
"""Folder of ``conf`` → group of entry points that adds to it."""
GIVEN = {"attention": ("pattern", "normalizer")}
"""What the stages give to a class of that kind when they make it, so that it is no setting."""
SHARED = ("alpha", "causal", "seed")
"""Settings of the experiment that an installed class takes where it has a field of that name."""


def files(group: str) -> list[str]:
    """The names of the files of a folder of ``conf``."""
    return [path.stem for path in sorted((CONF / group).glob("*.yaml"))]


def installed(group: str) -> dict[str, list[EntryPoint]]:
    """What other packages bring to a folder of ``conf``, by name; more than one where several use the same."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUPS[group]) if group in GROUPS else ():
        if entry not in found.setdefault(entry.name, []):  # a folder may be twice on the path
            found[entry.name].append(entry)
    return dict(sorted(found.items()))


def settings_of_installed(group: str, name: str) -> dict[str, Any]:
    """What would stand in the file of an entry point: its class, the defaults of its fields, and its ``sweep``.

    Fields called as one of `SHARED` are interpolated, as in our own files (``alpha: ${alpha}``); those that name an artefact in
    ``needs`` and those whose default is no plain value are left to the class.

    Raises:
        UserError: There is none of that name, the name is taken, the class cannot be imported or is not one of that kind.
    """
    entries = installed(group).get(name, [])
    if not entries:
        raise UserError(f"{group}={name} is unknown; {one_of(names(group), name)}")
    owners = [f"the package {_owner(entry)}" for entry in entries]
    if name in files(group) or len(owners) > 1:
        both = ["sparsefinder itself", *owners] if name in files(group) else owners
        raise UserError(
            f"{group}={name} is the name of two: {' and '.join(both)} have one; rename one, or uninstall its package"
        )
    entry = entries[0]
    try:
        kind = entry.load()
        parameters = inspect.signature(kind).parameters
    except Exception as error:  # whatever a module of somebody else raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{group}={name} of {owners[0]} cannot be imported from {entry.value} ({reason}): mend that package, or uninstall it"
        ) from error
    is_one, needed = _KINDS[group]
    if not is_one(kind):
        raise UserError(
            f"{group}={name} of {owners[0]}: {entry.value} is no {group}; needed is {needed}, see "
            f"docs/how-to/{'adding_a_pattern' if group == 'pattern' else 'other_packages'}.md"
        )
    settings: dict[str, Any] = {"_target_": entry.value.replace(":", ".")}
    for parameter in parameters.values():
        if parameter.name in GIVEN.get(group, ()):
            continue
        if parameter.name in SHARED:
            settings[parameter.name] = f"${{{parameter.name}}}"
        elif parameter.name not in getattr(kind, "needs", ()) and _is_plain(parameter.default):
            settings[parameter.name] = parameter.default
    sweep = getattr(kind, "sweep", ())
    return settings | ({"sweep": list(sweep)} if len(sweep) else {})


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _is_pattern(kind: Any) -> bool:
    has = hasattr(kind, "sparsity_parameter") and hasattr(kind, "needs")
    return dataclasses.is_dataclass(kind) and _is_called(kind) and has


def _is_attention(kind: Any) -> bool:
    given = "normalizer" in inspect.signature(kind).parameters
    return given and _is_called(kind) and hasattr(kind, "graph") and hasattr(kind, "computed_pairs")


def _is_corpus(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "documents") and hasattr(kind, "fingerprint")


def _is_called(kind: Any) -> bool:
    """Whether objects of the class are called, as functions are."""
    return any("__call__" in vars(base) for base in getattr(kind, "__mro__", ()))


_KINDS = {  # of each group, whether a class is one, and what it takes to be
    "pattern": (_is_pattern, "a frozen dataclass with (QK, layer) → graph, `sparsity_parameter` and `needs`"),
    "attention": (
        _is_attention,
        "a class made with a `normalizer`, with (q, k, v, valid, layer) → output, `graph` and `computed_pairs`",
    ),
    "corpus": (_is_corpus, "a class with `documents(split, cache)` and `fingerprint()`"),
}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def names(group: str) -> list[str]:
    """All that can be chosen for a setting: files and what is installed, not those that stand for all or none of them."""
    single = [name for name in files(group) if not {"every", "none"} & {*_read(CONF / group / f"{name}.yaml")}]
    return sorted({*single, *installed(group)})


def settings_of(group: str, name: str) -> Mapping[str, Any]:
    """The file of that name, or what stands for it in another package; interpolations are as they are written.

    Raises:
        UserError: For a name that is not there, and as `settings_of_installed`.
    """
    if name in installed(group):
        return settings_of_installed(group, name)
    path = CONF / group / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        raise UserError(f"{group}={name} is unknown; {one_of(names(group), name)}")
    return _read(path)


def filled(group: str, name: str, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
    """A choice without Hydra.

    Args:
        group: A folder of ``conf``.
        name: Of a file in it, or of what is installed.
        values: What interpolations stand for, such as ``alpha``.

    Returns:
        Its class, its settings with the values filled in and lists as tuples, and its ``sweep``.
    """
    settings = settings_of(group, name)
    if "_target_" not in settings:
        raise UserError(f"{group}={name} is not one {group}; {one_of(names(group), name)}")
    plain = {key: _filled(value, values) for key, value in settings.items() if key not in ("_target_", "sweep")}
    return class_named(settings["_target_"], group), plain, tuple(settings.get("sweep") or ())


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and value.startswith("${"):
        return values[value[2:-1]]
    return tuple(value) if isinstance(value, list) else value


@cache
def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings
