"""One stage in several processes, started by ``torchrun``: who does which part, and how the parts come together.

Every process runs the same program. What must be done once, such as writing an artefact, the first one does while the others
wait (`once`); what can be shared, every one does its part of, and all get all parts (`parts`). An error in one is an error in
all, so none waits for ever. In a single process each of these is a plain call.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sparsefinder.errors import UserError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)  # a process may wait as long as another one works


def start() -> None:
    """Join the processes that ``torchrun`` started; nothing where it did not. The first one alone writes to the log."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)  # its threads would abort a process that ends
    if not first():
        logging.disable(logging.WARNING)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``: neighbours, so that the parts of all processes in order are the whole."""
    begin, end = (len(items) * place // count() for place in (rank(), rank() + 1))
    return items[begin:end]


def parts(work: Callable[[], T]) -> list[T]:
    """What ``work`` gave in each process, in order. A `UserError` in any of them is raised in all."""
    if count() == 1:
        return [work()]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, _outcome(work))
    return [_value(each) for each in found]


def once(work: Callable[[], T]) -> T:
    """Let the first process do ``work`` while the others wait; all get what it gave, or its `UserError`."""
    if count() == 1:
        return work()
    found: list[Any] = [_outcome(work) if first() else None]
    dist.broadcast_object_list(found)
    result: T = _value(found[0])
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
