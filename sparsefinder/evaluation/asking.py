"""The examples on which every variant of a model is measured, and whether it is a model for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsefinder.corpora.packing import APART, pack_of
from sparsefinder.errors import UserError
from sparsefinder.evaluation import tasks
from sparsefinder.models.families import TRAITS
from sparsefinder.models.objectives import is_causal
from sparsefinder.storage.store import Store

Batch = dict[str, Tensor]


def asked(settings: Any, store: Store, model: Any, tokenizer: Any, length: int) -> tasks.Asked:
    """What every variant is asked: words, states, or a task with labels that the model first learns.

    Args:
        settings: those of the stage ``evaluate``.
        store: the run directory.
        model: the finetuned model.
        tokenizer: its own.
        length: tokens of a block.
    """
    if settings.conversions and pack_of(settings.corpus) == APART:
        raise UserError(
            "conversion= makes a model with an attention of its own, which does not see documents apart: leave it out, or give "
            "corpus.pack=false or true"
        )
    shared = ("corpus", "labels", "head", "split", "samples", "batch_size", "seed")
    adapting = settings.adapt.steps * settings.adapt.batch_size
    wanted = {name: getattr(settings, name) for name in shared}
    request = tasks.Request(**wanted, adapt_examples=adapting, adapt_batch_size=settings.adapt.batch_size)
    if settings.task == tasks.EMBEDDING:
        return tasks.ask_states(request, store, model, tokenizer, length)
    if settings.task in tasks.WORDS:
        return tasks.ask_words(request, store, model, tokenizer, length, settings.mask_probability)
    return tasks.ask(tasks.LABELLED[settings.task], request, store, model, tokenizer, length)


def check_kind(settings: Any, model: Any) -> None:
    """Refuse a task that a model of this kind does not do, an attention that it lacks, and one that would see the future."""
    family = model.config.model_type
    traits = TRAITS[family]
    if settings.which not in traits.attentions:
        raise UserError(
            f"which={settings.which}, but a {family} has {' and '.join(traits.attentions)}: give which={traits.attentions[0]}"
        )
    causal = is_causal(model, settings.which)
    own = tasks.OF_KINDS[traits.kind]
    fits = (
        settings.task == own if traits.kind != "encoder" else settings.task not in (tasks.CAUSAL_LM, tasks.SEQ2SEQ_LM)
    )
    if not fits or causal != settings.causal:
        of_encoders = "another evaluate.task" if not fits else f"evaluate.task={settings.task}"
        needed = of_encoders if traits.kind == "encoder" else f"evaluate.task={own}"
        raise UserError(
            f"evaluate.task={settings.task} with causal={str(settings.causal).lower()} is not for which={settings.which} of a "
            f"{family}: give {needed} causal={str(causal).lower()}"
        )
