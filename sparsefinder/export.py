"""The stage ``export``: the model of a run with its predicted graph attached, in a folder that anyone can load.

    import sparsefinder

    model = sparsefinder.load("runs/tiny/sparse_model")

Of several patterns that were chosen one is exported. Where there is a target its sparsity parameters are those that the stage
``calibrate`` set for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsefinder import models
from sparsefinder.errors import UserError
from sparsefinder.executors.choose_executor import AUTO
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.sparse_model.attaching import put
from sparsefinder.sparse_model.index import Attached, BaseModel, Index, hash_of_weights
from sparsefinder.storage.manifests import PRETRAINED, versions
from sparsefinder.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSettings:
    """Settings of the stage ``export``."""

    configurations: tuple[Configuration, ...]
    target: str | None = None  # the pattern is run as the stage calibrate set it for that
    pattern: str = (
        "routed"  # which one, where several were chosen and it is one of them; else the first that was learned
    )
    auto: bool = True  # dense attention below the length at which the prediction pays, on the machine that loads it
    executor: str = AUTO  # auto, native, blocks or triton

    @property
    def chosen(self) -> Configuration | None:
        """What is exported; None where nothing was learned."""
        named = [each for each in self.configurations if each.name == self.pattern]
        learned = [each for each in self.configurations if each.needs]
        single = list(self.configurations) if len(self.configurations) == 1 else []
        return next(iter(single or named or learned), None)

    @property
    def left_out(self) -> str:
        """Why there is nothing to do; empty where there is."""
        return (
            ""
            if self.chosen
            else "none of the chosen patterns was learned: give one by its name, such as pattern=routed"
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        if self.chosen is None:
            return ()
        dialled = self.target is not None and self.chosen.pattern.sparsity_parameter is not None
        return ("model", *self.chosen.needs, *(("calibration",) if dialled else ()))


def run(settings: ExportSettings, store: Store) -> None:
    """Make ``sparse_model``."""
    assert settings.chosen is not None  # otherwise the pipeline leaves the stage out
    configuration = _at_target(settings.chosen, settings, store)
    model, tokenizer = models.load_masked_lm(store.path("model"))
    shape = models.describe(model)
    base = BaseModel(
        _name_of_model(store),
        shape.family,
        hash_of_weights(model.base_model),
        shape.layers,
        shape.heads,
        shape.head_size,
        models.get_normalizer(model).alpha,
    )
    configuration = configuration.fitted(shape.layers, shape.heads)
    values = None if configuration.dials is None else configuration.dials.values
    index = Index(
        base,
        replace(configuration, dials=None),
        Learned.load(store, configuration.needs),
        facts={"source": "the stages of sparsefinder", "versions": versions()},
    )
    put(model, index, Attached(settings.target, values, settings.auto, settings.executor))
    with store.writing("sparse_model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    store.note("sparse_model", pattern=configuration.label)
    log.info("export: %s in %s", configuration.label, store.run_dir / "sparse_model")


def _at_target(configuration: Configuration, settings: ExportSettings, store: Store) -> Configuration:
    if "calibration" not in settings.needs:
        return configuration
    from sparsefinder.experiment.calibration import calibrated

    assert settings.target is not None
    found: Sequence[Configuration] = calibrated((configuration,), store.path("calibration"), settings.target)
    if not found:
        raise UserError(
            f"{configuration.name} was not calibrated for target={settings.target}: run stage=calibrate first"
        )
    return found[0]


def _name_of_model(store: Store) -> str:
    """What the model began as, where that is known, else where it lies."""
    manifest = store.manifest("model")
    begun: Any = None if manifest is None else manifest.settings.get("model", {}).get("name_or_path")
    known = manifest is not None and PRETRAINED in manifest.parents
    return str(begun) if known and begun else str(store.path("model"))
