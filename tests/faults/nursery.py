"""Many runs of the command line for the price of one start: a process that has imported everything, and forks.

As a program it reads one request a line from its input (arguments, seconds after which to kill, limits) and answers with one
line (exit status, seconds, what was printed). Each run is a process of its own, in a process group of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 240.0  # seconds after which a run counts as hanging


@dataclass(frozen=True)
class Run:
    """How a run ended: exit status (negative: killed by that signal), seconds, and what it printed."""

    status: int
    seconds: float
    output: str
    peak: int  # bytes of memory

    @property
    def errors(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def refused(self) -> str:
        """The one clear line with which it ended; anything else fails the test."""
        assert self.status == 2, self.output
        assert len(self.errors) == 1, self.output
        assert "Traceback" not in self.output, self.output
        return self.errors[0]


def given_once(arguments: Iterable[str]) -> list[str]:
    """Of settings with the same key the last: typed twice, they are refused."""
    return list({argument.partition("=")[0]: argument for argument in arguments}.values())


class Nursery:
    """Start runs by `run`; one at a time."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process

    def run(
        self,
        *arguments: str,
        kill_after: float | None = None,
        file_size: int | None = None,
        memory: int | None = None,
        before: str = "",
    ) -> Run:
        """The command line with ``arguments``.

        ``kill_after``: SIGKILL after so many seconds. ``file_size``: no file may grow beyond so many bytes. ``memory``: no more
        than so many bytes may be allocated beyond what is there at the start. ``before``: Python code to execute first, with
        the command line as ``main``.
        """
        request = {
            "arguments": given_once(arguments),
            "kill_after": kill_after,
            "file_size": file_size,
            "memory": memory,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**request, "before": before}) + "\n")
        self.process.stdin.flush()
        found = Run(**json.loads(self.process.stdout.readline()))
        assert found.seconds < PATIENCE, f"hangs: {arguments}\n{found.output}"
        return found


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery for as long as the block lasts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Nursery(process)
    finally:
        process.communicate()  # its input ends, and so does it


def serve() -> None:
    """Answer requests until the input ends."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    main = runpy.run_path(str(ROOT / "scripts" / "run.py"))["main"]
    for module in ("finetune", "extract", "quantization", "kmeans_centroids", "score", "evaluate", "report"):
        __import__(f"sparsefinder.{module}")
    for line in sys.stdin:
        print(json.dumps(_answer(main, json.loads(line))), flush=True)


def _answer(main: Any, request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as printed:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _become(main, request, printed.fileno())
        allowed = request["kill_after"]
        deadline = began + (PATIENCE if allowed is None else allowed)
        while True:
            found, status, usage = os.wait4(child, os.WNOHANG)
            if found:
                break
            if time.monotonic() >= deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                _, status, usage = os.wait4(child, 0)
                break
            time.sleep(0.002)
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    seconds = time.monotonic() - began
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "output": output,
        "peak": usage.ru_maxrss * 1024,
    }


def _become(main: Any, request: dict[str, Any], output: int) -> None:
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(new, old)
    code = 1
    try:
        if request["file_size"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead of a signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
        if request["memory"] is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + request["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        exec(request["before"], {"main": main})
        sys.argv = [str(ROOT / "scripts" / "run.py")]
        code = main(request["arguments"])
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
