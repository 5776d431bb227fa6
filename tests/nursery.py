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

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240.0  # seconds after which a run counts as hanging


@dataclass(frozen=True)
class Run:
    """How a run ended: exit status (negative: killed by that signal), seconds, and what it printed."""

    status: int
    seconds: float
    stdout: str
    stderr: str
    peak: int  # bytes of memory

    @property
    def output(self) -> str:
        """All that it printed."""
        return self.stdout + self.stderr

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
        cwd: Path | None = None,
    ) -> Run:
        """The command line with ``arguments``.

        ``kill_after``: SIGKILL after so many seconds. ``file_size``: no file may grow beyond so many bytes. ``memory``: no more
        than so many bytes may be allocated beyond what is there at the start. ``before``: Python code to execute first, with
        the command line as ``main``. ``cwd``: its working directory. What stands in ``PYTHONPATH`` by now can be imported.
        """
        request = {
            "arguments": given_once(arguments),
            "kill_after": kill_after,
            "file_size": file_size,
            "memory": memory,
            "before": before,
            "cwd": None if cwd is None else str(cwd),
            "python_path": os.environ.get("PYTHONPATH"),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
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
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _become(main, request, stdout.fileno(), stderr.fileno())
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
        for file in (stdout, stderr):
            file.seek(0)
        printed, complained = (file.read().decode(errors="replace") for file in (stdout, stderr))
    seconds = time.monotonic() - began
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "stdout": printed,
        "stderr": complained,
        "peak": usage.ru_maxrss * 1024,
    }


def _become(main: Any, request: dict[str, Any], stdout: int, stderr: int) -> None:
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(new, old)
    code = 1
    try:
        if request["file_size"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead of a signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
        if request["memory"] is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + request["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        if request["cwd"] is not None:
            os.chdir(request["cwd"])
        if request["python_path"] is not None:  # for the processes that it starts, and for itself
            os.environ["PYTHONPATH"] = request["python_path"]
            sys.path[:0] = request["python_path"].split(os.pathsep)
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
