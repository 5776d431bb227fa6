"""Call a compiled C++ file of this folder: whether it is there, whether it is what Python takes it for, and what went wrong."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.native.build import load
from sparsefinder.executors.workload import Work

log = logging.getLogger(__name__)

DTYPES = {torch.float32: "float32", torch.float64: "float64"}  # the last part of a function's name
LONG, POINTER = ctypes.c_int64, ctypes.c_void_p  # of arguments and fields
_NO_MEMORY = 1  # of the statuses in boundary.hpp; 0 is fine


@dataclass(frozen=True)
class Library:
    """The compiled ``<name>.cpp`` of this folder.

    Args:
        name: of the file.
        version: of the arguments of its functions, as its ``layout`` says.
        structures: that it is given, in the order of its ``layout``.
        wide: whether it is compiled for the widest vectors of the processor: where most of the work is products of registers.
    """

    name: str
    version: int
    structures: tuple[type[ctypes.Structure], ...] = ()
    wide: bool = False

    def why_not(self, work: Work | None) -> str:
        """Why it cannot do this work; empty where it can. None: whatever the work."""
        if work is None:
            return missing(self)
        if work.device.type != "cpu":
            return f"runs on a CPU, the queries are on {work.device}"
        return "" if available(self) else missing(self)

    def reads(self, x: Tensor) -> bool:
        """Whether it can read ``x``: float32 or float64 on a CPU, where a C++ compiler is or was at hand."""
        return x.device.type == "cpu" and x.dtype in DTYPES and available(self)

    def call(self, function: str, *arguments: object) -> None:
        """One of its functions, all of which return a status.

        Raises:
            MemoryError: memory ran out in there.
            RuntimeError: something else was thrown in there.
        """
        status = getattr(_checked(self), function)(*arguments)
        if status == _NO_MEMORY:
            raise MemoryError(
                f"{self.name}.cpp ran out of memory in {function}: give it fewer tokens or heads at a time"
            )
        if status:
            raise RuntimeError(f"{self.name}.cpp failed in {function} (status {status})")


@functools.cache
def missing(library: Library) -> str:
    """Why a library cannot be had; empty where it can."""
    try:
        _checked(library)
    except UserError as error:
        return str(error)
    return ""


@functools.cache
def available(library: Library) -> bool:
    """Whether a library can be had; one warning in the log where it cannot."""
    if reason := missing(library):
        log.warning("%s; torch's own operations are used instead, slower", reason)
    return not reason


@functools.cache
def _checked(library: Library) -> ctypes.CDLL:
    """Loaded, with the arguments and structures that Python has written down too: anything else would be read as garbage."""
    loaded = load(library.name, library.wide)
    loaded.layout.restype, loaded.layout.argtypes = LONG, [LONG]
    expected = [library.version, *(ctypes.sizeof(structure) for structure in library.structures), 0]
    got = [loaded.layout(n) for n in range(len(expected))]
    if got != expected:
        raise UserError(
            f"{library.name}.cpp and the Python that calls it are of different versions (version and bytes of its structures: "
            f"{got[:-1]}, needed {expected[:-1]}): install sparsefinder again"
        )
    return loaded


def forget() -> None:
    """Look for compilers and libraries again (for tests)."""
    for function in (load, missing, available, _checked):
        function.cache_clear()


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """Contiguous tensors as arguments; whoever calls keeps them alive."""
    return [POINTER(x.data_ptr()) for x in tensors]


class Rows(ctypes.Structure):
    """``Rows`` of clusters.hpp: a tensor ``(B, H, N, D)`` whose vectors may lie apart, but not their numbers."""

    _fields_ = [("numbers", POINTER), *((name, LONG) for name in ("batch", "head", "row"))]

    @classmethod
    def of(cls, x: Tensor) -> Any:
        """A tensor from `with_rows` as an argument; whoever calls keeps it alive."""
        return ctypes.byref(cls(x.data_ptr(), *x.stride()[:3]))


def with_rows(x: Tensor) -> Tensor:
    """Vectors whose numbers lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
