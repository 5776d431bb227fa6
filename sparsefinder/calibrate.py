"""The stage ``calibrate``: from a target such as ``density=0.1`` to the sparsity parameter of every layer and head.

A threshold that names a tenth of the pairs in one head names a third of them in another. For each pattern with a sparsity
parameter, the values of its sweep are measured on a few training samples, head by head; where the target lies between two of
them, values between are tried too. A head takes

- for a density, the value whose density is nearest to it;
- for a recall, the sparsest value that reaches it, or the one of largest recall where none does.

Heads need not have the same density. Of all heads of all layers together

- a total density is spread so that the heads keep the most dense probability (`sparsefinder.experiment.targets.spread`);
- for a loss, the smallest total density is looked for, by bisection, at which the model loses no more than that beside its
  dense attention, on masked words of the validation split.

The choice is then measured once more on held-out samples. A target that a sparsity parameter cannot reach (a whole number of
clusters moves the density in steps, a window cannot be sparser than itself) is said in the table and in the log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsefinder.corpora import Corpus
from sparsefinder.corpora.packing import identity_of
from sparsefinder.errors import UserError
from sparsefinder.evaluation.loss_difference import LossDifference, MaskedText
from sparsefinder.experiment.calibration import key_of
from sparsefinder.experiment.configuration import Configuration, Dials, Learned, between_texts, buildable, needed
from sparsefinder.experiment.targets import Curve, Measured, Swept, Target, spread, whole_numbered
from sparsefinder.graphs import Pattern
from sparsefinder.metrics import Counts, Gold, count
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import tables
from sparsefinder.storage.held_out import training_samples, validation_samples
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

Place = tuple[int, int]  # a layer and a head


@dataclass(frozen=True)
class CalibrateSettings:
    """Settings of the stage ``calibrate``."""

    dialled: tuple[Swept, ...]
    # density=D or recall=R of every head, density_total=D or loss=L of all together; None leaves the stage out
    target: str | None = None
    alpha: float = 1.5  # of the entmax whose support is gold
    causal: bool = False
    samples: int = 10  # training samples to choose on
    samples_validation: int | None = None  # held-out samples to check on; None: all
    refinements: int = 4  # values tried between those of the sweep, one after the other
    tolerance: float = 0.1  # share of a density by which a head may miss it and still count as there
    corpus: Corpus | None = field(default_factory=lambda: None)  # of loss=L
    text: MaskedText = field(default_factory=MaskedText)  # of loss=L

    def __post_init__(self) -> None:
        Normalizer(self.alpha)
        if self.target is not None:
            Target.parse(self.target)
        if self._reads_text and self.corpus is None:
            raise UserError("a loss is measured on text: give calibrate.corpus")
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
        model = ("model",) if self._reads_text else ()
        return ("qk", "qk_validation", *model, *needed(tuple(each.configuration for each in self.dialled)))

    @property
    def inputs(self) -> dict[str, str]:
        """What else the result depends on, by content."""
        return {"corpus": identity_of(self.corpus)} if self._reads_text and self.corpus else {}

    @property
    def _reads_text(self) -> bool:
        return self.target is not None and Target.parse(self.target).measure == "loss"


def run(settings: CalibrateSettings, store: Store) -> None:
    """Make ``calibration``: the table ``dials``, one row per pattern × local and global tokens × layer × head."""
    assert settings.target is not None  # otherwise the pipeline leaves the stage out
    target = Target.parse(settings.target)
    training, held_out = training_samples(store), validation_samples(store)
    training = training.part(max(0, len(training) - settings.samples), len(training))
    held_out = held_out.part(0, settings.samples_validation or len(held_out))
    learned = Learned.load(store, needed(tuple(each.configuration for each in settings.dialled)))
    learned.check(*training.shape)
    can_be_built = buildable(tuple(each.configuration for each in settings.dialled), learned)
    if training.crosses:
        can_be_built = between_texts(can_be_built, learned, *training.shape[1:])
    possible = set(map(id, can_be_built))
    dialled = [each for each in settings.dialled if id(each.configuration) in possible]
    if not dialled:
        raise UserError(
            f"target={settings.target} sets the sparsity parameter of patterns, and none of those chosen has one"
        )
    curves = measured_curves(training, dialled, target, settings, learned)
    for index, each in enumerate(dialled):
        if not curves[index][0, 0]:
            raise UserError(
                f"{each.configuration.label}: none of its values {each.values} can be had; give another sweep"
            )
    loss = (
        LossDifference.of(store, settings.corpus, settings.text)
        if settings.corpus and target.measure == "loss"
        else None
    )
    choices = [
        choice(each.configuration, curves[index], target, settings, lambda made: loss(made, learned) if loss else 0.0)
        for index, each in enumerate(dialled)
    ]
    patterns = {(p, 0): made.configuration.build(learned) for p, made in enumerate(choices)}
    checked = _measure(held_out, patterns, None, settings)
    rows: list[dict[str, Any]] = []
    for index, made in enumerate(choices):
        own = _rows(
            made, curves[index], {layer: checked[index, 0, layer] for layer in range(training.shape[0])}, settings
        )
        if missed := sum(not row["reached"] for row in own):
            label = made.configuration.label
            log.warning("%s is not reached in %d of %d heads; they take the nearest value", label, missed, len(own))
        rows += own
    with store.writing("calibration") as folder:
        folder.mkdir()
        tables.write(tables.tidy(rows), folder, "dials")
    store.note("calibration", samples=len(training), samples_validation=len(held_out))


@dataclass(frozen=True)
class Choice:
    """A configuration with a value for each head, and what the model loses by it where that was asked for."""

    configuration: Configuration
    loss: float | None = None  # nats more than dense attention


def choice(
    configuration: Configuration,
    curves: Mapping[Place, Curve],
    target: Target,
    settings: CalibrateSettings,
    loss: Callable[[Configuration], float],
) -> Choice:
    """What the heads take.

    Args:
        configuration: A pattern, without a value for each head.
        curves: Of each layer and head.
        target: What is to be reached.
        settings: Of the stage.
        loss: Nats that a configuration loses beside dense attention; asked where the target is a loss.
    """

    def at(chosen: Mapping[Place, Any]) -> Configuration:
        layers, heads = (1 + max(numbers) for numbers in zip(*curves, strict=True))
        values = tuple(tuple(chosen[layer, head] for head in range(heads)) for layer in range(layers))
        return replace(configuration, dials=Dials(str(settings.target), values))

    if not target.of_all:
        return Choice(at({place: target.choose(curve) for place, curve in curves.items()}))
    if target.measure == "density_total":
        return Choice(at(spread(curves, target.value)))

    def tried(density: float) -> Choice:
        made = at(spread(curves, density))
        found = Choice(made, loss(made))
        log.info("%s at a density of %.4f loses %+.4f nats", configuration.label, density, found.loss)
        return found

    least, most = (
        sum(extreme(m.density for m in curve.values()) for curve in curves.values()) / len(curves)
        for extreme in (min, max)
    )
    low, high, best = max(least, most / 1000), most, tried(most)
    while high > low * (1 + settings.tolerance) and best.loss is not None and best.loss <= target.value:
        middle = math.sqrt(low * high)
        found = tried(middle)
        if found.loss is not None and found.loss <= target.value:
            high, best = middle, found
        else:
            low = middle
    return best


def measured_curves(
    samples: Samples, dialled: Sequence[Swept], target: Target, settings: CalibrateSettings, learned: Learned
) -> list[dict[Place, dict[Any, Measured]]]:
    """What each head has at the values of the sparsity parameter that were tried, for each of ``dialled``."""
    layers, heads, _ = samples.shape
    curves: list[dict[Place, dict[Any, Measured]]] = [
        {(layer, head): {} for layer in range(layers) for head in range(heads)} for _ in dialled
    ]
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
                curves[index][layer, head][value] = measured[head]
        asked = {
            (index, layer): {
                value
                for head in range(heads)
                if (value := _next(dialled[index], curves[index][layer, head], target)) is not None
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
) -> dict[tuple[int, Any, int], list[Measured]]:
    """What every head has for each ``(index, value, layer)``; ``only`` those values of an index and layer."""
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
        shares = (1 - means["sparsity"], means["recall"], means["kept_mass"])
        measured[key] = [Measured(*head) for head in zip(*(share.tolist() for share in shares), strict=True)]
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


def _rows(
    made: Choice, curves: Mapping[Place, Curve], held_out: Mapping[int, Sequence[Measured]], settings: CalibrateSettings
) -> list[dict[str, Any]]:
    """The table of one pattern, a row for each layer and head."""
    configuration = made.configuration
    assert configuration.dials is not None
    assert settings.target is not None
    target, values = Target.parse(settings.target), configuration.dials.values
    chosen = {(layer, head): curves[layer, head][values[layer][head]] for layer, head in curves}
    total = sum(measured.density for measured in chosen.values()) / len(chosen)

    def reached(measured: Measured) -> bool:
        if target.measure == "loss":
            return made.loss is not None and made.loss <= target.value
        return target.reached(total if target.of_all else measured.density, measured.recall, settings.tolerance)

    return [
        {
            **key_of(configuration),
            "target": settings.target,
            "layer": layer,
            "head": head,
            "dial": configuration.pattern.sparsity_parameter,
            "value": values[layer][head],
            "density": measured.density,
            "recall": measured.recall,
            "kept_mass": measured.mass,
            "density_held_out": held_out[layer][head].density,
            "recall_held_out": held_out[layer][head].recall,
            "loss_minus_dense": made.loss,
            "reached": reached(measured),
            "values_tried": len(curves[layer, head]),
        }
        for (layer, head), measured in chosen.items()
    ]
