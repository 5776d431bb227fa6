"""One run of the command line: the stages that a composed configuration asks for, with their settings, in its run directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsefinder import pipeline, report
from sparsefinder.commandline.choices import objects
from sparsefinder.commandline.composition import build, path_of, plain
from sparsefinder.commandline.conf_folder import as_typed, refuse_unknown_keys
from sparsefinder.errors import UserError
from sparsefinder.storage import distributed
from sparsefinder.storage.store import Store
from sparsefinder.storage.sweep_points import Point

INPUTS = (
    *("qk", "qk_validation", "projections", "centroids", "online_centroids"),
    *("lowrank", "key_centroids", "bilinear_projections", "bilinear_centroids", "indexer", "calibration"),
)
SUMMED_UP = ("score", "evaluate", "report")  # stages after which the main numbers are printed
SEEDS = 2**32  # what numpy takes


def run(cfg: DictConfig, point: Point | None = None) -> None:
    """Run the stages of ``cfg``; a ``point`` of a sweep writes into a folder of its own and reads what it shares."""
    try:
        run_stages(cfg, point)
    except UserError as error:
        raise UserError(as_typed(str(error), cfg)) from error


def run_stages(cfg: DictConfig, point: Point | None) -> None:
    """As `run`; what is wrong is said in the words of the settings' classes."""
    distributed.start()
    refuse_unknown_keys(cfg)
    stages = pipeline.chosen_stages(stage_names(cfg))
    names = [stage.name for stage in stages]
    refuse_wrong_seeds(cfg, names)
    store = store_of(cfg, names, point)
    summed_up = not {*SUMMED_UP}.isdisjoint(names)
    # the settings of the report are also those of the summary
    configured = dict.fromkeys([*names, "report"] if summed_up else names)
    for name in configured:
        if not OmegaConf.is_dict(cfg[name]):
            raise UserError(f"{name}={cfg[name]}: a stage needs its settings; {name}.FIELD=VALUE sets one")
    settings = {name: build(cfg[name], **objects(cfg, name)) for name in configured}
    pipeline.run_stages(stages, settings, store, cfg.seed)
    if distributed.first() and summed_up:
        asked = None if "report" in names else {name: settings[name] for name in names if pipeline.STAGES[name].grows}
        print(report.summary(store, settings["report"], asked), flush=True)


def stage_names(cfg: DictConfig) -> str | list[str]:
    """The setting ``stage``: one name, or a list of names."""
    names = plain(cfg.stage)
    if isinstance(names, str) or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return names
    raise UserError(f"stage={names} is no stage: give one by its name, a list such as [score,report], or all")


def refuse_wrong_seeds(cfg: DictConfig, stages: Iterable[str]) -> None:
    """A seed is a whole number that every generator takes, numpy's included."""
    for key in ("seed", *(f"{stage}.seed" for stage in stages)):
        seed = OmegaConf.select(cfg, key, default=0)  # not every stage has one
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
            raise UserError(f"{key}={seed}: a seed must be a whole number from 0 to {SEEDS - 1}")


def store_of(cfg: DictConfig, stages: list[str], point: Point | None) -> Store:
    """The run directory, the artefacts named by path, and for a point of a sweep its own folder below."""
    run_dir = path_of(cfg, "run_dir")
    given: dict[str, str | Path] = {name: path_of(cfg, name) for name in INPUTS if cfg[name] is not None}
    folders: dict[str, Any] = {"run_dir": run_dir} if point is None else {"run_dir": point.folder, "base": run_dir}
    name = cfg.model.get("name_or_path")
    if name is not None and "finetune" not in stages:
        finetuned = Store(**folders).manifest("model")  # made from that very model, or it is another one
        if finetuned is None or not same_model(finetuned.settings.get("model", {}).get("name_or_path"), str(name)):
            given["model"] = Path(str(name)) if Path(str(name)).exists() else str(name)
    return Store(**folders, given=given, query_scale=plain(cfg.query_scale), which=str(cfg.which))


def same_model(one: Any, other: str) -> bool:
    """Whether two names of a model are the same: folder, ./folder and folder/ are."""
    return one is not None and Path(str(one)).absolute() == Path(other).absolute()
