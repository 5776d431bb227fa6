"""Run stages of the pipeline: Hydra in, `sparsefinder.pipeline` out. See ``--help``."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsefinder.commandline.commands import program, until_stopped
from sparsefinder.commandline.messages import one_line
from sparsefinder.commandline.overrides import HELP, Known, Typed, understood
from sparsefinder.errors import UserError, meant, one_of
from sparsefinder.experiment.instantiate import class_named, construct
from sparsefinder.storage import sweep_points
from sparsefinder.storage.store import Store
from sparsefinder.storage.sweep_points import Point

CONF = Path(__file__).resolve().parent.parent / "conf"
HYDRA: dict[str, Any] = {"version_base": "1.3", "config_path": str(CONF), "config_name": "config"}
FILES = {  # of each folder of conf, what can be chosen
    folder.name: [path.stem for path in sorted(folder.glob("*.yaml"))]
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
INPUTS = (
    *("qk", "qk_validation", "projections", "centroids", "online_centroids"),
    *("lowrank", "key_centroids", "bilinear_projections", "bilinear_centroids", "calibration"),
)
SUMMED_UP = ("score", "evaluate", "report")  # stages after which the main numbers are printed
SEEDS = 2**32  # what numpy takes
SPEAKS = os.environ.get("RANK", "0") == "0"  # of several processes, started by torchrun, the first one
PLUGINS = {  # what a launcher is installed with
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
EXPECTED = (UserError, InstantiationException, OmegaConfBaseException)

log = logging.getLogger("sparsefinder")


def main(argv: list[str]) -> int:
    """Check the command line, then let Hydra run one job, or many with ``-m``. Returns the exit status."""
    return until_stopped(lambda: outcome(argv), "what is done is kept, and the same command goes on" if SPEAKS else "")


def outcome(argv: list[str]) -> int:
    """As `main`, of a command line that nobody interrupts."""
    try:
        typed = understood(argv, Known(FILES, settings_with))
        if "--version" in typed.options:
            print(f"sparsefinder {importlib.metadata.version('sparsefinder')}")
            return 0
        todo = check(typed)
        named = [f"hydra.help.app_name='{program()}'"] if {*HELP} & {*typed.options} else []
        sys.argv = [sys.argv[0], *typed.options, *named, *typed.settings]  # Hydra takes no flag between two settings
        failures = run_sweep(todo) if todo and not typed.asks else run_once()
    except UserError as error:
        failures = [one_line(error)]
    # what is no file of conf/model was taken for a path or a name on the hub
    failures = [
        f + (meant(FILES["model"], name[1]) if (name := re.match(r"model=(\S+): ", f)) else "") for f in failures
    ]
    for failure in failures if SPEAKS else ():
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def command() -> None:
    """The console command ``sparsefinder``."""
    status = main(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # one in six of several processes that had trained together aborted in Python's own farewell, all work done: torch
        # takes threads apart there that still run
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run_once() -> list[str]:
    """One job. Returns what was wrong with it, in one line, or nothing."""
    failures: list[str] = []

    def job(cfg: DictConfig) -> None:
        try:
            run(cfg)
        except EXPECTED as error:
            failures.append(one_line(error))

    hydra.main(**HYDRA)(job)()
    return failures


def run_sweep(todo: Sequence[Point]) -> list[str]:
    """The points ``todo``, by the launcher of the configuration. Returns what did not end well, in lines."""
    for point in todo:
        point.forget()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors of a launcher come here, and not to the screen in pages
    broken: list[str] = []
    while True:
        settled = sweep_points.settled(todo)
        try:
            hydra.main(**HYDRA)(job_of(todo[0].swept))()
        except BrokenProcessPool:
            # joblib takes all its processes down with one that is killed: the points that they had not begun are run now
            sweep_points.bury(todo)
            if sweep_points.settled(todo) > settled:
                log.warning("a process was killed; going on with the points that were not running")
                continue
        except Exception as error:  # what a launcher raises is its own matter; what became of each point is on disk
            broken = [f"{one_line(error)[:200]}…" if len(one_line(error)) > 200 else one_line(error)]
        return [*broken, *sweep_points.report(todo)]


def job_of(swept: Sequence[str]) -> Callable[[DictConfig], None]:
    """What a launcher runs for each point, in whatever process: it never raises, the point's record says how it ended."""

    def job(cfg: DictConfig) -> None:
        point = sweep_points.point_of(path_of(cfg, "run_dir"), HydraConfig.get().overrides.task, swept)
        if point.fate.settled:  # in this sweep, before another point's process was killed
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


def run(cfg: DictConfig, point: Point | None = None) -> None:
    """Run the stages of ``cfg``; a ``point`` of a sweep writes into a folder of its own and reads what it shares."""
    try:
        run_stages(cfg, point)
    except UserError as error:
        raise UserError(as_typed(str(error), cfg)) from error


def run_stages(cfg: DictConfig, point: Point | None) -> None:
    """As `run`; what is wrong is said in the words of the settings' classes."""
    from sparsefinder import pipeline, report
    from sparsefinder.storage import distributed

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


def objects(cfg: DictConfig, stage: str) -> dict[str, Any]:
    """Settings of a stage that come from folders of conf: patterns, attentions and conversions."""
    if stage == "calibrate":
        return {"dialled": tuple(dialled(cfg)) if cfg.target else ()}
    if stage == "score":
        return {"configurations": tuple(all_configurations(cfg, sweep=True))}
    if stage == "evaluate":
        return {
            "configurations": tuple(all_configurations(cfg, sweep=False)),
            "attentions": tuple(attentions(cfg)),
            "conversions": tuple(conversions(cfg)),
        }
    return {}


def store_of(cfg: DictConfig, stages: list[str], point: Point | None) -> Store:
    """The run directory, the artefacts named by path, and for a point of a sweep its own folder below."""
    run_dir = path_of(cfg, "run_dir")
    given: dict[str, str | Path] = {name: path_of(cfg, name) for name in INPUTS if cfg[name] is not None}
    where: dict[str, Any] = {"run_dir": run_dir} if point is None else {"run_dir": point.folder, "base": run_dir}
    name = cfg.model.get("name_or_path")
    if name is not None and "finetune" not in stages:
        finetuned = Store(**where).manifest("model")  # made from that very model, or it is another one
        if finetuned is None or not same_place(finetuned.settings.get("model", {}).get("name_or_path"), str(name)):
            given["model"] = Path(str(name)) if Path(str(name)).exists() else str(name)
    return Store(**where, given=given, query_scale=plain(cfg.query_scale))


def same_place(one: Any, other: str) -> bool:
    """Whether two names of a model are the same: folder, ./folder and folder/ are."""
    return one is not None and Path(str(one)).absolute() == Path(other).absolute()


def path_of(cfg: DictConfig, key: str) -> Path:
    """A path of the configuration. A number is a name like any other: ``run_dir=2024`` is the folder 2024."""
    value = cfg[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        needed = "a folder is needed, in which everything of the run will lie"
        raise UserError(
            f"{key}={value}: {needed if key == 'run_dir' else 'the path of an artefact is needed, or null'}"
        )
    return Path(str(value))


# ---- patterns, attentions and conversions: a file of their folder in conf, or all of them ----


def all_configurations(cfg: DictConfig, sweep: bool) -> Iterable[Any]:
    """The chosen pattern with its surroundings; with ``pattern=all`` every one, its sparsity parameter swept where ``sweep``."""
    for name, settings, values, around in patterns(cfg):
        pattern, dials = pattern_of(settings)
        turned = values if sweep and cfg.pattern.get("every") else []
        for changed in [build(settings, **{pattern.sparsity_parameter: value}) for value in turned] or [pattern]:
            yield from united(name, changed, around, dials)


def dialled(cfg: DictConfig) -> Iterable[Any]:
    """The patterns of `all_configurations` that have a sparsity parameter, with the values of their sweep."""
    from sparsefinder.calibrate import Dialled

    for name, settings, values, around in patterns(cfg):
        pattern, dials = pattern_of(settings)
        if dials is not None:
            raise UserError(
                f"pattern.{pattern.sparsity_parameter} has a value for each head, and target={cfg.target} "
                "chooses them: leave out one of them"
            )
        if getattr(pattern, "sparsity_parameter", None) is not None and values:
            yield from (Dialled(configuration, tuple(values)) for configuration in united(name, pattern, around))


def pattern_of(settings: DictConfig) -> tuple[Any, Any]:
    """The pattern that settings describe, and its sparsity parameter's values where they are a list with one for each head."""
    from sparsefinder.experiment.configuration import Dials

    parameter = getattr(class_named(settings.get("_target_"), "pattern"), "sparsity_parameter", None)
    if parameter is None or not OmegaConf.is_list(settings.get(parameter)):
        return build(settings), None
    pattern = build(without(settings, parameter))
    return pattern, Dials.given(pattern, plain(settings[parameter]))


def united(name: str, pattern: Any, around: list[dict[str, Any]], dials: Any = None) -> Iterable[Any]:
    """A pattern with its surroundings: a learned one with each of them, any other with the first."""
    from sparsefinder.experiment.configuration import Configuration

    if not hasattr(pattern, "needs"):  # a file of another group, by a path such as ../model/tiny
        raise UserError(f"pattern={name} is no pattern but {type(pattern).__name__}; name one file of conf/pattern")
    for surrounding in around if pattern.needs else around[:1]:
        yield construct(Configuration, {"name": name, "pattern": pattern, "dials": dials} | surrounding)


def patterns(cfg: DictConfig) -> Iterable[tuple[str, DictConfig, list[Any], list[dict[str, Any]]]]:
    """The chosen pattern, or every one with ``pattern=all``: its name, settings, sweep and surroundings."""
    around = [{name: plain(cfg[name]) for name in ("window", "global_tokens", "last_token", "block_size")}]
    if cfg.pattern.get("every"):
        around += [around[0] | more for more in plain(cfg.pattern.also_with) if around[0] | more not in around]
        nodes = list(files(cfg, "pattern"))
        if cfg.patterns is not None:
            if not isinstance(cfg.patterns, ListConfig):
                raise UserError(f"patterns is a list such as [kmeans,window], or null for all, got {cfg.patterns}")
            if unknown := [name for name in cfg.patterns if name not in dict(nodes)]:
                raise UserError(f"patterns={unknown} are unknown; {one_of(dict(nodes), unknown[0], 'choose some of')}")
            nodes = [(name, node) for name, node in nodes if name in cfg.patterns]
    else:
        nodes = [(chosen("pattern"), cfg.pattern)]
    for name, node in nodes:
        sweep = plain(node.get("sweep", []))
        if not isinstance(sweep, list):
            raise UserError(f"pattern.sweep={sweep}: the values of a sweep are a list, such as [1,2,4]")
        yield name, without(node, "sweep"), sweep, around


def attentions(cfg: DictConfig) -> Iterable[Any]:
    """The chosen attention, or every one with ``attention=all``."""
    from sparsefinder.evaluation.variants import AttentionChoice

    nodes = files(cfg, "attention") if cfg.attention.get("every") else [(chosen("attention"), cfg.attention)]
    for name, node in nodes:
        options = {key: value for key, value in plain(node).items() if key != "_target_"}
        yield AttentionChoice(name, class_named(node.get("_target_"), "attention"), options)


def conversions(cfg: DictConfig) -> Iterable[Any]:
    """The chosen conversion, none of them, or every one with ``conversion=all``."""
    from sparsefinder.evaluation.variants import Conversion

    if cfg.conversion.get("none"):
        return
    nodes = files(cfg, "conversion") if cfg.conversion.get("every") else [(chosen("conversion"), cfg.conversion)]
    for name, node in nodes:
        yield Conversion(name, build(node))


def files(cfg: DictConfig, group: str) -> Iterable[tuple[str, DictConfig]]:
    """Every file of a folder of conf, resolved against the rest of the configuration."""
    for path in sorted((CONF / group).glob("*.yaml")):
        node = OmegaConf.load(path)
        if not node.get("every") and not node.get("none"):
            whole = OmegaConf.merge(without(cfg, group), {group: node})
            yield path.stem, whole[group]


def chosen(group: str) -> str:
    """The file that was chosen in a folder of conf."""
    return str(HydraConfig.get().runtime.choices[group])


def without(node: Any, key: str) -> Any:
    """A copy of a configuration without one of its keys, its interpolations intact."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    copy.pop(key, None)
    return copy


# ---- from configuration to objects ----


def build(node: DictConfig, **extra: Any) -> Any:
    """The object that ``_target_`` names, from the inside out; fields are checked against their declared types first."""
    place = node._get_full_key(None)  # corpus, wherever it is interpolated: what the command line calls it
    values = {str(key): built(node[key]) for key in node if key != "_target_"}
    return construct(class_named(node.get("_target_"), place), {**values, **extra}, place)


def built(value: Any) -> Any:
    """What stands in a field of a configuration, with objects for all that has a ``_target_``."""
    if OmegaConf.is_dict(value):
        return build(value) if "_target_" in value else {key: built(value[key]) for key in value}
    return [built(each) for each in value] if OmegaConf.is_list(value) else value


def plain(node: Any) -> Any:
    """Lists, dictionaries and scalars, resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


# ---- the command line itself ----


def settings_with(chosen: Sequence[str] = ()) -> list[str]:
    """The full names of all settings, with the files of conf that are ``chosen`` (``group=name``)."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return list(keys(OmegaConf.to_container(hydra.compose("config", overrides=list(chosen)))))
    except (HydraException, OmegaConfBaseException):  # what was chosen is unknown itself
        return settings_with() if chosen else []


def keys(node: Any, place: str = "") -> Iterable[str]:
    """The full name of every setting, at any depth."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key != "_target_":
            yield f"{place}{key}"
            yield from keys(value, f"{place}{key}.")


def check(typed: Typed) -> list[Point]:
    """Compose every job of the command line once, so that a mistake is one line and not a page of Hydra's.

    Returns the points of a sweep, none without ``-m``.
    """
    use_own_launchers()
    overrides = [override_of(text) for text in typed.settings]
    check_launcher(overrides, typed.sweeps)
    alternatives = [expanded(override) for override in overrides] if typed.sweeps else [[s] for s in typed.settings]
    swept = [choices[0].partition("=")[0] for choices in alternatives if len(choices) > 1]
    todo = []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for chosen in itertools.product(*alternatives):
                cfg = hydra.compose("config", overrides=list(chosen))  # a list of values is Hydra's to refuse
                refuse_unknown_keys(cfg)
                if typed.sweeps:
                    todo.append(sweep_points.point_of(path_of(cfg, "run_dir"), chosen, swept))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises the last for corpus=null
        message = one_line(error)
        if unknown := re.match(r"there is no setting ([^;]*);", message):
            files = [text for text in typed.settings if text.partition("=")[0] in FILES and "," not in text]
            message += meant(settings_with(files), unknown[1])
        elif group := re.match(r"(\w+)=(\S+) is unknown;", message):
            message += meant(FILES.get(group[1], ()), group[2])
        raise UserError(message) from error
    if any(not point.settings for point in todo) and not typed.asks:
        raise UserError(
            "-m starts a run for each value of a setting, and none is given: write -m pattern=kmeans,distance, or leave out -m"
        )
    return todo


def override_of(text: str) -> Override:
    """One setting, read by Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        raise UserError(f"{key}={value} cannot be read: put the value in quotes, {key}=\"'…'\"") from error


def expanded(override: Override) -> list[str]:
    """``pattern=kmeans,distance`` → one override for each value, spelled as Hydra's sweeper does."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if key in ("stage", "hydra/launcher"):
        raise UserError(
            f"{override.input_line}: nothing to sweep over; several stages are a list, stage=[score,evaluate]"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def use_own_launchers() -> None:
    """Forget the defaults of the launchers' plugins: those of conf/hydra/launcher stand in their place."""
    Plugins.instance()  # looks for plugins, which enter their defaults
    known = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in PLUGINS:
        known.pop(f"{name}.yaml", None)


def check_launcher(overrides: Sequence[Override], sweeping: bool) -> None:
    """A launcher is an option of a sweep, and joblib's and submitit's are installed apart."""
    for override in overrides:
        if override.get_key_element().startswith("hydra/launcher"):
            name = str(override.value())
            if not sweeping:
                raise UserError(f"hydra/launcher={name} is for sweeps: add -m")
            try:
                importlib.metadata.distribution(PLUGINS.get(name, "hydra-core"))
            except importlib.metadata.PackageNotFoundError as error:
                raise UserError(
                    f"hydra/launcher={name} is not installed: pip install 'sparsefinder[launchers]'"
                ) from error


def as_typed(message: str, cfg: DictConfig) -> str:
    """With the names that the user types: ``target`` for ``calibrate.target``, which takes its value from there."""
    groups = {
        group: [OmegaConf.load(path) for path in (CONF / group).glob("*.yaml")] for group in ("pattern", "attention")
    }
    borrowed = {key: name for group, nodes in groups.items() for node in nodes for key, name in sources(node, group)}
    borrowed = {key: name for key, name in borrowed.items() if OmegaConf.select(cfg, key) is None} | dict(sources(cfg))
    for key, name in borrowed.items():
        message = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", name, message)
    return message


def sources(node: DictConfig, place: str = "") -> Iterable[tuple[str, str]]:
    """The settings that are interpolated, each with the one that it takes its value from."""
    for key, value in OmegaConf.to_container(node, resolve=False).items():
        where = f"{place}.{key}" if place else str(key)
        if isinstance(value, dict):
            yield from sources(OmegaConf.create(value), where)
        elif isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            yield where, found[1]


def refuse_unknown_keys(cfg: DictConfig) -> None:
    """``+key=value`` adds a key that nobody reads: an error, never a default."""
    known = {*OmegaConf.load(CONF / "config.yaml"), *(folder.name for folder in CONF.iterdir() if folder.is_dir())}
    unknown = [str(key) for key in cfg if key not in known]
    if unknown:
        raise UserError(
            f"there is no setting {', '.join(unknown)}; `--cfg job` shows all of them{meant(known, unknown[0])}"
        )


if __name__ == "__main__":
    command()
