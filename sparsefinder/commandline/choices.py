"""Patterns, attentions and conversions that were chosen: one file of their folder in ``conf``, or all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from sparsefinder.commandline.composition import build, plain, without
from sparsefinder.errors import UserError, one_of
from sparsefinder.evaluation.arms import Arm, Reading
from sparsefinder.evaluation.variants import AttentionChoice, Conversion
from sparsefinder.experiment import named
from sparsefinder.experiment.configuration import Configuration, Dials
from sparsefinder.experiment.instantiate import class_named, construct
from sparsefinder.experiment.targets import Swept

UNITED_WITH = (
    "window",
    "global_tokens",
    "last_token",
    "block_size",
    "share_in_group",
)  # fields of a `Configuration` beside its pattern


def objects(cfg: DictConfig, stage: str) -> dict[str, Any]:
    """Settings of a stage that come from folders of conf: patterns, attentions and conversions."""
    if stage == "finetune" and cfg.finetune.attention is not None:
        return {"attention": _entry(cfg, plain(cfg.finetune.attention), "finetune.attention")}
    if stage == "calibrate":
        return {"dialled": tuple(dialled(cfg)) if cfg.target else ()}
    if stage == "export":
        return {"configurations": tuple(all_configurations(cfg, sweep=False))}
    if stage == "score":
        return {"configurations": tuple(all_configurations(cfg, sweep=True))}
    if stage == "evaluate":
        return {
            "configurations": tuple(all_configurations(cfg, sweep=False)),
            "attentions": tuple(attentions(cfg)),
            "conversions": tuple(conversions(cfg)),
        }
    if stage == "compare":
        return {"arms": tuple(arms(cfg))}
    return {}


@dataclass(frozen=True)
class ChosenPattern:
    """A file of conf/pattern. ``sweep``: values of its sparsity parameter; ``unions``: settings that it is united with, each."""

    name: str
    settings: DictConfig
    sweep: list[Any]
    unions: list[dict[str, Any]]

    def build(self) -> tuple[Any, Dials | None]:
        """The pattern, and its sparsity parameters where the setting is a list with one for each head."""
        parameter = getattr(class_named(self.settings.get("_target_"), "pattern"), "sparsity_parameter", None)
        if parameter is None or not OmegaConf.is_list(self.settings.get(parameter)):
            return build(self.settings), None
        pattern = build(without(self.settings, parameter))
        return pattern, Dials.given(pattern, plain(self.settings[parameter]))

    def united(self, pattern: Any, dials: Dials | None = None) -> Iterable[Configuration]:
        """A pattern made of these settings: a learned one united with each of ``unions``, any other with the first."""
        if not hasattr(pattern, "needs"):  # a file of another group, by a path such as ../model/tiny
            kind = type(pattern).__name__
            raise UserError(f"pattern={self.name} is no pattern but {kind}; name one file of conf/pattern")
        for union in self.unions if pattern.needs else self.unions[:1]:
            yield construct(Configuration, {"name": self.name, "pattern": pattern, "dials": dials} | union)


def all_configurations(cfg: DictConfig, sweep: bool) -> Iterable[Configuration]:
    """The chosen pattern as it is run; with ``pattern=all`` every one, its sparsity parameter swept where ``sweep``."""
    for chosen_pattern in patterns(cfg):
        pattern, dials = chosen_pattern.build()
        values = chosen_pattern.sweep if sweep and cfg.pattern.get("every") else []
        swept = [build(chosen_pattern.settings, **{pattern.sparsity_parameter: value}) for value in values]
        for variant in swept or [pattern]:
            yield from chosen_pattern.united(variant, dials)


def dialled(cfg: DictConfig) -> Iterable[Swept]:
    """The patterns of `all_configurations` that have a sparsity parameter, with the values of their sweep."""
    if cfg.share_in_group:
        raise UserError(
            f"target={cfg.target} sets a sparsity parameter for each head, and share_in_group=true gives several of them one "
            "prediction: leave out one of the two"
        )
    for chosen_pattern in patterns(cfg):
        pattern, dials = chosen_pattern.build()
        if dials is not None:
            raise UserError(
                f"pattern.{pattern.sparsity_parameter} has a value for each head, and target={cfg.target} chooses them: "
                "leave out one of them"
            )
        if getattr(pattern, "sparsity_parameter", None) is not None and chosen_pattern.sweep:
            values = tuple(chosen_pattern.sweep)
            yield from (Swept(configuration, values) for configuration in chosen_pattern.united(pattern))


def patterns(cfg: DictConfig) -> Iterable[ChosenPattern]:
    """The chosen pattern, or every one with ``pattern=all``."""
    unions = [{name: plain(cfg[name]) for name in UNITED_WITH}]
    if cfg.pattern.get("every"):
        unions += [unions[0] | more for more in plain(cfg.pattern.also_with) if unions[0] | more not in unions]
        every = named.names("pattern")
        if cfg.patterns is not None:
            if not isinstance(cfg.patterns, ListConfig):
                raise UserError(f"patterns is a list such as [kmeans,window], or null for all, got {cfg.patterns}")
            if unknown := [name for name in cfg.patterns if name not in every]:
                raise UserError(f"patterns={unknown} are unknown; {one_of(every, unknown[0], 'choose some of')}")
            every = [name for name in every if name in cfg.patterns]
        nodes = list(files(cfg, "pattern", every))
    else:
        nodes = [(chosen("pattern"), cfg.pattern)]
    for name, node in nodes:
        sweep = plain(node.get("sweep", []))
        if not isinstance(sweep, list):
            raise UserError(f"pattern.sweep={sweep}: the values of a sweep are a list, such as [1,2,4]")
        yield ChosenPattern(name, without(node, "sweep"), sweep, unions)


def attentions(cfg: DictConfig) -> Iterable[AttentionChoice]:
    """The chosen attention, or with ``attention=all`` every one but those with ``only_by_name``."""
    if not cfg.attention.get("every"):
        yield _choice(chosen("attention"), cfg.attention)
        return
    for name, node in files(cfg, "attention", named.names("attention")):
        if not node.get("only_by_name"):
            yield _choice(name, node)


def conversions(cfg: DictConfig) -> Iterable[Conversion]:
    """The chosen conversion, none of them, or every one with ``conversion=all``."""
    if cfg.conversion.get("none"):
        return
    every = named.names("conversion")
    nodes = files(cfg, "conversion", every) if cfg.conversion.get("every") else [(chosen("conversion"), cfg.conversion)]
    for name, node in nodes:
        yield Conversion(name, build(node))


def arms(cfg: DictConfig) -> Iterable[Arm]:
    """The entries of ``arms``, each a pattern, an attention that brings its own graph, or a reading; with its settings.

    A pattern is run by its buckets where it has them, else as a mask; ``attention`` names another file of conf/attention.
    """
    names: set[str] = set()
    given = plain(cfg.arms) or []
    if not isinstance(given, list):
        raise UserError(
            f"arms={given}: give a list in quotation marks, such as 'arms=[{{pattern: window, width: 65}}]'"
        )
    for entry in given:
        arm = _entry(cfg, entry, "arms")
        if arm.name in names:
            raise UserError(f"arms: {arm.name} is there twice; give one of them a name")
        names.add(arm.name)
        yield arm


def _entry(cfg: DictConfig, entry: Any, setting: str) -> Arm:
    if not isinstance(entry, dict) or not {"pattern", "attention", "reading"} & set(entry):
        raise UserError(f"{setting}: {entry} is no arm; give a pattern, an attention or a reading, with its settings")
    return _reading(entry, setting) if "reading" in entry else _arm(cfg, entry, setting)


def _reading(entry: dict[str, Any], setting: str) -> Arm:
    settings = {"kind" if key == "reading" else key: value for key, value in entry.items() if key != "name"}
    reading = construct(Reading, settings, setting)
    return Arm(entry.get("name", f"{reading.kind} of {reading.tokens}"), reading=reading)


def _arm(cfg: DictConfig, entry: dict[str, Any], setting: str) -> Arm:
    settings = {key: value for key, value in entry.items() if key not in ("name", "pattern", "attention")}
    name = entry.get(
        "name", " ".join([entry.get("pattern") or entry["attention"], *(f"{k}={v}" for k, v in settings.items())])
    )
    if "pattern" not in entry:
        return Arm(name, _choice(entry["attention"], _file(cfg, "attention", entry["attention"], setting), settings))
    around = {key: settings.pop(key) for key in UNITED_WITH if key in settings}
    pattern = build(without(_file(cfg, "pattern", entry["pattern"], setting), "sweep"), **settings)
    united = {key: plain(cfg[key]) for key in UNITED_WITH} | around
    configuration = construct(Configuration, {"name": entry["pattern"], "pattern": pattern} | united, setting)
    attention = entry.get("attention", "masked" if configuration.quadratic else "bucketed")
    return Arm(name, _choice(attention, _file(cfg, "attention", attention, setting)), configuration)


def _choice(name: str, node: DictConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> AttentionChoice:
    options = {key: value for key, value in plain(node).items() if key not in ("_target_", "only_by_name")}
    return AttentionChoice(name, class_named(node.get("_target_"), "attention"), {**options, **settings})


def _file(cfg: DictConfig, group: str, name: str, setting: str) -> DictConfig:
    """One file of a folder of conf, or what is installed under that name, resolved."""
    try:
        node = named.settings_of(group, name)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    return _resolved(without(cfg, group), group, node)


def files(cfg: DictConfig, group: str, names: Iterable[str]) -> Iterable[tuple[str, DictConfig]]:
    """Files of a folder of conf, or what other packages bring to it, by name, resolved against the rest of the configuration."""
    rest = without(cfg, group)
    for name in names:
        yield name, _resolved(rest, group, named.settings_of(group, name))


def _resolved(rest: DictConfig, group: str, node: Mapping[str, Any]) -> DictConfig:
    """A file's settings with what they refer to put in, so that copying them does not copy the whole configuration."""
    with open_dict(rest):
        rest[group] = dict(node)
    resolved: DictConfig = OmegaConf.create({group: plain(rest[group])})[group]
    return resolved


def chosen(group: str) -> str:
    """The file that was chosen in a folder of conf."""
    return str(HydraConfig.get().runtime.choices[group])
