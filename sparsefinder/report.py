"""The stage ``report``: figures and one self-contained page from the tables of ``score`` and ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from sparsefinder.store import Store, UserError


@dataclass(frozen=True)
class ReportSettings:
    """Settings of the stage ``report``."""

    title: str | None = None  # of the page; None: the name of the run directory
    levels: tuple[float, ...] = (0.1, 0.2, 0.3)  # shares of the allowed pairs at which recall is compared
    dpi: int = 200  # of the figures as PNG

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise UserError(f"report.levels must be shares of pairs between 0 and 1, got {list(self.levels)}")
        if self.dpi < 1:
            raise UserError(f"report.dpi must be 1 or more dots an inch, got {self.dpi}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing for certain: it reads whichever of score and evaluate are finished."""
        return ()


def run(settings: ReportSettings, store: Store) -> None:
    """Make ``report``: a page with the tables that are there."""
    found = {name: store.find(name) for name in ("score", "evaluate")}
    tables = [("score", "metrics"), ("evaluate", "results")]
    frames = [pd.read_parquet(path / f"{file}.parquet") for name, file in tables if (path := found[name]) is not None]
    if not frames:
        raise UserError(f"nothing to report in {store.run_dir}: run stage=score or stage=evaluate first")
    with store.writing("report") as folder:
        folder.mkdir()
        (folder / "index.html").write_text("\n".join(frame.to_html(index=False) for frame in frames), encoding="utf-8")


def summary(store: Store, settings: ReportSettings | None = None) -> str:
    """The main numbers as plain text, for the end of a run."""
    path = store.path("score")
    metrics = pd.read_parquet(path / "metrics.parquet")
    means: str = metrics.groupby(["configuration", "pattern"])[["sparsity", "recall"]].mean().to_string()
    return means
