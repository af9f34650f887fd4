"""Child processes that start at once: forks of a server that has imported torch and minisd, which takes seconds.

Where processes cannot fork (Windows) each child imports for itself. What a child runs has to be importable: a function
of minisd or of a module of this folder. What it prints goes to files.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

PRELOADED = ["torch._dynamo", "matplotlib.figure", "minisd.app.cli", "minisd.app.jobs", "killed_training"]


class Done(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


class Child:
    """A running call of a function in a process of its own, in a folder, with one thread.

    `variables` are of its environment.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, cwd: Path | None = None, **variables: str
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="minisd-child-")
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        kind = "forkserver" if hasattr(os, "fork") else "spawn"
        context = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(PRELOADED)
            paths = os.pathsep.join(path for path in sys.path if path)
            with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}):
                forkserver.ensure_running()
        places = str(cwd or Path.cwd()), {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        work = (self.out, self.err, places, function, arguments)
        self.process: Any = context.Process(target=_work, args=work, daemon=True)  # type: ignore[attr-defined]
        self.process.start()

    def wait_for_lines(self, number: int, timeout: float = 120) -> None:
        """Wait until it has printed so many lines, or has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None and not (self.out.exists() and self.out.read_bytes().count(b"\n") >= number):
            assert time.monotonic() < end, f"not {number} lines within {timeout} s"
            time.sleep(0.002)

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        code: int | None = self.process.exitcode
        return code

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.kill(self.process.pid, signal.SIGINT)

    def kill(self) -> Done:
        """End it at once."""
        self.process.kill()
        return self.finish()

    def finish(self, timeout: float = 240) -> Done:
        """Wait for its end."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        out, err = (p.read_text(encoding="utf-8") if p.exists() else "" for p in (self.out, self.err))
        self.folder.cleanup()
        assert not late, f"not finished within {timeout} s: {err[-2000:]}"
        return Done(self.process.exitcode, out, err)


def call(function: Callable[..., Any], *arguments: Any, cwd: Path | None = None) -> Done:
    """Call a function in a process of its own, and wait for its end."""
    return Child(function, *arguments, cwd=cwd).finish()


def together(number: int, function: Callable[..., Any], *arguments: Any) -> list[Done]:
    """Call a function in so many processes that know each other, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [Child(function, *arguments, RANK=str(at), LOCAL_RANK=str(at), **group) for at in range(number)]
    return [child.finish() for child in children]


def module(name: str, *arguments: str) -> None:
    """Run a module as `python -m` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def execute(code: str, *arguments: str) -> None:
    """Run a text as `python -c` does."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})


def _work(out: Path, err: Path, places: tuple[str, dict[str, str]], function: Any, arguments: tuple[Any, ...]) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    folder, variables = places
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if hasattr(os, "fork"):  # as in any other process; else each lock that a killed one leaves behind is complained of
        multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it, and hand that on
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*arguments))
