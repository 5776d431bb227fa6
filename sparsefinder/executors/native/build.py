"""Compile a C++ file of this package once per machine, and load it.

Needs nothing but a C++ compiler (``CXX``, or else ``c++``, ``g++`` or ``clang++``): functions are called through `ctypes` with
plain pointers, so no headers of torch or Python take part and compiling takes seconds. Libraries are kept in
``$XDG_CACHE_HOME/sparsefinder`` (``~/.cache/sparsefinder``) under a name made of the source, the compiler and the instructions
of the processor: a home directory shared by unlike machines, or a new version of the package, never finds a wrong one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import torch

from sparsefinder.errors import UserError
from sparsefinder.storage.files import cache_folder

# no flag here changes a sum's meaning for infinity or NaN; of vectors of 256 and 512 bits the former were as fast or faster
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
_VECTORS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx2", "-mfma")}  # by what torch says of the processor
_WIDE = {"AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")}
_SECONDS = 300


def compiler() -> str:
    """The path of the C++ compiler; a `UserError` where there is none."""
    found = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])), None)
    if found is None:
        raise UserError("no C++ compiler was found (CXX, c++, g++, clang++): install one")
    return found


@functools.cache
def load(name: str, wide: bool = False) -> ctypes.CDLL:
    """The compiled ``<name>.cpp`` of this folder; a `UserError` where there is no compiler, or it fails.

    Args:
        name: of the file.
        wide: whether vectors are as long as the processor has them.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    vectors = {**_VECTORS, **_WIDE} if wide else _VECTORS
    flags = (*_FLAGS, *_sanitizers(), *vectors.get(torch.backends.cpu.get_cpu_capability(), ()))
    texts = (path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.hpp"))))
    command = [compiler(), *flags]
    identity = (*texts, *command, platform.system(), platform.machine())
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    reason: Exception | None = None
    for folder in (cache_folder, _temporary):
        try:
            return _built(source, folder() / f"{name}-{key}.so", command)
        except (OSError, RuntimeError) as error:  # no home, not writable, full, or no program may be loaded from there
            reason = error
    raise UserError(
        f"{source.name} could not be kept or loaded ({reason}): set XDG_CACHE_HOME to a folder that can be written"
    )


def _sanitizers() -> tuple[str, ...]:
    """Flags by ``SPARSEFINDER_SANITIZE``, such as ``address,undefined``: what `make test-sanitized` compiles with."""
    chosen = os.environ.get("SPARSEFINDER_SANITIZE", "")
    return (f"-fsanitize={chosen}", "-fno-sanitize-recover=undefined", "-O1", "-g") if chosen else ()


def _seconds() -> int:
    """How long a file may take; the largest, with sanitizers, ten times as long."""
    return _SECONDS * 10 if _sanitizers() else _SECONDS


def _compile(command: list[str]) -> tuple[int, str]:
    """The compiler's exit status and what it said; where it takes too long, what it started ends too."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as compiler:
        try:
            _, said = compiler.communicate(timeout=_seconds())
        except BaseException:
            os.killpg(compiler.pid, signal.SIGKILL)
            raise
    return compiler.returncode, said


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"sparsefinder-{os.getuid()}"


def _built(source: Path, target: Path, command: list[str]) -> ctypes.CDLL:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = target.parent.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:  # what is loaded from there runs as this user
        raise OSError(f"{target.parent} belongs to or can be written by others")
    if not target.exists():
        # moved when whole: others may be building the same
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            new = Path(folder) / target.name
            try:
                status, said = _compile([*command, str(source), "-o", str(new)])
            except subprocess.TimeoutExpired:
                raise UserError(f"{command[0]} took more than {_seconds()} s over {source.name}") from None
            if status:
                first = next((line for line in said.splitlines() if "error" in line), said.strip()[:200])
                raise UserError(
                    f"{command[0]} could not compile {source.name} ({first}): set CXX to a compiler for C++17 and OpenMP"
                )
            new.replace(target)
    return ctypes.CDLL(str(target))
