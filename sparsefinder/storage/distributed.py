"""One stage in several processes, started by ``torchrun``: who does which part, and how the parts come together.

Every process runs the same program. What must be done once, such as writing an artefact, the first one does while the others
wait (`once`); what can be shared, every one does its part of, and all get all parts (`parts`). An error in one is an error in
all, so none waits for ever. In a single process each of these is a plain call. ``accelerate`` knows the processes, as it does for
the Trainer.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from sparsefinder.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)  # a process may wait as long as another one works


def start() -> None:
    """Join the processes that ``torchrun`` started; nothing where it did not. The first one alone writes to the log."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # objects go by way of the CPU: a process that waits for another one does not keep a GPU busy
        _state(backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)  # its threads would abort a process that ends
    if not first():
        logging.disable(logging.WARNING)


def _state(**options: Any) -> PartialState:
    """What ``accelerate`` knows of the processes; the first call joins them. Imported where there are several alone."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), **options)


def count() -> int:
    """How many processes there are."""
    return _state().num_processes if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return _state().process_index if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``: neighbours, so that the parts of all processes in order are the whole."""
    begin, end = (len(items) * index // count() for index in (rank(), rank() + 1))
    return items[begin:end]


def parts(work: Callable[[], T]) -> list[T]:
    """What ``work`` gave in each process, in order. A `UserError` in any of them is raised in all."""
    if count() == 1:
        return [work()]
    from accelerate.utils import gather_object

    return [_value(outcome) for outcome in gather_object([_outcome(work)])]


def once(work: Callable[[], T]) -> T:
    """Let the first process do ``work`` while the others wait; all get what it gave, or its `UserError`."""
    if count() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    (outcome,) = broadcast_object_list([_outcome(work) if first() else None])
    result: T = _value(outcome)
    return result


def first_then_all(work: Callable[[], T]) -> T:
    """``work`` in the first process, then in the others: they find in the cache what it put there."""
    if count() == 1:
        return work()
    made: list[T] = []
    once(lambda: made.append(work()))
    return made[0] if first() else work()


def _outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, work()
    except UserError as error:
        return False, str(error)


def _value(outcome: tuple[bool, Any]) -> Any:
    done, value = outcome
    if not done:
        raise UserError(value)
    return value
