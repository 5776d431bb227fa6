"""Tables that grow: nothing that was measured is lost while what it was made from is the same."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from small_runs import make_learned

from sparsefinder import pipeline, report
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.window import Window
from sparsefinder.predictors.centroids import Centroids, load_centroids
from sparsefinder.score import ScoreSettings
from sparsefinder.storage import growing_table
from sparsefinder.storage.store import Store

WINDOWS = tuple(Configuration("window", Window(width)) for width in (1, 3, 7))
LEARNED = (Configuration("kmeans", KMeans(1)), Configuration("kmeans", KMeans(2)))
CHANCE = Configuration("random", Distance("random", 0.2))


def score(store: Store, *configurations: Configuration, **changes: object) -> pd.DataFrame:
    settings = ScoreSettings(configurations, **{"map_tokens": 24, **changes})  # type: ignore[arg-type]
    pipeline.run_stages([pipeline.STAGES["score"]], {"score": settings}, store, 0)
    return pd.read_parquet(store.path("score") / "metrics.parquet")


def without_numbers(table: pd.DataFrame) -> pd.DataFrame:
    keys = ["pattern", "width", "top_clusters", "layer", "head"]
    columns = [name for name in table if name != "configuration" and table[name].notna().any()]
    return table[columns].sort_values([key for key in keys if key in columns]).reset_index(drop=True)


def test_adding_is_as_good_as_measuring_all_at_once(tmp_path: Path) -> None:
    """Tables, counts and what is computed from them; the order of the commands is not seen but in the numbering."""
    apart, at_once = make_learned(tmp_path / "apart"), make_learned(tmp_path / "once")
    score(apart, *LEARNED)
    score(apart, WINDOWS[0])
    grown = score(apart, *WINDOWS[1:], LEARNED[0])
    whole = score(at_once, *LEARNED, *WINDOWS)
    pd.testing.assert_frame_equal(grown, whole, check_dtype=False)
    for name in ("counts", "shared_buckets", "error_budget"):
        tables = [pd.read_parquet(s.path("score") / f"{name}.parquet") for s in (apart, at_once)]
        pd.testing.assert_frame_equal(*tables, check_dtype=False)
    manifest, other = apart.manifest("score"), at_once.manifest("score")
    assert manifest is not None
    assert other is not None
    assert manifest.parents == other.parents
    assert sorted(map(str, manifest.settings["configurations"])) == sorted(map(str, other.settings["configurations"]))


def test_what_is_measured_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = make_learned(tmp_path / "run")
    score(store, *LEARNED, *WINDOWS)
    score(store, WINDOWS[1])
    score(store, *LEARNED)
    assert caplog.text.count("score: done and unchanged, skipped") == 2
    caplog.clear()
    score(store, WINDOWS[1], Configuration("window", Window(9)))
    assert (
        "score: 1 measured and added to 5 in score that stay; 1 of those asked for are measured already" in caplog.text
    )


def test_rows_go_with_their_parents_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other centroids: what was measured with the old ones goes, and the log says so; windows never saw them."""
    caplog.set_level(logging.INFO)
    store = make_learned(tmp_path / "run")
    score(store, *LEARNED, *WINDOWS)
    other = Store(store.run_dir, {"centroids": _others(store, tmp_path / "others")})
    table = score(other, LEARNED[0])
    assert "1 measured and added to 3 in score that stay; 2 that were measured with others go" in caplog.text
    assert dict(table.groupby("pattern").configuration.nunique()) == {"kmeans": 1, "window": 3}


def _others(store: Store, path: Path) -> Path:
    found = load_centroids(store.path("centroids"))
    Centroids([layer.flip(-1) for layer in found.layers]).save(path)
    return path


@pytest.mark.parametrize("changes", [{"alpha": 2.0}, {"causal": True}, {"samples": 2}])
def test_other_shared_settings_replace_the_table(
    changes: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = make_learned(tmp_path / "run", learn=False)
    score(store, *WINDOWS)
    table = score(store, WINDOWS[0], **changes)
    assert table.configuration.nunique() == 1
    assert f"runs again, because {next(iter(changes))}" in caplog.text.replace(
        "configurations 3 entries → 1 entries; ", ""
    )


def test_more_seeds_take_the_place_of_one(tmp_path: Path) -> None:
    store = make_learned(tmp_path / "run", learn=False)
    score(store, *WINDOWS, CHANCE)
    table = score(store, CHANCE, seeds=3)
    chance = table[table.pattern == "random"]
    assert sorted(chance.seed.unique()) == [0, 1, 2]
    assert chance.configuration.nunique() == 3
    assert table.configuration.nunique() == 6


def test_maps_of_what_stays_are_kept(tmp_path: Path) -> None:
    store = make_learned(tmp_path / "run")
    score(store, *LEARNED, CHANCE)
    before = load_file(store.path("score") / "maps.safetensors")
    score(store, WINDOWS[2])
    after = load_file(store.path("score") / "maps.safetensors")
    assert "predicted_3" in after
    for name in set(before) & set(after):
        assert before[name].equal(after[name])
    assert len(set(before) & set(after)) > 1


def test_a_table_of_an_earlier_version_is_done_where_nothing_changed(tmp_path: Path) -> None:
    store = make_learned(tmp_path / "run", learn=False)
    score(store, *WINDOWS)
    (store.path("score") / growing_table.RECORD).unlink()
    manifest = store.manifest("score")
    assert manifest is not None
    store.finish("score", "score", manifest.settings, manifest.parents, 0)
    made = store.path("score").stat().st_mtime_ns
    score(store, *WINDOWS)
    assert store.path("score").stat().st_mtime_ns == made
    assert score(store, WINDOWS[0]).configuration.nunique() == 1


def test_a_run_prints_what_was_asked(tmp_path: Path) -> None:
    """Density and recall of the one configuration, in a table of many; all of them where a frontier was asked for."""
    store = make_learned(tmp_path / "run")
    table = score(store, *LEARNED, *WINDOWS)
    one = report.summary(store, None, {"score": ScoreSettings((LEARNED[1],), map_tokens=24)})
    mine = table[table.top_clusters == 2]
    assert "kmeans top_clusters=2" in one
    assert f"{1 - mine.sparsity.mean():.3f}" in one
    assert f"{mine.recall.mean():.3f}" in one
    assert "not reached" not in one
    assert "window" not in one
    several = report.summary(store, None, {"score": ScoreSettings(WINDOWS, map_tokens=24)})
    assert "Recall of gold edges at equal density" in several
    assert "kmeans" not in several
    assert "kmeans" in report.summary(store)


def test_the_log_says_what_is_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A report that was drawn from the table before: nobody reads it without being told."""
    caplog.set_level(logging.INFO)
    store = make_learned(tmp_path / "run", learn=False)
    score(store, *WINDOWS)
    with store.writing("report") as folder:
        folder.mkdir()
    store.finish("report", "report", {}, {"score": store.content("score")}, 0)
    score(store, WINDOWS[0])
    assert "of before" not in caplog.text
    score(store, CHANCE)
    assert "report is still of before: stage=report makes it anew" in caplog.text
