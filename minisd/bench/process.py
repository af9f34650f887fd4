"""The other end of `worker.py`: start a worker process, and ask it for measurements."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
