"""Kills a small training again and again, at random points, and checks that nothing was lost each time.

In turn a run is killed by another process after a random time, in the middle of writing the checkpoint, and just before
or just after a finished file takes its place. Runs are forks of this process.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from small_training import assert_same_run, count_lines, small_task

from minisd import StableDiffusion
from minisd.training import loop
from minisd.training.adapting import InversionTask, LoRATask
from minisd.training.fine_tuning import FullTask
from minisd.training.loop import Options, Task, train
from minisd.training.tuning_options import LoRAOptions, Tuning

STEPS = 4
# a batch of tuning is computed in two pieces
MORE: dict[str, dict[str, Any]] = {
    "lora": {"accumulate": 2},
    "full": {"accumulate": 2, "bfloat16": True},
    "dreambooth": {"float16": True, "optimizer": "adafactor"},
}
KINDS = ("after a random time", "in the middle of writing the checkpoint", "around the move of a file")


def make_task(part: str, data: Path, model: Path, output: Path) -> Task:
    if part in ("autoencoder", "clip", "unet"):
        return small_task(part, data, output)
    sd = StableDiffusion.from_pretrained(model, device="cpu")
    if part == "lora":
        tuning = Tuning(flip=True, caption_dropout=0.5, min_snr=5.0, noise_offset=0.1)
        return LoRATask(sd, data, rank=2, options=LoRAOptions(text_encoder=True), tuning=tuning)
    if part == "inversion":
        return InversionTask(sd, data, "<it>", "thing", "fox", tuning=Tuning(crop="random"))
    if part == "full":
        return FullTask(sd, data, text_encoder=True, tuning=Tuning(checkpointing=True))
    classes = {"class_pictures": data.parent / "class", "class_prompt": "a fox", "class_count": 3}
    return FullTask(sd, data, tuning=Tuning(**classes))  # type: ignore[arg-type]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(number: int, share: float) -> None:
    """Let the numberth `torch.save` write a part of its bytes and end the process."""
    save, calls = torch.save, Counter[str]()

    def half(state: Any, path: Path) -> None:
        calls["save"] += 1
        if calls["save"] < number:
            return save(state, path)
        whole = io.BytesIO()
        save(state, whole)
        path.write_bytes(whole.getvalue()[: int(share * whole.tell())])
        die()

    torch.save = half  # type: ignore[assignment]


def die_while_moving(number: int, before: bool) -> None:
    """End the process just before, or just after, the numberth file takes its place."""
    replace, calls = os.replace, Counter[str]()

    def moved(*paths: Any) -> None:
        calls["replace"] += 1
        if before and calls["replace"] == number:
            die()
        replace(*paths)
        if calls["replace"] == number:
            die()

    os.replace = moved  # type: ignore[assignment]


def run(part: str, data: Path, model: Path, output: Path, kind: int | None, rng: random.Random, length: float) -> bool:
    """One process that begins or resumes the training; whether it reached the end."""
    begun, told = os.pipe()
    number, share, delay = rng.randint(1, 3 * STEPS), rng.random(), rng.uniform(0, length)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            task = make_task(part, data, model, output)
            task.sheet = lambda model: None  # type: ignore[method-assign]
            loop.draw_curves = count_lines
            resume = (output / "checkpoint.pt").exists()
            more = MORE.get(part, {})
            options = Options(output, steps=STEPS, batch=4, lr=1e-3, warmup=2, save_minutes=0.0, resume=resume, **more)
            if kind == 1:
                die_while_saving(1 + number // 3, share)
            if kind == 2:
                die_while_moving(number, before=share < 0.5)
            os.write(told, b"!")
            train(task, options)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(told)
    os.read(begun, 1)
    os.close(begun)
    if kind == 0:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "the training failed, and nobody had killed it"
    return True


@contextmanager
def counted(found: Counter[str], name: str) -> Iterator[None]:
    """Count, under this name, an error in this block, which goes on its way."""
    try:
        yield
    except Exception:
        found[name] += 1
        raise


def check(output: Path, before: int, found: Counter[str]) -> int:
    """After a kill: all is whole, the checkpoint no older than before, the losses as long. Returns its step."""
    path, losses = output / "checkpoint.pt", output / "losses.jsonl"
    with counted(found, "corrupt"):
        step = torch.load(path, weights_only=True)["step"] if path.exists() else 0
        lines = [json.loads(line)["loss"] for line in losses.read_text().splitlines()] if losses.exists() else []
    with counted(found, "lost"):
        assert before <= step <= min(STEPS, len(lines)), f"step {before} was saved, {step} is, {len(lines)} losses"
    return int(step)


def compare(mine: Path, whole: Path) -> None:
    """The end of a run that was killed against that of the unbroken one: the same bits, and no litter."""
    assert_same_run(mine, whole)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (mine, whole)]
    assert names[0] == names[1], names
    for name in names[0]:
        if name.startswith("export") and (mine / name).is_file():
            assert (mine / name).read_bytes() == (whole / name).read_bytes(), name


def kill_again_and_again(part: str, data: Path, model: Path, output: Path, kills: int, seed: int) -> None:
    """Print what was found, as JSON.

    part: autoencoder, clip or unet, whose data are rendered scenes; or lora, inversion, dreambooth or full, which tune
    the small model in this folder on a folder of pictures.
    """
    rng, began = random.Random(seed), time.monotonic()
    assert run(part, data, model, output / "whole", None, rng, 0)
    length, done, found = time.monotonic() - began, Counter[str](), Counter(ends=0, lost=0, corrupt=0)
    broken, step = output / "broken", 0
    try:
        while sum(done.values()) < kills or broken.exists():
            enough = sum(done.values()) == kills
            kind = (sum(done.values()) + found["ends"]) % len(KINDS)
            if run(part, data, model, broken, None if enough else kind, rng, length):
                with counted(found, "lost"):
                    compare(broken, output / "whole")
                shutil.rmtree(broken)
                found["ends"], step = found["ends"] + 1, 0
            else:
                done[KINDS[kind]] += 1
                step = check(broken, step, found)
    finally:
        print(json.dumps({"kills": done} | found))
