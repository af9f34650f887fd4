"""Run the tests on other machines than this one, as far as one machine can play them.

    python tests/matrix.py                            # every combination: hours
    python tests/matrix.py sse41 four-threads         # these
    python tests/matrix.py --list
    python tests/matrix.py sse41 elsewhere -- -m quick    # what follows -- goes to pytest in place of all tests

Each combination is one run of pytest in a process of its own, with other environment variables, in another folder,
beside busy loops, or in a virtual environment of its own. The table that is printed at the end is the one in
tests/README.md. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Machine:
    """A machine to play: what it is, its environment, and how it differs besides.

    needs: a flag of /proc/cpuinfo without which it cannot be played. packages: "installed" for those of this Python,
    or "newest" or "lowest" for a virtual environment of its own. busy: loops that run beside the tests.
    """

    what: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    packages: str = "installed"
    busy: int = 0
    elsewhere: bool = False


def _instructions(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


MACHINES = {
    "as-it-is": Machine("this machine"),
    "sse41": Machine("no AVX at all", _instructions("default", "SSE41", "SSE4_2")),
    "avx2": Machine("AVX2, as laptops have", _instructions("avx2", "AVX2", "AVX2"), "avx2"),
    "avx512": Machine("AVX-512 without bfloat16", _instructions("avx512", "AVX512_CORE", "AVX512"), "avx512f"),
    "one-thread": Machine("one thread in each process", {"OMP_NUM_THREADS": "1"}),
    "two-threads": Machine("two threads in each process", {"OMP_NUM_THREADS": "2"}),
    "four-threads": Machine("four threads in each process", {"OMP_NUM_THREADS": "4"}),
    "loaded": Machine("two busy loops beside it", busy=2),
    "elsewhere": Machine(
        "no HOME, locale C, another time zone, a folder nobody can write to",
        {"LC_ALL": "C", "TZ": "Asia/Kathmandu"},
        elsewhere=True,
    ),
    "newest": Machine("the newest versions of all packages", packages="newest"),
    "lowest": Machine("the lowest versions that pyproject.toml allows", packages="lowest"),
}


def lowest_versions() -> list[str]:
    """Requirements that pin every package of pyproject.toml, but for the tests' own tools, to its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name in ("notebooks", "train", "web") for each in extras[name])]
    return sorted({each.replace(">=", "==") for each in wanted})


def build(folder: Path, packages: str) -> Path:
    """Make a virtual environment with the newest or the lowest versions, and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[test]"]
    if packages == "lowest":
        pins = folder / "lowest.txt"
        pins.write_text("\n".join(lowest_versions()) + "\n")
        command += ["-c", str(pins)]
    subprocess.run(command, check=True)
    return python


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Within this block `count` processes do nothing as fast as they can."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def playable(machine: Machine) -> bool:
    """Whether this machine has the instructions that the other one is to have."""
    cpu = Path("/proc/cpuinfo")
    return not machine.needs or (cpu.exists() and machine.needs in cpu.read_text().split())


def run(name: str, machine: Machine, arguments: list[str], folder: Path) -> tuple[bool, str]:
    """Run the tests on a machine; whether all passed, and its row of the table."""
    python, extra = Path(sys.executable), []
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1"} | machine.environment
    with ExitStack() as stack:
        if machine.packages != "installed":
            python = build(folder / name, machine.packages)
            extra += ["-W", "error::DeprecationWarning:minisd"]
        stack.enter_context(busy_loops(machine.busy))
        if machine.elsewhere:
            # not even root can make a file in /proc
            environment = {key: value for key, value in environment.items() if key != "HOME"}
            extra += ["-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
            arguments = arguments if any(map(os.path.exists, arguments)) else [*arguments, str(ROOT / "tests")]
        command = [str(python), "-m", "pytest", "-n", "2", "-q", *extra, *arguments]
        started, last = time.monotonic(), ""
        where = Path("/proc") if machine.elsewhere and os.name == "posix" else ROOT
        with subprocess.Popen(command, cwd=where, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
    minutes = (time.monotonic() - started) / 60
    counts = {word: count for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    passed = process.returncode == 0 and "passed" in counts
    found = ", ".join(f"{count} {word}" for word, count in counts.items()) or f"exit code {process.returncode}"
    versions = subprocess.run(
        [python, "-c", "import torch, numpy; print(torch.__version__, numpy.__version__)"],
        capture_output=True,
        text=True,
    ).stdout.split()
    return passed, f"| {name} | {machine.what} | {' / '.join(versions)} | {found} | {minutes:.1f} |"


def main() -> int:
    """Play the machines asked for, and print the table."""
    words, dashes, arguments = sys.argv[1:], "--" in sys.argv, []
    if dashes:
        words, arguments = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"of {', '.join(MACHINES)}")
    parser.add_argument("--list", action="store_true", help="print the machines, and run nothing")
    chosen = parser.parse_args(words)
    if unknown := [name for name in chosen.machines if name not in MACHINES]:
        parser.error(f"no machine is called {', '.join(unknown)}; known are {', '.join(MACHINES)}")
    if chosen.list:
        print("\n".join(f"{name:14}{machine.what}" for name, machine in MACHINES.items()))
        return 0
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.machines or MACHINES:
            if not playable(MACHINES[name]):
                rows.append(f"| {name} | {MACHINES[name].what} | | not on this processor | |")
                continue
            passed, row = run(name, MACHINES[name], arguments, Path(folder))
            failed |= not passed
            rows.append(row)
    print(f"\n{platform.platform()}, Python {platform.python_version()}, {' '.join(arguments) or 'all tests'}\n")
    print("| machine | what | torch / numpy | tests | minutes |\n|---|---|---|---|---|")
    print("\n".join(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
