"""Run stages of the pipeline: Hydra in, `sparsefinder.pipeline` out. See ``--help``."""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsefinder.store import Store, UserError, read_manifest

CONF = Path(__file__).resolve().parent.parent / "conf"
MULTIRUN = ("-m", "--multirun")
INPUTS = (
    *("qk", "qk_validation", "projections", "centroids"),
    *("lowrank", "key_centroids", "bilinear_projections", "bilinear_centroids"),
)

log = logging.getLogger("sparsefinder")
swept: list[str] = []  # the settings that a sweep varies, for its messages
failures: list[str] = []  # points of a sweep that failed; the others went on


def main(argv: list[str]) -> int:
    """Check the command line, then let Hydra run one job, or many with ``-m``. Returns the exit status."""
    argv = [translated for argument in argv for translated in path_of_model(argument)]
    argv.sort(key=lambda argument: argument not in MULTIRUN)  # Hydra takes no flag between two settings
    try:
        check(argv)
    except UserError as error:
        return complain(error)
    sys.argv = [sys.argv[0], *argv]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def job(cfg: DictConfig) -> None:
    """One configuration: build the settings of its stages, run them, say where the results are."""
    is_point = HydraConfig.get().mode == RunMode.MULTIRUN
    overrides = sorted(o for o in HydraConfig.get().overrides.task if not o.startswith(("stage=", "run_dir=")))
    try:
        run(cfg, overrides if is_point else None)
    except (UserError, InstantiationException, OmegaConfBaseException) as error:
        failures.append((f"{point_name(overrides)}: " if is_point else "") + one_line(error))


def run(cfg: DictConfig, point: list[str] | None) -> None:
    """Run the stages of ``cfg``; a ``point`` of a sweep writes into a folder of its own and reads what it shares."""
    from sparsefinder import pipeline, report  # here, so that --help does not wait for torch

    refuse_unknown_keys(cfg)
    stages = pipeline.chosen_stages(plain(cfg.stage))
    store = store_of(cfg, [stage.name for stage in stages], point)
    configurations = tuple(all_configurations(cfg, sweep=True)) if any(s.name == "score" for s in stages) else ()
    settings = {}
    for stage in stages:
        extra: dict[str, Any] = {}
        if stage.name == "score":
            extra = {"configurations": configurations}
        elif stage.name == "evaluate":
            extra = {
                "configurations": tuple(all_configurations(cfg, sweep=False)),
                "attentions": tuple(attentions(cfg)),
                "conversions": tuple(conversions(cfg)),
            }
        settings[stage.name] = build(cfg[stage.name], **extra)
    if point is not None:
        log.info("%s → %s", point_name(point), store.run_dir)
    pipeline.run_stages(stages, settings, store, cfg.seed)
    if any(stage.name in ("score", "evaluate", "report") for stage in stages):
        print(report.summary(store), flush=True)


def store_of(cfg: DictConfig, stages: list[str], point: list[str] | None) -> Store:
    """The run directory, the artefacts named by path, and for a point of a sweep its own folder below."""
    run_dir = Path(cfg.run_dir)
    given = {name: Path(cfg[name]) for name in INPUTS if cfg[name] is not None}
    name = cfg.model.get("name_or_path")
    if name is not None and "finetune" not in stages:
        finetuned = read_manifest(run_dir / "model")
        if finetuned is None or finetuned.settings.get("model", {}).get("name_or_path") != name:
            given["model"] = Path(name) if Path(name).exists() else name
    if point is None:
        return Store(run_dir, given)
    digest = hashlib.sha256("\n".join(point).encode()).hexdigest()[:10]
    return Store(run_dir / "sweep" / digest, given, base=run_dir)


def point_name(overrides: list[str]) -> str:
    """The settings by which the points of a sweep differ."""
    return " ".join(o for o in overrides if not swept or o.partition("=")[0] in swept)


# ---- patterns, attentions and conversions: a file of their folder in conf, or all of them ----


def all_configurations(cfg: DictConfig, sweep: bool) -> Iterable[Any]:
    """The chosen pattern with its surroundings; with ``pattern=all`` every one, its dial swept where ``sweep``."""
    from sparsefinder.patterns.configuration import Configuration

    around = [{name: plain(cfg[name]) for name in ("window", "global_tokens", "last_token", "block_size")}]
    if not cfg.pattern.get("every"):
        pattern = without(cfg.pattern, "sweep")
        yield construct(Configuration, {"name": chosen("pattern"), "pattern": build(pattern)} | around[0])
        return
    around += [more for more in plain(cfg.pattern.also_with) if around[0] | more not in around]
    for name, node in files(cfg, "pattern"):
        settings = without(node, "sweep")
        pattern = build(settings)
        values = plain(node.get("sweep", [])) if sweep else []
        for changed in [build(settings, **{pattern.dial: value}) for value in values] or [pattern]:
            for surrounding in around if pattern.needs else around[:1]:
                yield construct(Configuration, {"name": name, "pattern": changed} | around[0] | surrounding)


def attentions(cfg: DictConfig) -> Iterable[Any]:
    """The chosen attention, or every one with ``attention=all``."""
    from sparsefinder.variants import AttentionChoice

    nodes = files(cfg, "attention") if cfg.attention.get("every") else [(chosen("attention"), cfg.attention)]
    for name, node in nodes:
        options = {key: value for key, value in plain(node).items() if key != "_target_"}
        yield AttentionChoice(name, hydra.utils.get_class(node._target_), options)


def conversions(cfg: DictConfig) -> Iterable[Any]:
    """The chosen conversion, none of them, or every one with ``conversion=all``."""
    from sparsefinder.variants import Conversion

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
    """The object that ``_target_`` names, its plain fields checked against their declared types first."""
    target = hydra.utils.instantiate(node, _partial_=True, _convert_="all")
    return construct(target.func, {**target.keywords, **extra})


def construct(kind: Any, values: dict[str, Any]) -> Any:
    """``kind(**values)``, after one clear line for a setting that it does not have or a value of another type."""
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in values if name not in parameters]
    if unknown:
        raise UserError(
            f"{kind.__name__} has no setting {', '.join(unknown)}; its settings are {', '.join(parameters)}"
        )
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            kinds = " or ".join("null" if k is type(None) else k.__name__ for k in choices(hints[name]))
            raise UserError(f"{name} must be {kinds}, got {value!r}")
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has one of the plain types of ``hint``; other types are their own class's business."""
    kinds = choices(hint)
    if not all(kind in (int, float, str, bool, type(None)) for kind in kinds):
        return True
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kinds)) or (isinstance(value, int) and float in kinds)


def choices(hint: Any) -> tuple[Any, ...]:
    """``int | None`` → ``(int, NoneType)``."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def plain(node: Any) -> Any:
    """Lists, dictionaries and scalars, resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


# ---- the command line itself ----


def path_of_model(argument: str) -> list[str]:
    """``model=PATH_OR_HUB_NAME`` for what is no file of conf/model: the pretrained model of that name."""
    key, _, value = argument.partition("=")
    if key != "model" or not value or "," in value or (CONF / "model" / f"{value}.yaml").exists():
        return [argument]
    return ["model=pretrained", f"model.name_or_path='{value}'"]


def check(argv: list[str]) -> None:
    """Compose every choice of the command line once, so that a mistake is one line and not a page of Hydra's."""
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    parser = OverridesParser.create()
    try:
        alternatives = [expanded(parser.parse_override(text), text) for text in overrides]
        swept[:] = [text.partition("=")[0] for text, each in zip(overrides, alternatives, strict=True) if len(each) > 1]
        first = [choices[0] for choices in alternatives]
        plans = [first]
        if set(MULTIRUN) & set(argv):
            plans += [[*first[:i], other, *first[i + 1 :]] for i, each in enumerate(alternatives) for other in each[1:]]
        else:
            plans = [overrides]  # a list of values without -m is Hydra's to refuse
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for plan in plans:
                hydra.compose("config", overrides=plan)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def expanded(override: Override, text: str) -> list[str]:
    """``pattern=kmeans,distance`` → one override for each value; any other override as it is."""
    if not override.is_sweep_override():
        return [text]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def refuse_unknown_keys(cfg: DictConfig) -> None:
    """``+key=value`` adds a key that nobody reads: an error, never a default."""
    known = {*OmegaConf.load(CONF / "config.yaml"), *(folder.name for folder in CONF.iterdir() if folder.is_dir())}
    unknown = [str(key) for key in cfg if key not in known]
    if unknown:
        raise UserError(f"there is no setting {', '.join(unknown)}; `--cfg job` shows all of them")


def one_line(error: BaseException) -> str:
    """The innermost message that was written for people, on one line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return " ".join(str(seen).split())
        seen = seen.__cause__
    text = " ".join(str(error).replace("\n\t", ", ").split())
    if unknown := re.match(r"Could not override '([^']*)'", text):
        return f"there is no setting {unknown[1]}; `--cfg job` shows all of them"
    if missing := re.match(
        r"(?:In '\S+': )?Could not find '([^/]*)/([^']*)' Available options in '[^']*':,? (.*?) Config", text
    ):
        return f"{missing[1]}={missing[2]} is unknown; choose one of {missing[3]}"
    return re.sub(r" full_key: .*", "", text)


def complain(error: UserError) -> int:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
