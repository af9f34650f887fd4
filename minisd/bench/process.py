"""The other end of `worker.py`: start a worker process, and ask it for measurements."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd.features.distributed import child_environment

if TYPE_CHECKING:
    from minisd.bench.compare import Settings


class Process:
    """A worker process with one library."""

    def __init__(self, library: str, settings: Settings) -> None:
        self.library = library
        environment = child_environment(OMP_NUM_THREADS=settings.threads, HF_HUB_OFFLINE=1)
        command = [sys.executable, "-m", "minisd.bench.worker", library]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `close`): output of the libraries
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises RuntimeError, with the reason, if the worker fails."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:] or ["no output"]
            raise RuntimeError(f"the process of {self.library} ended at {do!r} with exit code {code}: {last[0]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.library} failed at {do!r}: {answer['error']}")
        return answer

    def kill(self) -> None:
        """End the process in the middle of its work; the `ask` that waits for it raises RuntimeError."""
        self._process.kill()

    def load(self, source: str | Path, settings: Settings, graphs: Path | None = None) -> float:
        """Load a model as the settings say; a peer finds its graphs in a folder of their own. Returns the seconds."""
        names = ("device", "dtype", "threads", "compiled")
        options = {name: getattr(settings, name) for name in names}
        return float(self.ask("load", folder=str(source), graphs=str(graphs or ""), **options)["seconds"])

    def peak(self, size: int) -> int:
        """The peak memory after a step and a decoding at a size, in bytes; ask first, since it never decreases."""
        self.ask("step", size=size)
        self.ask("decode", size=size)
        return int(self.ask("peak")["bytes"])

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


class Budget:
    """The time that is left, and what was skipped for want of it."""

    def __init__(self, seconds: float) -> None:
        self.end, self.skipped = time.monotonic() + seconds, list[str]()

    @property
    def left(self) -> float:
        """In seconds."""
        return self.end - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        """Return whether so many seconds are left for something; if not, note it as skipped."""
        if self.left >= seconds:
            return True
        self.skipped.append(f"{what}: {max(self.left, 0):.0f} s left, expected at least {seconds:.0f}")
        return False


@contextmanager
def loaded(folder: Path, settings: Settings, budget: Budget) -> Iterator[list[Process]]:
    """The worker processes of the libraries with a model; they are killed when the time is up."""
    with ExitStack() as stack:
        processes = [Process(name, settings) for name in settings.libraries]
        for process in processes:
            stack.callback(process.close)
            timer = threading.Timer(max(budget.left, 0), process.kill)
            timer.start()
            stack.callback(timer.cancel)
        for process in processes:
            process.load(folder, settings)
        yield processes
