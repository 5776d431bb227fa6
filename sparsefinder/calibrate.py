"""The stage ``calibrate``: from a target such as ``density=0.1`` to the sparsity parameter of every layer and head.

A threshold that names a tenth of the pairs in one head names a third of them in another. For each pattern with a sparsity
parameter, the values of its sweep are measured on a few training samples, head by head; where the target lies between two of
them, values between are tried too. A head takes

- for a density, the value whose density is nearest to it;
- for a recall, the sparsest value that reaches it, or the one of largest recall where none does.

The choice is then measured once more on held-out samples. A target that a sparsity parameter cannot reach (a whole number of
clusters moves the density in steps, a window cannot be sparser than itself) is said in the table and in the log.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration, Dials, Learned, buildable, needed
from sparsefinder.graphs import Pattern
from sparsefinder.metrics import Counts, Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import tables
from sparsefinder.storage.held_out import training_samples, validation_samples
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

MEASURES = ("density", "recall")
Curve = Mapping[Any, tuple[float, float]]  # of one head: value of the sparsity parameter → density and recall


@dataclass(frozen=True)
class Target:
    """A density or a recall that every head should have."""

    measure: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """``density=0.1`` or ``recall=0.95``; anything else is a `UserError`."""
        measure, _, number = text.partition("=")
        try:
            target = cls(measure.strip(), float(number))
        except ValueError:
            target = cls(measure, float("nan"))
        if target.measure not in MEASURES or not 0 < target.value <= 1:
            raise UserError(f"target={text}: give density=D or recall=R with a number above 0 and at most 1, or null")
        return target

    def choose(self, curve: Curve) -> Any:
        """The value of the sparsity parameter that a head takes."""
        if self.measure == "density":
            return min(curve, key=lambda value: abs(curve[value][0] - self.value))
        enough = [value for value in curve if curve[value][1] >= self.value]
        if enough:
            return min(enough, key=lambda value: curve[value][0])
        return max(curve, key=lambda value: curve[value][1])

    def reached(self, density: float, recall: float, tolerance: float) -> bool:
        """Whether a head is where it should be; a density may be away by the share ``tolerance`` of it."""
        if self.measure == "density":
            return abs(density - self.value) <= tolerance * self.value
        return recall >= self.value

    def between(self, curve: Curve, whole: bool) -> Any | None:
        """A value to try next: between the two neighbours of the target, where a straight line would meet it."""
        index = MEASURES.index(self.measure)
        known = sorted((value, measured[index] - self.value) for value, measured in curve.items())
        for (low, below), (high, above) in itertools.pairwise(known):
            if below * above < 0:
                share = min(max(below / (below - above), 0.1), 0.9)  # a bent curve would never narrow its bracket
                if not whole:
                    return float(f"{low + (high - low) * share:.6g}")
                return min(max(round(low + (high - low) * share), low + 1), high - 1) if high - low > 1 else None
        return None


@dataclass(frozen=True)
class Swept:
    """A pattern with its local and global tokens, and the values of its sparsity parameter to begin with."""

    configuration: Configuration
    values: tuple[Any, ...]


@dataclass(frozen=True)
class CalibrateSettings:
    """Settings of the stage ``calibrate``."""

    dialled: tuple[Swept, ...]
    target: str | None = None  # density=D or recall=R, for every head; None leaves the stage out
    alpha: float = 1.5  # of the entmax whose support is gold
    causal: bool = False
    samples: int = 10  # training samples to choose on
    samples_validation: int | None = None  # held-out samples to check on; None: all
    refinements: int = 4  # values tried between those of the sweep, one after the other
    tolerance: float = 0.1  # share of a density by which a head may miss it and still count as there

    def __post_init__(self) -> None:
        Normalizer(self.alpha)
        if self.target is not None:
            Target.parse(self.target)
        if self.samples < 1 or (self.samples_validation is not None and self.samples_validation < 1):
            raise UserError("calibrate.samples and calibrate.samples_validation must be 1 or more")
        if self.refinements < 0 or self.tolerance < 0:
            raise UserError("calibrate.refinements and calibrate.tolerance must be 0 or more")

    @property
    def left_out(self) -> str:
        """Why there is nothing to do; empty where there is."""
        return "" if self.target else "there is no target: give target=density=0.1 or target=recall=0.95"

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("qk", "qk_validation", *needed(tuple(each.configuration for each in self.dialled)))


def run(settings: CalibrateSettings, store: Store) -> None:
    """Make ``calibration``: the table ``dials``, one row per pattern × local and global tokens × layer × head."""
    assert settings.target is not None  # otherwise the pipeline leaves the stage out
    target = Target.parse(settings.target)
    training, held_out = training_samples(store), validation_samples(store)
    training = training.part(max(0, len(training) - settings.samples), len(training))
    held_out = held_out.part(0, settings.samples_validation or len(held_out))
    learned = Learned.load(store, needed(tuple(each.configuration for each in settings.dialled)))
    learned.check(*training.shape)
    possible = set(map(id, buildable(tuple(each.configuration for each in settings.dialled), learned)))
    dialled = [each for each in settings.dialled if id(each.configuration) in possible]
    if not dialled:
        raise UserError(
            f"target={settings.target} sets the sparsity parameter of patterns, and none of those chosen has one"
        )
    curves = measured_curves(training, dialled, target, settings, learned)
    rows: list[dict[str, Any]] = []
    chosen = []
    layers, heads, _ = training.shape
    for index, each in enumerate(dialled):
        if not curves[index, 0, 0]:
            raise UserError(
                f"{each.configuration.label}: none of its values {each.values} can be had; give another sweep"
            )
        values = tuple(
            tuple(target.choose(curves[index, layer, head]) for head in range(heads)) for layer in range(layers)
        )
        chosen.append(replace(each.configuration, dials=Dials(settings.target, values)))
    checked = _measure(held_out, {(p, 0): c.build(learned) for p, c in enumerate(chosen)}, None, settings)
    for index, configuration in enumerate(chosen):
        own = [
            _row(configuration, layer, head, curves[index, layer, head], checked[index, 0, layer][head], settings)
            for layer in range(layers)
            for head in range(heads)
        ]
        missed = sum(not row["reached"] for row in own)
        if missed:
            log.warning(
                "%s is not reached in %d of %d heads; they take the nearest value",
                configuration.label,
                missed,
                len(own),
            )
        rows += own
    with store.writing("calibration") as folder:
        folder.mkdir()
        tables.write(tables.tidy(rows), folder, "dials")
    store.note("calibration", samples=len(training), samples_validation=len(held_out))


def measured_curves(
    samples: Samples, dialled: Sequence[Swept], target: Target, settings: CalibrateSettings, learned: Learned
) -> dict[tuple[int, int, int], dict[Any, tuple[float, float]]]:
    """Density and recall by the value of the sparsity parameter, for each ``(index in dialled, layer, head)``."""
    layers, heads, _ = samples.shape
    curves: dict[tuple[int, int, int], dict[Any, tuple[float, float]]] = {
        (index, layer, head): {} for index in range(len(dialled)) for layer in range(layers) for head in range(heads)
    }
    asked = {(index, layer): set(each.values) for index, each in enumerate(dialled) for layer in range(layers)}
    for _ in range(1 + settings.refinements):
        patterns: dict[tuple[int, Any], Pattern] = {}
        for (index, _layer), values in asked.items():
            for value in list(values):
                turned = _turned(dialled[index].configuration, value, learned)
                if turned is None:
                    values.discard(value)
                else:
                    patterns[index, value] = turned
        only = {key: values for key, values in asked.items() if values}
        if not only:
            break
        for (index, value, layer), measured in _measure(samples, patterns, only, settings).items():
            for head in range(heads):
                curves[index, layer, head][value] = measured[head]
        asked = {
            (index, layer): {
                value
                for head in range(heads)
                if (value := _next(dialled[index], curves[index, layer, head], target)) is not None
            }
            for index, layer in asked
        }
    return curves


@torch.no_grad()
def _measure(
    samples: Samples,
    patterns: Mapping[tuple[int, Any], Pattern],
    only: Mapping[tuple[int, int], set[Any]] | None,
    settings: CalibrateSettings,
) -> dict[tuple[int, Any, int], list[tuple[float, float]]]:
    """Density and recall of every head for each ``(index, value, layer)``; ``only`` those values of an index and layer."""
    counts: dict[tuple[int, Any, int], list[Counts]] = {}
    for sample in progress(range(len(samples)), "calibrate"):
        for layer, qk in enumerate(samples.layers(sample, settings.causal)):
            gold = Gold.of(qk, settings.alpha)
            for (index, value), pattern in patterns.items():
                if only is None or value in only.get((index, layer), ()):
                    counts.setdefault((index, value, layer), []).append(count(pattern(qk, layer), gold, qk))
    measured = {}
    for key, parts in counts.items():
        means = Counts.cat(parts).macro()
        measured[key] = list(zip((1 - means["sparsity"]).tolist(), means["recall"].tolist(), strict=True))
    return measured


def _turned(configuration: Configuration, value: Any, learned: Learned) -> Pattern | None:
    """The pattern with that value of its sparsity parameter; None where it cannot have it."""
    try:
        pattern = replace(configuration.pattern, **{configuration.pattern.sparsity_parameter: value})
        return replace(configuration, pattern=pattern).build(learned)
    except UserError:
        return None


def _next(dialled: Swept, curve: Curve, target: Target) -> Any | None:
    """The next value for a head to try. Where a sparsity parameter takes odd numbers only, the one above an even number."""
    pattern = dialled.configuration.pattern
    whole = whole_numbered(pattern)
    value = target.between(curve, whole)
    if value is None or not whole:
        return value
    for candidate in (value, value + 1, value - 1):
        try:
            replace(pattern, **{pattern.sparsity_parameter: candidate})
        except UserError:
            continue
        return None if candidate in curve else candidate
    return None


def whole_numbered(pattern: Any) -> bool:
    """Whether the sparsity parameter of a pattern is a whole number."""
    return typing.get_type_hints(type(pattern))[pattern.sparsity_parameter] is int


def _row(
    configuration: Configuration,
    layer: int,
    head: int,
    curve: Curve,
    held_out: tuple[float, float],
    settings: CalibrateSettings,
) -> dict[str, Any]:
    assert configuration.dials is not None
    assert settings.target is not None
    value = configuration.dials.values[layer][head]
    density, recall = curve[value]
    return {
        **_key(configuration),
        "target": settings.target,
        "layer": layer,
        "head": head,
        "dial": configuration.pattern.sparsity_parameter,
        "value": value,
        "density": density,
        "recall": recall,
        "density_held_out": held_out[0],
        "recall_held_out": held_out[1],
        "reached": Target.parse(settings.target).reached(density, recall, settings.tolerance),
        "values_tried": len(curve),
    }


# ---- what score and evaluate use ----


def calibrated(configurations: Iterable[Configuration], folder: Path | str, target: str) -> tuple[Configuration, ...]:
    """Each pattern of ``configurations`` at its calibrated values; once for each set of local and global tokens.

    Patterns without a sparsity parameter are left out, and so are those that were not calibrated, which the log says.

    Args:
        configurations: patterns with their local and global tokens.
        folder: ``calibration/`` of a run.
        target: what the values must have been chosen for, such as ``density=0.1``.

    Returns:
        The configurations with a value for each layer and head.

    Raises:
        UserError: for a folder without a calibration, or with one for another target.
    """
    folder = Path(folder)
    path = folder / "dials.parquet"
    if not path.is_file():
        raise UserError(f"{folder} holds no dials.parquet: give a folder made by stage=calibrate with calibration=PATH")
    table = pd.read_parquet(path)
    if set(table["target"]) - {target}:
        raise UserError(
            f"{folder} was made for target={table['target'].iloc[0]}, not {target}: run stage=calibrate first"
        )
    names = list(_KEY)
    table[names] = table[names].astype(object).where(table[names].notna(), None)
    groups = {
        _comparable(dict(zip(names, key, strict=True))): group
        for key, group in table.groupby(names, dropna=False, sort=False)
    }
    chosen: dict[Any, Configuration] = {}
    for configuration in configurations:
        if configuration.pattern.sparsity_parameter is None or (key := _comparable(_key(configuration))) in chosen:
            continue
        if key not in groups:
            log.warning("%s has no calibration with these settings: run stage=calibrate", configuration.name)
            continue
        kind = int if whole_numbered(configuration.pattern) else float
        grid = groups[key].pivot(index="layer", columns="head", values="value")
        values = tuple(tuple(kind(value) for value in row) for row in grid.to_numpy())
        chosen[key] = replace(configuration, dials=Dials(target, values))
    return tuple(chosen.values())


_KEY = ("pattern", "settings", "window", "global_tokens", "last_token", "block_size")


def _key(configuration: Configuration) -> dict[str, Any]:
    """What a calibration belongs to: a pattern without its sparsity parameter, and its local and global tokens."""
    pattern = configuration.pattern
    own = {
        field.name: getattr(pattern, field.name)
        for field in dataclasses.fields(pattern)
        if field.name != pattern.sparsity_parameter and field.name not in configuration.needs
    }
    values = (configuration.name, json.dumps(own, sort_keys=True), configuration.window or 0)
    tokens = (configuration.global_tokens, configuration.last_token, configuration.block_size)
    return dict(zip(_KEY, (*values, *tokens), strict=True))


def _comparable(key: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key as it can be compared after a way through a file."""
    return tuple(value if isinstance(value, str) else int(value) for value in key.values())
