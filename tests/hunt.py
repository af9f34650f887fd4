"""The whole hunt: bad files, bad arguments, faults and kills, many more than the tests try, and what came of them.

python tests/hunt.py [--inputs 16000] [--kills 50] [--seed 0] [--only files arguments faults kills] [--again] [--few]

It runs the tests that `tests/README.md` lists under "Bad files, arguments, faults", with more of each, one group after
another, and counts what these tests say that they tried. What a group found is kept in runs/hunt.json, so that the same
command, after a break, goes on with the groups that are missing; --again runs them all. --inputs: half are files, half
arguments and options. --kills: of batch generation, as many of trainings, and 80 while saving. --few: what the tests
try by themselves, as in CI. The exit code is 0 only if every test passed.

Columns: refused, an error of a documented kind before anything was lost; whole, good inputs among the bad ones, drawn
or loaded as they should be; other, files that load with other numbers or settings; kills, processes that SIGKILL
ended; lost, finished work that was gone afterwards; corrupt, files with a final name that were not whole; executed,
code that a file ran; failed, tests.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KILLS_OF_BATCHES = "test_killed_and_resumed_is_the_run_that_was_never_stopped"
GROUPS: dict[str, list[str]] = {
    "files": [
        "robustness/test_bad_files.py",
        "io/test_pickles.py",
        "robustness/test_bad_pictures.py",
        "app/test_metadata.py",
        "io/test_checkpoint.py",
    ],
    "arguments": ["robustness/test_bad_arguments.py", "app/test_batch.py"],
    "faults": ["io/test_saving.py", "robustness/test_faults.py", "core/test_numerics.py", "io/test_hub.py"],
    "kills": ["robustness/test_kills.py", f"app/test_batch.py::{KILLS_OF_BATCHES}"],
}
COLUMNS = ("refused", "whole", "other", "kills", "lost", "corrupt", "executed", "failed")


class Tally:
    """A plugin of pytest that adds up what the `tally` of each test holds, by the test's name."""

    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("[")[0].rpartition("::")[2]
        row = self.rows.setdefault(name, Counter())
        row["failed"] += report.failed
        row["tests"] += report.when == "call" and report.passed
        if report.when == "teardown":
            row.update({key: int(value) for key, value in report.user_properties if isinstance(value, int)})
            if report.user_properties:
                print(f"  {name}: {shown(row)}", flush=True)


def shown(row: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.items() if count) or "nothing"


def hunt(group: str, seed: int) -> dict[str, Any]:
    """Run the tests of a group, and return what they counted."""
    tally, began = Tally(), time.monotonic()
    options = ["-q", "-m", "not full", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}"]
    options += ["-o", "addopts=", "-o", "timeout=3600"]
    if group == "arguments":
        options += ["--deselect", f"tests/app/test_batch.py::{KILLS_OF_BATCHES}"]
    code = pytest.main([*options, *(str(HERE / name) for name in GROUPS[group])], plugins=[tally])
    rows = {name: dict(row) for name, row in tally.rows.items()}
    if code and not any(row.get("failed") for row in rows.values()):
        rows["pytest itself"] = {"failed": 1}
    return {"rows": rows, "seconds": round(time.monotonic() - began)}


def table(results: dict[str, Any]) -> str:
    """All counts, a line for each test, and the sums."""
    lines, total = [f"{'test':72}" + "".join(f"{name:>9}" for name in COLUMNS)], Counter[str]()
    for group, result in results.items():
        lines.append(f"{group}, {result['seconds']} s")
        for name, row in result["rows"].items():
            total.update(row)
            if not any(row.get(column) for column in COLUMNS):
                continue
            lines.append(f"  {name[:70]:70}" + "".join(f"{row.get(column, 0):>9}" for column in COLUMNS))
    lines.append(f"{'in all':72}" + "".join(f"{total[column]:>9}" for column in COLUMNS))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=16_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args()
    settings = {"MINISD_SEED": options.seed}
    if not options.few:
        settings |= {"MINISD_HUNT": options.inputs // 2, "MINISD_KILLS": options.kills}
    os.environ |= {name: str(value) for name, value in settings.items()}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = str(HERE.parent)  # this package, whatever is installed
    sys.path.insert(0, str(HERE.parent))
    path = HERE.parent / "runs/hunt.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = kept["results"] if kept.get("settings") == settings else {}
    for group in options.only:
        if options.again or group not in results:
            print(f"== {group}", flush=True)
            results[group] = hunt(group, options.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    print(f"\nseed {options.seed}\n{table(results)}")
    bad = {"lost", "corrupt", "executed", "failed"}
    return int(any(row.get(name) for result in results.values() for row in result["rows"].values() for name in bad))


if __name__ == "__main__":
    sys.exit(main())
