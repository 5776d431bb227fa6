"""What there is to report: the tables and manifests of a run, or of several, read and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sparsefinder.analysis import frontiers, seeds
from sparsefinder.analysis.bootstrap import Replicas
from sparsefinder.analysis.iso_quality import alarms
from sparsefinder.errors import UserError
from sparsefinder.reporting import text_tables
from sparsefinder.storage import tables
from sparsefinder.storage.manifests import Manifest
from sparsefinder.storage.store import Store


@dataclass(frozen=True)
class Results:
    """What there is to report; None where a stage was not run."""

    metrics: pd.DataFrame | None
    points: pd.DataFrame | None  # see `frontiers.points`
    variants: pd.DataFrame | None  # evaluate/results
    manifests: Mapping[str, Manifest]
    replicas: Replicas | None = None  # of the points
    budget: pd.DataFrame | None = None  # score/error_budget
    dials: pd.DataFrame | None = None  # calibration/dials
    exported: Path | None = None  # the folder sparse_model
    compared: pd.DataFrame | None = None  # compare/results
    equal_quality: pd.DataFrame | None = None  # compare/equal_quality
    by_run: tuple[pd.DataFrame, ...] = ()  # the points of each run, where several are averaged

    @classmethod
    def of_runs(cls, runs: Sequence[str], store: Store) -> Results:
        """Those of several runs and the points of their sweeps, seeds averaged; a `UserError` where there are none."""
        found = {}
        for table in ("score/metrics", "evaluate/results"):
            try:
                found[table] = tables.collect_runs(runs, table)
            except UserError as error:
                found[table] = pd.DataFrame()
                missing = error
        metrics, variants = found.values()
        if metrics.empty and variants.empty:
            raise missing
        points = None if metrics.empty else frontiers.points(metrics)
        each = [] if points is None else [group for _, group in points.groupby(points["run"], sort=False)]
        return cls(
            None if metrics.empty else metrics,
            None if points is None else seeds.over_runs(points),
            None if variants.empty else frontiers.described(seeds.variants_over_runs(variants)),
            text_tables.read_manifests(store),
            by_run=tuple(each) if len(each) > 1 else (),
        )

    @classmethod
    def read(cls, store: Store) -> Results:
        """Read the finished tables of one run; a `UserError` where there is none."""
        score, evaluate, compare = (store.find(name) for name in ("score", "evaluate", "compare"))
        if score is None and evaluate is None and compare is None:
            raise UserError(
                f"nothing to report in {store.run_dir}: run stage=score, stage=evaluate or stage=compare first"
            )
        for name, found in (("score", score), ("evaluate", evaluate), ("compare", compare)):
            if found is not None:
                store.content(name)  # no number from tables that are not those that were written
        metrics = None if score is None else pd.read_parquet(score / "metrics.parquet")
        variants = None if evaluate is None else pd.read_parquet(evaluate / "results.parquet")
        points = None if metrics is None else frontiers.points(metrics)
        counts = None if score is None else _table(score / "counts.parquet")
        calibration = store.find("calibration")
        return cls(
            metrics,
            points,
            None if variants is None else frontiers.described(variants),
            text_tables.read_manifests(store),
            None if points is None or counts is None else Replicas.of(points, counts),
            None if score is None else _table(score / "error_budget.parquet"),
            None if calibration is None else _table(calibration / "dials.parquet"),
            store.find("sparse_model"),
            None if compare is None else _table(compare / "results.parquet"),
            None if compare is None else _table(compare / "equal_quality.parquet"),
        )

    def only(self, rows: Mapping[str, Sequence[Any]]) -> Results:
        """What these rows of ``score`` and ``evaluate`` say; a stage without any is left out."""
        metrics, points, variants, replicas = self.metrics, self.points, self.variants, self.replicas
        if metrics is not None and points is not None:
            mine = points["configuration"].isin(rows.get("score", ()))
            replicas = None if replicas is None else replicas.of_points([int(p) for p in mine.to_numpy().nonzero()[0]])
            points = points[mine].reset_index(drop=True)
            metrics = metrics[metrics["configuration"].isin(rows.get("score", ()))]
            if points.empty:
                metrics = points = replicas = None
        if variants is not None:  # dense attention is there to compare with
            mine = variants["variant"].isin(rows.get("evaluate", ()))
            variants = variants[mine | (variants["attention"] == "dense")] if mine.any() else None
        return replace(self, metrics=metrics, points=points, replicas=replicas, variants=variants)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the run noted about itself."""
        return text_tables.fact_lines(self.manifests)

    @property
    def warnings(self) -> list[str]:
        """What to look at twice."""
        compared = [] if self.compared is None else alarms(self.compared)
        return text_tables.warnings(self.points, self.variants, self.manifests) + compared

    @property
    def true_scores(self) -> set[str]:
        """Patterns whose prediction is the true scores under another name, such as ``lowrank`` at the rank of the head size."""
        return set() if self.points is None else set(self.points.loc[self.points["true_scores"], "pattern"])

    @property
    def by_cost(self) -> tuple[pd.DataFrame, Replicas | None] | None:
        """The points and their replicas with the total cost in the place of the density; None where no cost is known."""
        if self.points is None or self.points["total_cost"].isna().all():
            return None
        shares = self.points["prediction_share"].to_numpy(float)
        return frontiers.by_cost(self.points), None if self.replicas is None else self.replicas.by_cost(shares)

    @property
    def by_run_by_cost(self) -> list[pd.DataFrame]:
        """The points of each run as in `by_cost`."""
        return [frontiers.by_cost(points) for points in self.by_run]

    def densities(self, levels: Sequence[float]) -> list[float]:
        """The levels of the settings, and that of the gold graph where it is not almost one of them."""
        gold = [] if self.points is None else text_tables.gold_density(self.points)
        new = [density for density in gold if all(abs(density - level) > 0.05 * level for level in levels)]
        return sorted({*levels, *new})


def _table(path: Path) -> pd.DataFrame | None:
    return pd.read_parquet(path) if path.is_file() else None
