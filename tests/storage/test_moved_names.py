"""Files of earlier versions name classes that have moved since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsefinder.experiment.instantiate import class_named
from sparsefinder.storage import growing_table
from sparsefinder.storage.manifests import Manifest, plain, read_manifest, write_manifest
from sparsefinder.storage.moved_names import MOVED, with_names_of_today


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_class_is_found_under_both_names(old: str) -> None:
    assert class_named(old, "attention") is class_named(MOVED[old], "attention")
    assert plain(class_named(old, "attention")) == MOVED[old]


def test_all_else_stays_as_it_is() -> None:
    old, new = next(iter(MOVED.items()))
    given = {"kind": old, "numbers": [1, None, {"type": old, "text": f"of {old}"}], old: True}
    assert with_names_of_today(given) == {
        "kind": new,
        "numbers": [1, None, {"type": new, "text": f"of {old}"}],
        old: True,
    }


def test_manifests_and_records_are_read_with_the_names_of_today(tmp_path: Path) -> None:
    old, new = next(iter(MOVED.items()))
    (artefact := tmp_path / "evaluate").mkdir()
    write_manifest(artefact, Manifest("evaluate", "evaluate", {"attentions": [{"kind": old}]}, {}, "", {}))
    manifest = read_manifest(artefact)
    assert manifest is not None
    assert manifest.settings == {"attentions": [{"kind": new}]}
    (artefact / growing_table.RECORD).write_text(json.dumps({"items": [{"what": {"attentions": {"kind": old}}}]}))
    assert growing_table._read(artefact) == {"items": [{"what": {"attentions": {"kind": new}}}]}
