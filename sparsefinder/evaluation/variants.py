"""What `evaluate` compares: an attention, the graph that it is given, and the normalizer on it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsefinder.attention import Bucketed
from sparsefinder.auto_attention import Auto
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.experiment.instantiate import construct
from sparsefinder.graphs import Pattern
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.window import Window
from sparsefinder.storage.manifests import plain

log = logging.getLogger(__name__)

_BY_LAYOUT = (Auto, Bucketed)  # attentions that can run no other pattern than one with a bucketed form
NO_BUCKETS = "which compares every pair, so that it has no bucketed form"


@dataclass(frozen=True)
class AttentionChoice:
    """A file of conf/attention: the class of an attention and its settings.

    A class whose constructor has a ``pattern`` runs any pattern (masked, bucketed); another one brings its own graph (LSG).
    """

    name: str  # of the file
    kind: type
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if given := [name for name in ("pattern", "normalizer") if name in self.options]:
            raise UserError(f"attention.{given[0]} is no setting: `evaluate` gives every attention its {given[0]}")
        self.build(Window(1), Normalizer())  # what is wrong with the settings is said before any work

    @property
    def takes_pattern(self) -> bool:
        """Whether it is given a pattern."""
        return "pattern" in inspect.signature(self.kind).parameters

    def build(self, pattern: Pattern | None, normalizer: Normalizer) -> Any:
        """The attention, ready to be plugged into a model."""
        given = {"pattern": pattern} if self.takes_pattern else {}
        return construct(self.kind, {**given, "normalizer": normalizer, **self.options}, "attention")


@dataclass(frozen=True)
class Conversion:
    """A file of conf/conversion: the finetuned model as another architecture, with softmax attention of its own."""

    name: str  # of the file
    convert: Callable[[Any, Any, int], Any]  # (model, tokenizer, length) → sparsefinder.evaluation.converted.Converted

    @property
    def columns(self) -> dict[str, Any]:
        """What tells this row from the others."""
        settings = {k: v for k, v in plain(self.convert).items() if k != "type"}
        return {"variant": f"converted {self.name} (softmax)", "attention": self.name, "alpha": 1.0, **settings}


@dataclass(frozen=True)
class Variant:
    """One row of the results."""

    attention: AttentionChoice
    configuration: Configuration | None  # None for an attention with a graph of its own
    normalizer: Normalizer

    @property
    def label(self) -> str:
        """One short line, such as ``bucketed kmeans top_clusters=2 + window 11``."""
        graph = "" if self.configuration is None else f" {self.configuration.label}"
        softmax = "" if self.normalizer.sparse else " (softmax)"
        return f"{self.attention.name}{graph}{softmax}"

    @property
    def columns(self) -> dict[str, Any]:
        """What tells this row from the others."""
        own = self.configuration.columns if self.configuration else dict(self.attention.options)
        # last, because the alpha of an oracle says what it looks for, not how the model attends
        return {"variant": self.label, "attention": self.attention.name, **own} | {"alpha": self.normalizer.alpha}

    def pattern(self, learned: Learned) -> Pattern | None:
        """The pattern as it is run; None for an attention with a graph of its own."""
        if self.configuration is None:
            return None
        return self.configuration.build(learned)


def crossed(
    attentions: tuple[AttentionChoice, ...],
    configurations: tuple[Configuration, ...],
    normalizer: Normalizer,
    learned: Learned,
    head_size: int,
) -> list[Variant]:
    """Every attention with every pattern it can run; bucketed attention only with patterns that have a bucketed form.

    Without `Full`: that is dense attention, which is always there to compare with. The log says what is left out.
    """
    variants, without = [], []
    for attention in attentions:
        if not attention.takes_pattern:
            variants.append(Variant(attention, None, normalizer))
            continue
        for configuration in configurations:
            if isinstance(configuration.pattern, Full):
                continue
            if attention.kind in _BY_LAYOUT and not configuration.bucketed(learned, head_size):
                without.append(f"{attention.name} {configuration.name}")
            else:
                variants.append(Variant(attention, configuration, normalizer))
    if without:
        log.info("left out: %s, %s", ", ".join(dict.fromkeys(without)), NO_BUCKETS)
    return variants


def check_some(attentions: tuple[AttentionChoice, ...], configurations: tuple[Configuration, ...]) -> None:
    """Raise a `UserError`, before any work, where every attention is bucketed and no pattern has a bucketed form."""
    bucketed = all(attention.kind in _BY_LAYOUT for attention in attentions)
    impossible = [each.quadratic and not isinstance(each.pattern, Full) for each in configurations]
    if bucketed and impossible and all(impossible):
        names = ", ".join(dict.fromkeys(configuration.name for configuration in configurations))
        raise UserError(
            f"attention={attentions[0].name} cannot run pattern={names}, {NO_BUCKETS}: nothing is left to evaluate; "
            "give attention=masked, or a pattern with buckets such as kmeans or quantize"
        )
