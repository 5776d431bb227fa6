"""The stages in their order: what each needs and makes, and when it can be skipped.

A stage is done when every artefact that it makes is finished, was made with the same settings by this version of the
package, and its parents still have the content they had then. A stage that is done is skipped and says so; one that is not
says what changed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sparsefinder.errors import UserError, one_of
from sparsefinder.storage import distributed, growing_table
from sparsefinder.storage.manifests import plain, read_manifest, versions
from sparsefinder.storage.store import ARTEFACTS, SAMPLES, Store

log = logging.getLogger(__name__)


class Settings(Protocol):
    """What every stage's settings can say: the artefacts they make the stage read.

    Those that read something else, a corpus, name its content in a property ``inputs``, a dict of hashes under names that no
    artefact has. Those of a stage that has nothing to do say why in a property ``left_out``.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the artefacts that the stage reads."""


@dataclass(frozen=True)
class Stage:
    """One step: its name, the module whose ``run(settings, store)`` makes its artefacts, and what it reads if it is there.

    The module is imported when the stage is run, so that scoring does not wait for transformers. Several processes
    (`sparsefinder.storage.distributed`) run a ``shared`` stage together; any other is the first one's business.
    """

    name: str
    module: str
    optional: tuple[str, ...] = ()
    shared: bool = False
    grows: bool = False  # its one artefact keeps what earlier commands measured, see `growing`

    @property
    def makes(self) -> tuple[str, ...]:
        """Names of the artefacts it writes."""
        return tuple(artefact.name for artefact in ARTEFACTS.values() if artefact.stage == self.name)

    def run(self, settings: Settings, store: Store) -> None:
        """Make the artefacts."""
        importlib.import_module(self.module).run(settings, store)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("finetune", "sparsefinder.finetune", shared=True),
        Stage("extract", "sparsefinder.extract", shared=True),
        Stage("project", "sparsefinder.quantization"),
        Stage("cluster", "sparsefinder.kmeans_centroids"),
        Stage("cluster_online", "sparsefinder.online_centroids"),
        Stage("route", "sparsefinder.lowrank"),
        Stage("bilinear", "sparsefinder.bilinear"),
        Stage("calibrate", "sparsefinder.calibrate"),
        Stage("score", "sparsefinder.score", shared=True, grows=True),
        Stage("evaluate", "sparsefinder.evaluate", shared=True, grows=True),
        Stage("compare", "sparsefinder.compare"),
        Stage("export", "sparsefinder.export"),
        Stage(
            "report",
            "sparsefinder.report",
            optional=tuple(name for name in ARTEFACTS if name != "report"),
        ),
    )
}


def chosen_stages(stage: str | Sequence[str]) -> list[Stage]:
    """``all``, one name or several → stages in their order; an unknown name is a `UserError` that lists them."""
    names = [stage] if isinstance(stage, str) else list(stage or ())
    if names == ["all"]:
        return list(STAGES.values())
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        shown = ",".join(map(str, unknown))
        raise UserError(f"stage={shown} is unknown; {one_of(STAGES, shown, 'choose all or some of')}")
    return [stage for stage in STAGES.values() if stage.name in names]


def run_stages(stages: Sequence[Stage], settings: Mapping[str, Settings], store: Store, seed: int) -> None:
    """Run what is not done. One run at a time works in a run directory; another one gets a `UserError`."""
    with contextlib.ExitStack() as stack:
        distributed.once(lambda: _keep(stack, store))
        distributed.once(lambda: check_needs(stages, settings, store))
        made = {name for stage in stages if _run(stage, settings[stage.name], store, seed) for name in stage.makes}
        distributed.once(lambda: _say_what_is_behind(made, store))


def _keep(stack: contextlib.ExitStack, store: Store) -> None:
    stack.enter_context(store.held())


def check_needs(stages: Sequence[Stage], settings: Mapping[str, Settings], store: Store) -> None:
    """Before minutes of work: what a stage reads is there, or an earlier one makes it; a `UserError` where it is not.

    What one stage makes together is given together; samples to score may be others than those to learn from.
    """
    made: set[str] = set()
    _check_apart(stages, settings, store)
    for stage in stages:
        if not getattr(settings[stage.name], "left_out", ""):
            _check_together(stage.makes, store)
            for maker in STAGES.values():
                read = [name for name in maker.makes if name in settings[stage.name].needs]
                _check_together([name for name in read if name not in SAMPLES], store)
            for name in ARTEFACTS:  # in the order in which they are made
                if name in settings[stage.name].needs and name not in made:
                    store.path(name)
            made |= set(stage.makes)


def _check_apart(stages: Sequence[Stage], settings: Mapping[str, Settings], store: Store) -> None:
    """Nothing is measured on the queries and keys that it was learned from, as no model is on the text that it read."""
    if store.splits_qk or not any(name in store.given for name in SAMPLES):
        return
    learns = any("qk" in settings[stage.name].needs for stage in stages)
    known = all(store.find(name) is not None for name in SAMPLES)
    if learns and known and store.content("qk") == store.content("qk_validation"):
        raise UserError(
            f"qk_validation={store.path('qk_validation')} holds the same queries and keys as qk={store.path('qk')}: what is "
            "learned would be measured on what it was learned from; give others, or qk alone, whose last tenth is held out"
        )


def _check_together(names: Sequence[str], store: Store) -> None:
    given = [name for name in names if name in store.given]
    if given and len(given) < len(names):
        rest = " and ".join(f"{name}=PATH" for name in names if name not in given)
        maker = ARTEFACTS[given[0]].stage
        raise UserError(
            f"{' and '.join(given)} is given by path, but stage={maker} makes it with another: give {rest} too"
        )


def _say_what_is_behind(made: set[str], store: Store) -> None:
    """One line about artefacts of the run directory that were made from what is replaced now: a report, for instance."""
    behind = []
    for name in ARTEFACTS:
        manifest = read_manifest(store.run_dir / ARTEFACTS[name].path)
        parents = made & set(manifest.parents) if manifest is not None and name not in made else ()
        if manifest is not None and any(manifest.parents[parent] != store.content(parent) for parent in parents):
            behind.append(name)
    if behind:
        stages = dict.fromkeys(ARTEFACTS[name].stage for name in behind)
        log.info(
            "%s %s still of before: stage=%s makes %s anew",
            *(" and ".join(behind), "is" if len(behind) == 1 else "are"),
            *(f"[{','.join(stages)}]" if len(stages) > 1 else next(iter(stages)), "it" if len(behind) == 1 else "them"),
        )


def _run(stage: Stage, settings: Settings, store: Store, seed: int) -> bool:
    """Whether there was something to do."""
    if why := getattr(settings, "left_out", ""):
        log.info("%s: left out, %s", stage.name, why)
        return False
    todo = distributed.once(lambda: _prepared(stage, settings, store))
    if todo is None:
        return False
    described, parents = todo
    try:
        if stage.shared:
            stage.run(settings, store)
        else:
            distributed.once(lambda: stage.run(settings, store))
    except Exception as error:
        if distributed.first() and (why := _replaced(stage, settings, store, parents)):
            raise UserError(why) from error
        raise
    distributed.once(lambda: _finish(stage, settings, store, described, parents, seed))
    return True


def _prepared(stage: Stage, settings: Settings, store: Store) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The settings and parents with which the stage must be run, after saying why; None where it is done."""
    given = [name for name in stage.makes if name in store.given]
    if len(given) == len(stage.makes):
        log.info("%s: skipped, %s is given by path", stage.name, " and ".join(given))
        return None
    _check_kin(settings, store)
    parents = _parents(stage, settings, store)
    described = json.loads(json.dumps(plain(settings)))
    stale = [_changes(store, described, parents, name) for name in stage.makes]
    if stage.grows and (table := growing_table.Table.of(stage.name, settings, store)).held:  # type: ignore[arg-type]
        stale = [table.in_words(stage.name) or stale[0] or "measured again"] if table.missing else [""]
    if not any(stale):
        log.info("%s: done and unchanged, skipped", stage.name)
        return None
    reasons = [
        f"makes {name}" if store.borrows(name) else why for name, why in zip(stage.makes, stale, strict=True) if why
    ]
    log.info("%s: %s", stage.name, reasons[0])
    return described, parents


def _check_kin(settings: Settings, store: Store) -> None:
    """A space and what was learned in it belong together; a `UserError` where they do not.

    Samples may be others than those learned from, and what is given by path is taken as it is.
    """
    for name in settings.needs:
        manifest = None if name in store.given else store.manifest(name)
        held_out = "qk_validation" in settings.needs and not store.splits_qk
        if manifest and held_out and manifest.parents.get("qk") == store.content("qk_validation"):
            raise UserError(
                f"qk_validation={store.path('qk_validation')} holds the queries and keys that {name} was learned from: "
                "give others"
            )
        for parent, content in manifest.parents.items() if manifest else ():
            apart = parent in SAMPLES or parent not in settings.needs
            if not apart and store.content(parent) != content:
                raise UserError(
                    f"{name} was made from other {parent}: run stage={ARTEFACTS[name].stage} first, or use it all the same "
                    f"with {name}=PATH"
                )


def _finish(
    stage: Stage,
    settings: Settings,
    store: Store,
    described: dict[str, Any],
    parents: dict[str, str],
    seed: int,
) -> None:
    if why := _replaced(stage, settings, store, parents):
        raise UserError(why)
    if stage.grows:
        folder = store.run_dir / ARTEFACTS[stage.name].path
        described, parents = growing_table.described(described, folder), growing_table.parents_of(folder) | parents
    for name in stage.makes:
        store.finish(name, stage.name, described, parents, seed)


def _parents(stage: Stage, settings: Settings, store: Store) -> dict[str, str]:
    """What the stage reads, by content."""
    parents = {name: store.content(name) for name in settings.needs}
    parents |= {name: store.content(name) for name in stage.optional if store.find(name) is not None}
    inputs: dict[str, str] = getattr(settings, "inputs", {})
    if taken := [name for name in inputs if name in ARTEFACTS]:  # its hash would be taken for that of the artefact
        raise ValueError(f"stage={stage.name}: the input {taken[0]} needs a name that no artefact has")
    return parents | inputs


def _replaced(stage: Stage, settings: Settings, store: Store, parents: dict[str, str]) -> str:
    """What somebody replaced while the stage read it, in words: its result belongs to no parent; empty where all is well."""
    try:
        now = _parents(stage, settings, store)
    except UserError as error:
        return f"while {stage.name} was running, {error}; its result is not kept"
    changed = [name for name in {**parents, **now} if parents.get(name) != now.get(name)]
    if not changed:
        return ""
    return f"{' and '.join(changed)} changed while {stage.name} was running: its result is not kept; run it again"


def _changes(store: Store, settings: dict[str, Any], parents: dict[str, str], name: str) -> str:
    """Why an artefact has to be made, in words; empty where it is done."""
    manifest = store.manifest(name)
    if manifest is None:
        return f"makes {name}"
    if store.damaged(name):
        return f"runs again, because {name} was damaged or replaced"
    reasons = [f"{key} {old} → {new}" for key, old, new in _differences(manifest.settings, settings)]
    reasons += [f"{parent} changed" for parent, content in parents.items() if manifest.parents.get(parent) != content]
    reasons += [f"{parent} is gone" for parent in manifest.parents if parent not in parents]
    made_by, now = manifest.versions.get("sparsefinder"), versions().get("sparsefinder")
    if made_by != now:
        reasons.append(f"sparsefinder {made_by} → {now}")
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return f"runs again, because {shown}" if reasons else ""


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            difference
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for difference in _differences(a, b, f"{where}[{i}]")
        ]
    return [] if old == new else [(where, _short(old), _short(new))]


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)) and value:
        return f"{len(value)} entries"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
