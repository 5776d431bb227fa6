"""Tables that grow: what was measured stays for as long as what it was made from does.

An artefact that grows has a record of the items it holds: what was asked for, the artefacts that it was measured with, and what
its rows are called. A later command measures what is not there, adds its rows, and keeps those of every item whose parents, and
whose settings that all rows share, are still the same. The same item measured in another way takes the place of the old one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparsefinder.storage.manifests import versions
from sparsefinder.storage.moved_names import with_names_of_today
from sparsefinder.storage.store import Store

if TYPE_CHECKING:
    import pandas as pd  # at run time only where a table is read: the pipeline itself stays light

RECORD = "measured.json"


@dataclass(frozen=True)
class Item:
    """One thing to be measured.

    Args:
        what: Its settings, by the field of the stage's settings that they stand in, as JSON.
        how: Settings that make it another measurement of the same.
        needs: Artefacts that it is measured with.
        rows: What its rows are called in the tables.
    """

    what: Mapping[str, Any]
    how: Mapping[str, Any]  # settings that make it another measurement of the same
    needs: tuple[str, ...]  # artefacts that it is measured with
    rows: tuple[Any, ...] = ()  # what its rows are called in the tables

    @property
    def name(self) -> str:
        """Equal for two measurements of the same."""
        return json.dumps(self.what, sort_keys=True)

    @property
    def key(self) -> str:
        """Equal where nothing is to be measured again."""
        return json.dumps([self.what, self.how], sort_keys=True)


class Growing(Protocol):
    """Settings of a stage whose table grows."""

    @property
    def items(self) -> tuple[Item, ...]:
        """What they ask for."""

    @property
    def shared(self) -> Mapping[str, Any]:
        """What all rows of a table have in common."""


@dataclass(frozen=True)
class Table:
    """A finished artefact beside what is asked for now. ``folder``: where it lies, None where nothing of it can be kept."""

    folder: Path | None
    held: tuple[Item, ...]  # items that are as true as they were
    gone: int  # items whose parents or shared settings are others now
    asked: tuple[Item, ...]
    parents: Mapping[str, str]  # of what is held, by content
    shared: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, settings: Growing, store: Store) -> Table:
        """The artefact ``name`` of the run directory itself; another run's, or a damaged one, holds nothing."""
        shared = {
            **json.loads(json.dumps(settings.shared)),
            "inputs": getattr(settings, "inputs", {}),
            "last_tenth": store.splits_qk,
            "version": versions().get("sparsefinder"),
        }
        nothing = cls(None, (), 0, settings.items, {}, shared)
        if name in store.given or store.manifest(name) is None or store.borrows(name) or store.damaged(name):
            return nothing
        record = _read(folder := store.path(name))
        if record is None:
            return nothing
        items = [Item(item["what"], item["how"], tuple(item["needs"]), tuple(item["rows"])) for item in record["items"]]
        changed = {
            parent
            for parent, content in record["parents"].items()
            if store.find(parent) is not None and store.content(parent) != content
        }
        held = tuple(item for item in items if changed.isdisjoint(item.needs)) if record["shared"] == shared else ()
        needs = {need for item in held for need in item.needs}
        parents = {need: content for need, content in record["parents"].items() if need in needs}
        return cls(folder if held else None, held, len(items) - len(held), settings.items, parents, shared)

    @property
    def missing(self) -> tuple[Item, ...]:
        """What is asked for and not held."""
        known = {item.key for item in self.held}
        return tuple(item for item in self.asked if item.key not in known)

    @property
    def wanted(self) -> tuple[Item, ...]:
        """What there is to measure: what is missing, or all that is asked for where nothing is."""
        return self.missing or self.asked

    @property
    def kept(self) -> tuple[Item, ...]:
        """What stays as it is, when what is wanted has been measured."""
        replaced = {item.name for item in self.wanted}
        return tuple(item for item in self.held if item.name not in replaced)

    @property
    def rows(self) -> list[Any]:
        """The rows that stay."""
        return [row for item in self.kept for row in item.rows]

    @property
    def first(self) -> int:
        """The number of the first new row, where rows are numbered."""
        return 1 + max((row for item in self.held for row in item.rows), default=-1)

    def grown(self, new: pd.DataFrame, name: str) -> pd.DataFrame:
        """The rows that stay, and below them the new ones.

        Args:
            new: What was measured now, its ``configuration`` counted from zero.
            name: Of the table, without its suffix.
        """
        from sparsefinder.storage import tables

        if self.folder is None:
            return new
        return tables.join(
            [self.staying(name, "configuration"), new.assign(configuration=new["configuration"] + self.first)]
        )

    def staying(self, name: str, column: str) -> pd.DataFrame:
        """The rows that stay.

        Args:
            name: Of the table, without its suffix.
            column: The one that says what a row is called.
        """
        import pandas as pd

        assert self.folder is not None
        old = pd.read_parquet(self.folder / f"{name}.parquet")
        return old[old[column].isin(self.rows)]

    def write(self, folder: Path, store: Store, measured: Iterable[tuple[Any, Item]]) -> None:
        """The record of a grown table: what stays, and each measured row with its item."""
        rows: dict[str, list[Any]] = {item.key: [] for item in self.wanted}
        for row, item in measured:
            rows[item.key].append(row)
        new = [dataclasses.replace(item, rows=tuple(rows[item.key])) for item in self.wanted]
        parents = {**self.parents, **{need: store.content(need) for item in new for need in item.needs}}
        items = [dataclasses.asdict(item) for item in (*self.kept, *new)]
        text = json.dumps({"shared": self.shared, "parents": parents, "items": items}, indent=1, ensure_ascii=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")

    def in_words(self, name: str) -> str:
        """What is going to happen, for the log; empty where nothing of the old table is kept."""
        if not self.kept:
            return ""
        known = len(self.asked) - len(self.missing)
        skipped = f"; {known} of those asked for are measured already" if known else ""
        gone = f"; {self.gone} that were measured with others go" if self.gone else ""
        return f"{len(self.missing)} measured and added to {len(self.kept)} in {name} that stay{skipped}{gone}"


def described(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a manifest, with what all commands that the table grew by asked for."""
    record = _read(folder)
    described_settings = dict(settings)
    for item in record["items"] if record else ():
        for field, value in item["what"].items():
            if (
                isinstance(described_settings.get(field), list)
                and value not in (None, *described_settings[field])
                and not item["what"].get("target")
            ):
                described_settings[field] = [*described_settings[field], value]
    return described_settings


def parents_of(folder: Path) -> dict[str, str]:
    """The parents of all that the table holds."""
    record = _read(folder)
    return dict(record["parents"]) if record else {}


def rows_asked(name: str, settings: Growing, store: Store) -> list[Any]:
    """What the rows of these settings are called in the finished artefact."""
    table = Table.of(name, settings, store)
    asked = {item.key for item in table.asked}
    return [row for item in table.held if item.key in asked for row in item.rows]


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():  # of an earlier version
        return None
    content: dict[str, Any] = with_names_of_today(json.loads(path.read_text(encoding="utf-8")))
    return content
