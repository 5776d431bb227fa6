"""The examples on which every variant of a model is measured, and whether it is a model for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.evaluation import tasks
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
    shared = ("corpus", "labels", "head", "split", "samples", "batch_size", "seed")
    adapting = settings.adapt.steps * settings.adapt.batch_size
    wanted = {name: getattr(settings, name) for name in shared}
    request = tasks.Request(**wanted, adapt_examples=adapting, adapt_batch_size=settings.adapt.batch_size)
    if settings.task == tasks.EMBEDDING:
        return tasks.ask_states(request, store, model, tokenizer, length)
    if settings.task in (tasks.MASKED_LM, tasks.CAUSAL_LM):
        return tasks.ask_words(request, store, model, tokenizer, length, settings.mask_probability)
    return tasks.ask(tasks.LABELLED[settings.task], request, store, model, tokenizer, length)


def check_kind(settings: Any, model: Any) -> None:
    """Refuse a task that a model of this kind does not do, and a decoder that would see the future."""
    causal = is_causal(model)
    if causal != (settings.task == tasks.CAUSAL_LM) or causal != settings.causal:
        needed = f"evaluate.task={tasks.CAUSAL_LM} causal=true" if causal else "causal=false and another evaluate.task"
        raise UserError(
            f"evaluate.task={settings.task} with causal={str(settings.causal).lower()} is not for a {model.config.model_type}: "
            f"give {needed}"
        )
