"""The hunt: damaged files, attacks of every kind, kills, and what came of them.

python tests/hunt.py [--sample] [--seed 0] [--only KIND …]

In full it makes 12,000 damaged files (`hunt_files.py`) and 8,400 attacks (`attacks.py`), a few minutes on two cores,
then runs the tests of bad files, arguments and faults with more than 200 kills, which takes most of an hour. --sample:
a few of each kind, without the tests, as in CI. The exit code is 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this package, whatever is installed

from attacks import KINDS  # noqa: E402
from hunt_files import hunt  # noqa: E402

FILES, ATTACKS, KILLS = 12_000, 8_400, 70  # kills: of batches, and as many of trainings; those of saves are fixed
SAMPLE = 120  # damaged files, and attacks before each kind takes its share
TESTS = ["robustness", "io", "app/test_batch.py", "app/test_metadata.py", "app/test_from_image.py", "app/test_web.py"]


class Tally:
    """A plugin of pytest that counts tests, and the kills that they record."""

    def __init__(self) -> None:
        self.found = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.found[f"FAILED {report.nodeid}"] += 1
        self.found["passed"] += report.when == "call" and report.passed
        if report.when == "teardown":
            self.found["kills"] += sum(int(value) for name, value in report.user_properties if name == "kills")


def run_tests(seed: int) -> Counter[str]:
    """Run the tests of bad files, arguments and faults, with many kills."""
    os.environ |= {"MINISD_KILLS": str(KILLS), "MINISD_SEED": str(seed), "PYTHONPATH": str(HERE.parent)}
    tally = Tally()
    options = ["-q", "-m", "not full", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "timeout=3600"]
    code = pytest.main([*options, "-n", "0", *(str(HERE / name) for name in TESTS)], plugins=[tally])
    if code and not any(name.startswith("FAILED") for name in tally.found):
        tally.found[f"FAILED pytest {code}"] += 1
    return tally.found


def run(kind: str, sample: bool, seed: int) -> Counter[str]:
    """Run one kind, and return how many of its cases ended in which way."""
    if kind == "files":
        return hunt(SAMPLE if sample else FILES, seed)
    if kind == "tests":
        return run_tests(seed)
    attack, share = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        return attack(max(2, round(share * (SAMPLE if sample else ATTACKS))), random.Random(seed), Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["files", *KINDS, "tests"]
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    options = parser.parse_args(arguments)
    total, rows, bad = Counter[str](), [], []
    for kind in options.only:
        if kind == "tests" and options.sample:
            continue
        started = time.monotonic()
        found = run(kind, options.sample, options.seed)
        bad += [f"{kind}: {name}" for name in found if name.startswith(("HOLE", "FAILED"))]
        failed = sum(count for name, count in found.items() if name.startswith(("HOLE", "FAILED")))
        inputs = 0 if kind == "tests" else found.total()
        total.update(inputs=inputs, failed=failed, kills=found["kills"])
        ends = ", ".join(f"{count} {name}" for name, count in sorted(found.items()) if count)
        rows.append(f"{kind:12}{inputs:>8}{failed:>8}  {ends[:200]} ({time.monotonic() - started:.0f} s)")
        print(rows[-1], flush=True)
    print(f"\n{'kind':12}{'inputs':>8}{'failed':>8}", *rows, sep="\n")
    print(f"{'in all':12}{total['inputs']:>8}{total['failed']:>8}  {total['kills']} kills", *bad, sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
