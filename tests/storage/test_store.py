"""Artefacts: finished means finished, stages run only where something changed, and one process at a time."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from sparsefinder import pipeline
from sparsefinder.errors import UserError
from sparsefinder.experiment.calibration import calibrated
from sparsefinder.pipeline import Stage, chosen_stages, run_stages
from sparsefinder.predictors.centroids import load_centroids
from sparsefinder.predictors.projections import load_projections
from sparsefinder.storage import samples, sweep_points, tables
from sparsefinder.storage.manifests import content_hash, manifest_path, plain, read_manifest
from sparsefinder.storage.store import ARTEFACTS, Store
from tests.conftest import GRAPH


def finish(store: Store, name: str, text: str = "x") -> Path:
    with store.writing(name) as path:
        path.write_text(text)
    store.finish(name, ARTEFACTS[name].stage, {}, {}, 0)
    return store.path(name)


class TestWriting:
    def test_no_manifest_is_not_finished(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        with store.writing("projections") as path:
            path.write_text("x")
        assert (tmp_path / "projections.pickle").exists()
        assert store.find("projections") is None
        with pytest.raises(UserError, match="run stage=project first"):
            store.path("projections")
        store.finish("projections", "project", {}, {}, 0)
        assert store.path("projections").read_text() == "x"

    def test_an_exception_leaves_the_old_artefact_and_nothing_else(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        finish(store, "projections", "old")
        with pytest.raises(ZeroDivisionError), store.writing("projections") as path:
            path.write_text(str(1 / 0))
        assert store.path("projections").read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["projections.pickle", "projections.pickle.json"]

    def test_folders_are_replaced_whole(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        for name in ("a", "b"):
            with store.writing("score") as folder:
                folder.mkdir()
                (folder / name).write_text(name)
        assert [p.name for p in (tmp_path / "score").iterdir()] == ["b"]

    def test_the_manifest_says_what_was_done(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        store.note("projections", recall=0.5)
        path = finish(store, "projections")
        manifest = read_manifest(path)
        assert manifest is not None
        assert manifest.facts == {"recall": 0.5}
        assert manifest.content == content_hash(path)
        assert {"torch", "sparsefinder", "python"} <= manifest.versions.keys()
        assert manifest_path(path).name == "projections.pickle.json"

    @pytest.mark.parametrize("old", ["project", "settings", '"seed": 0', "}", '"x"'])
    def test_a_damaged_manifest_is_none(self, old: str, tmp_path: Path) -> None:
        path = finish(Store(tmp_path), "projections")
        text = manifest_path(path).read_text()
        manifest_path(path).write_text(text.replace(old, "1") if old in text else "[" * 100_000)
        assert Store(tmp_path).find("projections") is None

    def test_a_run_dir_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="choose another run_dir"), Store(tmp_path / "file" / "run").held():
            pass


class TestReading:
    def test_given_files_come_first(self, tmp_path: Path) -> None:
        finish(Store(tmp_path), "projections")
        (tmp_path / "mine").write_text("mine")
        assert Store(tmp_path, {"projections": tmp_path / "mine"}).path("projections").read_text() == "mine"

    def test_a_given_file_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"qk=.*does not exist"):
            Store(tmp_path, {"qk": tmp_path / "none"}).path("qk_validation")

    def test_content_follows_the_bytes_of_a_given_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("a")
        store = Store(tmp_path / "run", {"projections": tmp_path / "mine"})
        before = store.content("projections")
        assert store.content("projections") == before == content_hash(tmp_path / "mine")
        (tmp_path / "mine").write_text("b")
        os.utime(tmp_path / "mine", ns=(0, 0))
        assert store.content("projections") != before

    def test_other_bytes_than_were_written_are_not_read(self, tmp_path: Path) -> None:
        path = finish(Store(tmp_path), "projections", "a")
        status = path.stat()
        path.write_text("b")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time
        with pytest.raises(UserError, match="is not what stage=project wrote"):
            Store(tmp_path).content("projections")
        assert Store(tmp_path, {"projections": path}).content("projections") == content_hash(path)

    def test_the_content_of_a_folder_is_names_and_bytes(self, tmp_path: Path) -> None:
        """Two files that change places are another folder, though their bytes are the same."""
        for folder, names in (("one", "ab"), ("same", "ab"), ("other", "ac"), ("swapped", "ba")):
            (tmp_path / folder).mkdir()
            for name, text in zip(names, ("x", "y"), strict=True):
                (tmp_path / folder / name).write_text(text)
        one, same, other, swapped = (content_hash(tmp_path / each) for each in ("one", "same", "other", "swapped"))
        assert one == same
        assert len({one, other, swapped}) == 3

    def test_another_time_of_the_same_bytes_changes_nothing(self, tmp_path: Path) -> None:
        path = finish(Store(tmp_path), "projections", "a")
        before = Store(tmp_path).content("projections")
        os.utime(path, (4e9, 4e9))  # in the year 2096
        assert Store(tmp_path).content("projections") == before

    def test_what_is_no_file_is_not_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(UserError, match="is no ordinary file"):
                Store(tmp_path, {"qk": path}).content("qk")

    def test_a_variation_reads_its_base_and_never_writes_there(self, tmp_path: Path) -> None:
        base = Store(tmp_path / "base")
        finish(base, "projections", "base")
        point = Store(tmp_path / "base" / "sweep" / "1", base=base.run_dir)
        assert point.path("projections").read_text() == "base"
        assert point.borrows("projections")
        finish(point, "projections", "point")
        assert point.path("projections").read_text() == "point"
        assert base.path("projections").read_text() == "base"


def test_two_processes_cannot_share_a_run_dir(tmp_path: Path) -> None:
    with Store(tmp_path).held():
        code = (
            "from pathlib import Path; from sparsefinder.storage.store import Store\n"
            f"with Store(Path({str(tmp_path)!r})).held(): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert f"is in use by process {os.getpid()}" in other.stderr
    with Store(tmp_path).held():
        pass


# ---- the pipeline, on two stages of our own ----


@dataclass(frozen=True)
class First:
    value: int = 1
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Second:
    factor: int = 10
    needs: tuple[str, ...] = ("projections",)


@dataclass(frozen=True)
class Third:
    needs: tuple[str, ...] = ("projections", "centroids")


@dataclass(frozen=True)
class Space:
    needs: tuple[str, ...] = ("lowrank", "key_centroids")


def run(settings: First | Second | Third | Space, store: Store) -> None:
    """The stage of any of these settings; the pipeline finds it here by its name."""
    if isinstance(settings, (Third, Space)):
        with store.writing("score") as path:
            path.write_text("read")
    elif isinstance(settings, First):
        with store.writing("projections") as path:
            path.write_text(str(settings.value))
    else:
        with store.writing("centroids") as path:
            path.write_text(str(int(store.path("projections").read_text()) * settings.factor))


STAGES = [Stage("project", __name__), Stage("cluster", __name__)]


class TestPipeline:
    def go(
        self, store: Store, caplog: pytest.LogCaptureFixture, first: First = First(), second: Second = Second()
    ) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_stages(STAGES, {"project": first, "cluster": second}, store, seed=0)
        return [record.getMessage() for record in caplog.records]

    def test_a_second_run_skips_everything(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert self.go(Store(tmp_path), caplog) == ["project: makes projections", "cluster: makes centroids"]
        skipped = ["project: done and unchanged, skipped", "cluster: done and unchanged, skipped"]
        assert self.go(Store(tmp_path), caplog) == skipped

    def test_changed_settings_run_a_stage_and_its_children(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.go(Store(tmp_path), caplog)
        messages = self.go(Store(tmp_path), caplog, First(2))
        assert messages == [
            "project: runs again, because value 1 → 2",
            "cluster: runs again, because projections changed",
        ]
        assert Store(tmp_path).path("centroids").read_text() == "20"

    def test_only_the_stage_that_changed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.go(Store(tmp_path), caplog)
        messages = self.go(Store(tmp_path), caplog, second=Second(3))
        assert messages == ["project: done and unchanged, skipped", "cluster: runs again, because factor 10 → 3"]

    def test_the_same_bytes_made_again_change_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.go(Store(tmp_path), caplog)
        manifest_path(tmp_path / "projections.pickle").unlink()
        messages = self.go(Store(tmp_path), caplog)
        assert messages == ["project: makes projections", "cluster: done and unchanged, skipped"]

    def test_a_parent_replaced_by_hand_is_made_again_or_given(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.go(Store(tmp_path), caplog)
        file = tmp_path / "projections.pickle"
        file.write_text("7")
        with pytest.raises(UserError, match="run that stage again, or give the file with projections=PATH"):
            run_stages(STAGES[1:], {"cluster": Second()}, Store(tmp_path), seed=0)
        run_stages(STAGES[1:], {"cluster": Second()}, Store(tmp_path, {"projections": file}), seed=0)
        assert Store(tmp_path).path("centroids").read_text() == "70"
        assert self.go(Store(tmp_path), caplog)[0] == "project: runs again, because projections was damaged or replaced"
        assert Store(tmp_path).path("centroids").read_text() == "10"

    def test_another_version_of_the_package_makes_it_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.go(Store(tmp_path), caplog)
        monkeypatch.setattr(pipeline, "versions", lambda: {"sparsefinder": "9"})
        assert "→ 9" in self.go(Store(tmp_path), caplog)[0]

    def test_what_is_given_is_not_made(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "mine").write_text("5")
        messages = self.go(Store(tmp_path / "run", {"projections": tmp_path / "mine"}), caplog)
        assert messages[0] == "project: skipped, projections is given by path"
        assert Store(tmp_path / "run").path("centroids").read_text() == "50"

    def test_a_space_and_what_was_learned_in_it_belong_together(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.go(Store(tmp_path), caplog)
        stages, settings = [Stage("score", __name__)], {"score": Third()}
        run_stages(stages, settings, Store(tmp_path), seed=0)
        run_stages(STAGES[:1], {"project": First(2)}, Store(tmp_path), seed=0)
        with pytest.raises(UserError, match="centroids was made from other projections: run stage=cluster"):
            run_stages(stages, settings, Store(tmp_path), seed=0)
        run_stages(stages, settings, Store(tmp_path, {"centroids": tmp_path / "centroids.pickle"}), seed=0)
        self.go(Store(tmp_path), caplog, First(2))
        run_stages(stages, settings, Store(tmp_path), seed=0)

    def test_what_was_made_together_is_given_together(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("5")
        store = Store(tmp_path / "run", {"lowrank": tmp_path / "mine"})
        finish(store, "key_centroids")
        for name, settings in (("score", Space()), ("route", First())):
            with pytest.raises(
                UserError, match=r"lowrank is given by path, but stage=route .*: give key_centroids=PATH"
            ):
                run_stages([Stage(name, __name__)], {name: settings}, store, seed=0)
        stages = [Stage("project", __name__), Stage("score", __name__)]
        with pytest.raises(UserError, match="give key_centroids=PATH"):
            run_stages(stages, {"project": First(), "score": Space()}, store, seed=0)
        assert store.find("projections") is None, "before any work"

    def test_a_missing_parent_names_its_stage(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="run stage=project first"):
            run_stages(STAGES[1:], {"cluster": Second()}, Store(tmp_path), seed=0)


def test_stages_are_run_in_their_order() -> None:
    assert [stage.name for stage in chosen_stages(["score", "extract"])] == ["extract", "score"]
    assert [stage.name for stage in chosen_stages("all")] == list(pipeline.STAGES)
    with pytest.raises(UserError, match="stage=scores is unknown; choose all or some of finetune, extract"):
        chosen_stages("scores")


def test_every_artefact_has_a_stage() -> None:
    made = [name for stage in pipeline.STAGES.values() for name in stage.makes]
    assert sorted(made) == sorted(ARTEFACTS)


def test_settings_are_plain_json() -> None:
    described = plain({"a": First(3), "b": (Path("x"), [1])})
    assert json.loads(json.dumps(described)) == {
        "a": {"type": f"{First.__module__}.First", "value": 3, "needs": []},
        "b": ["x", [1]],
    }


class TestHeldOut:
    """Queries and keys to learn from and to measure on are not the same, as texts are not."""

    @dataclass(frozen=True)
    class Reads:
        needs: tuple[str, ...]

    def run(self, store: Store, stage: str, *needs: str) -> None:
        pipeline.check_needs([pipeline.STAGES[stage]], {stage: self.Reads(needs)}, store)
        pipeline._check_kin(self.Reads(needs), store)

    def test_the_same_file_or_content_twice(self, tmp_path: Path) -> None:
        for name, text in (("a", "x"), ("copy", "x"), ("b", "y")):
            (tmp_path / name).write_text(text)
        for other in ("a", "copy"):
            store = Store(tmp_path / "run", {"qk": tmp_path / "a", "qk_validation": tmp_path / other})
            with pytest.raises(UserError, match=r"qk_validation=.* holds the same queries and keys as qk="):
                self.run(store, "project", "qk", "qk_validation")
        self.run(Store(tmp_path, {"qk": tmp_path / "a", "qk_validation": tmp_path / "b"}), "project", "qk")
        self.run(
            Store(tmp_path, {"qk": tmp_path / "a"}), "project", "qk", "qk_validation"
        )  # its last tenth is held out

    def test_scoring_what_was_learned_from(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("x")
        with (store := Store(tmp_path / "run")).writing("projections") as path:
            path.write_text("p")
        store.finish("projections", "project", {}, {"qk": content_hash(tmp_path / "a")}, 0)
        with pytest.raises(UserError, match="the queries and keys that projections was learned from"):
            self.run(Store(store.run_dir, {"qk_validation": tmp_path / "a"}), "score", "qk_validation", "projections")
        self.run(Store(store.run_dir, {"qk": tmp_path / "a"}), "score", "qk_validation", "projections")


def test_paths_may_be_text(tmp_path: Path) -> None:
    """Every public function that takes a path takes a string."""
    text = str(tmp_path / "run")
    store = Store(text, {"qk": str(GRAPH / "golden_enc-attn.pt")}, base=str(tmp_path / "base"))
    with store.held():
        finish(store, "projections")
    assert content_hash(f"{text}/projections.pickle") == store.content("projections")
    assert read_manifest(f"{text}/projections.pickle") == store.manifest("projections")
    assert sweep_points.read(text).state == ""
    assert sweep_points.not_done(text) == []
    samples.load_samples(str(GRAPH / "golden_enc-attn.pt")).part(0, 2).save(f"{text}/qk.pt")
    assert len(samples.load_samples(f"{text}/qk.pt")) == 2
    assert load_projections(str(GRAPH / "golden_projections.pickle")).layers
    centroids = load_centroids(str(GRAPH / "golden_centroids.pickle"))
    centroids.save(f"{text}/centroids.pickle")
    tables.write(pd.DataFrame({"a": [1]}), text, "table")
    with pytest.raises(UserError, match=r"holds no dials\.parquet"):
        calibrated((), text, "density=0.1")
