"""Running the points of a sweep (``-m``), by whatever launcher: one that fails, or is killed, does not take the others along.

Hydra's callbacks know when a job begins and ends, but not when its process is killed, and they could not keep its error from
ending the sweep. So each point is run by `job_of`, which raises nothing and writes what came of it into the point's folder
(`sparsefinder.storage.sweep_points`).
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sparsefinder.commandline.composition import path_of
from sparsefinder.commandline.conf_folder import HYDRA
from sparsefinder.commandline.messages import EXPECTED, one_line
from sparsefinder.storage import sweep_points
from sparsefinder.storage.sweep_points import Point

log = logging.getLogger("sparsefinder")


def run_sweep(todo: Sequence[Point]) -> list[str]:
    """The points ``todo``, by the launcher of the configuration. Returns what did not end well, in lines."""
    for point in todo:
        point.forget()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors of a launcher come here, and not to the screen in pages
    broken: list[str] = []
    while True:
        finished = sweep_points.count_finished(todo)
        try:
            hydra.main(**HYDRA)(job_of(todo[0].swept))()
        except BrokenProcessPool:
            # joblib takes all its processes down with one that is killed: the points that they had not begun are run now
            sweep_points.mark_failed(todo)
            if sweep_points.count_finished(todo) > finished:
                log.warning("a process was killed; going on with the points that were not running")
                continue
        except Exception as error:  # what a launcher raises is its own matter; what became of each point is on disk
            broken = [f"{one_line(error)[:200]}…" if len(one_line(error)) > 200 else one_line(error)]
        return [*broken, *sweep_points.report(todo)]


def job_of(swept: Sequence[str]) -> Callable[[DictConfig], None]:
    """What a launcher runs for each point, in whatever process: it never raises, the point's record says how it ended."""

    def job(cfg: DictConfig) -> None:
        from sparsefinder.commandline.job import (
            run,
        )  # with torch, which the process that hands the points out can do without

        point = sweep_points.point_of(path_of(cfg, "run_dir"), HydraConfig.get().overrides.task, swept)
        if point.status.finished:  # in this sweep, before another point's process was killed
            return
        trace = ""
        try:
            point.note(sweep_points.STARTED)
            log.info("%s → %s", point.name, point.folder)
            run(cfg, point)
            point.note(sweep_points.DONE)
            return
        except EXPECTED as error:
            message = one_line(error)
        except Exception as error:  # the others go on
            message, trace = f"{type(error).__name__}: {one_line(error)}", traceback.format_exc()
        log.error("%s failed: %s", point.name, message)
        point.note(sweep_points.FAILED, message, trace)

    return job
