"""Time this checkout beside an older one, in turns in one run: text, guided step, decode, a picture, loading, memory.

    python tools/same_speed.py --base DIR [--repeats 5] [--size 512] [--threads 2] [--model full|tiny]

One process for each checkout holds the same model (by default Stable Diffusion 1.5 with random weights, written for the
run); both are asked alternately. Prints medians, spreads and ratios. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKER = """
import json, resource, sys, time
import torch

torch.set_num_threads(int(sys.argv[3]))
started = time.perf_counter()
from minisd import Sampler, StableDiffusion

sd = StableDiffusion.from_pretrained(sys.argv[1], device="cpu")
loaded = time.perf_counter() - started
side = int(sys.argv[2]) // 8
generator = torch.Generator().manual_seed(0)
latents = torch.randn(1, 4, side, side, generator=generator)
context = sd.encode_text(["", "a fox in the snow"])
settings = {"num_inference_steps": 20, "height": 8 * side, "width": 8 * side, "sampler": Sampler("ddim", "leading")}
tasks = {
    "text": lambda: sd.encode_text(["", "a fox in the snow"]),
    "step": lambda: sd.predict(latents, 481.0, context, 7.5),
    "decode": lambda: sd.decode_to_tensor(latents),
    "picture": lambda: sd("a fox in the snow", seed=1, progress=False, **settings),
}
print(json.dumps({"load": loaded}), flush=True)
for line in sys.stdin:
    if line.strip() == "memory":
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, flush=True)
        continue
    started = time.perf_counter()
    tasks[line.strip()]()
    print(time.perf_counter() - started, flush=True)
"""


class Worker:
    """A process that runs one checkout, and answers how long a task took it."""

    def __init__(self, checkout: Path, folder: str, size: int, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", WORKER, folder, str(size), str(threads)]
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.load = self._read()["load"]

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, task: str) -> float:
        """Seconds of a task, or gigabytes for "memory"."""
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return float(self._read())


def measure(base: Path, folder: str, options: argparse.Namespace) -> None:
    """Ask both checkouts in turns, and print a table."""
    loads: list[list[float]] = [[], []]
    for _ in range(2):  # the files are in memory from the second time on
        for index, checkout in enumerate((base, ROOT)):
            worker = Worker(checkout, folder, options.size, options.threads)
            loads[index].append(worker.load)
            worker.process.kill()
    workers = [Worker(checkout, folder, options.size, options.threads) for checkout in (base, ROOT)]
    rows = {"import and load": loads}
    for task in options.tasks:
        for worker in workers:
            worker.ask(task)  # warms up
        rows[task] = [[], []]
        for repeat in range(options.repeats):
            for index in (0, 1) if repeat % 2 == 0 else (1, 0):
                rows[task][index].append(workers[index].ask(task))
    print(f"{'':18}{'base':>24}{'here':>24}{'ratio':>9}{'pairs':>18}")
    for name, (old, new) in rows.items():
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        texts = [f"{statistics.median(x):.4f} ({min(x):.4f}–{max(x):.4f})" for x in (old, new)]
        ratio = statistics.median(new) / statistics.median(old)
        print(f"{name:18}{texts[0]:>24}{texts[1]:>24}{ratio:>9.3f}{f'{min(ratios):.3f}–{max(ratios):.3f}':>18}")
    memory = [worker.ask("memory") for worker in workers]
    print(f"{'peak memory, GB':18}{memory[0]:>24.3f}{memory[1]:>24.3f}{memory[1] / memory[0]:>9.3f}")
    for worker in workers:
        worker.process.kill()


def main() -> None:
    """Read the options, write the model, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", choices=("full", "tiny"), default="full")
    parser.add_argument("--tasks", nargs="+", default=["text", "step", "decode"])
    options = parser.parse_args()
    if options.model == "tiny":
        measure(options.base.resolve(), str(options.base.resolve() / "minisd/assets/tiny"), options)
        return
    sys.path.insert(0, str(ROOT))
    from minisd.bench.compare import random_weights

    with random_weights() as folder:
        measure(options.base.resolve(), str(folder), options)


if __name__ == "__main__":
    main()
