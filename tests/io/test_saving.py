"""Faults while saving: every file is whole, old or new, and nothing half-written has its name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_pickles import archive, call
from hunt_files import Hunt
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from minisd import StableDiffusion
from minisd.app.cli import main
from minisd.features.adapters import layers_of
from minisd.io.adapter_files import save_lora
from minisd.io.atomic import save_atomically
from minisd.io.checkpoint import CheckpointError, load
from minisd.io.tensors import read_pickle
from minisd.lora import LoRA, LowRank
from minisd.pipeline.metadata import read_parameters, save_png
from minisd.training.adapting import EXAMPLES
from minisd.training.loop import Options, Trainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


SAVERS = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from PIL import Image
from minisd import StableDiffusion
from minisd.features.adapters import layers_of
from minisd.lora import LoRA, LowRank
from minisd.pipeline.metadata import save_png
from minisd.io.adapter_files import save_lora
from minisd.io.atomic import save_atomically

torch.set_num_threads(1)
source, place, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sd = StableDiffusion.from_pretrained(source, device="cpu")
lora = LoRA({name: LowRank(layer, 2) for name, layer in layers_of({"unet": sd.unet}).items()})

def fill(value):
    for part in (sd.unet, sd.text_encoder, sd.autoencoder, lora):
        for parameter in part.parameters():
            parameter.data.fill_(value)

def save(value):
    fill(float(value))
    sd.save_pretrained(place / "model")
    save_lora(lora, place / "style.safetensors")
    save_atomically(lambda path: torch.save({"x": torch.full((50_000,), float(value))}, path), place / "checkpoint.pt")
    save_png(Image.effect_noise((200, 200), 50), place / "fox.png", str(value), overwrite=True)
    save_png(Image.effect_noise((200, 200), 50), place / "cat.png", str(value))
"""
KILLED = (
    SAVERS
    + """
rng = random.Random(0)
save(0)
for number in range(rounds):
    child = os.fork()
    if not child:
        for value in range(1, 1000):
            save(value)
        os._exit(1)
    time.sleep(rng.uniform(0.0, 0.6))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print("killed", flush=True)
    sys.stdin.readline()  # the test looks at what is there
"""
)
TOGETHER = (
    SAVERS
    + """
children = []
for value in (1, 2, 3):
    children.append(os.fork())
    if not children[-1]:
        try:
            for _ in range(rounds):
                save(value)
            os._exit(0)
        finally:
            os._exit(1)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
)
TEMPORARY = re.compile(
    r"\.(model|style\.safetensors|checkpoint\.pt)\.[0-9a-f]{8}(\.old)?\.tmp|\.[0-9a-f]{32}(\.png|\.tmp)"
)


def values_in(place: Path) -> set[float]:
    """All numbers in the weights of a model, which was filled with one."""
    files = [load_file(next((place / part).glob("*.safetensors"))) for part in ("text_encoder", "vae", "unet")]
    return {value for file in files for x in file.values() for value in (float(x.min()), float(x.max()))}


def check_whole(place: Path) -> None:
    assert len(values_in(place / "model")) == 1
    assert (place / "model/notes.txt").read_text() == "kept"
    lora = load_file(place / "style.safetensors")
    assert all(len(value.unique()) == 1 for value in lora.values())
    assert len(read_pickle(place / "checkpoint.pt")["x"].unique()) == 1
    for path in place.glob("[fc]*.png"):
        assert Image.open(path).size == (200, 200) and (read_parameters(path) or "").isdecimal()


def test_killed_while_saving(small_model, tmp_path, record_property):
    """SIGKILL at 10 moments: each file is whole, all parts of the model are of one version, the rest is named so."""
    place = Path(shutil.copytree(small_model, tmp_path / "place/model")).parent
    (place / "model/notes.txt").write_text("kept")
    arguments = [sys.executable, "-c", KILLED, str(small_model), str(place), "10"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    left = kills = 0
    with subprocess.Popen(arguments, **pipes) as process:  # type: ignore[call-overload]
        while process.stdout.readline() == "killed\n":
            kills += 1
            if not (place / "model").exists():  # killed between two renames: both versions are there, whole
                old, new = sorted(place.glob(".model.*"), key=lambda path: "old" not in path.name)
                assert len(values_in(old)) == len(values_in(new)) == 1
                old.rename(place / "model")
            check_whole(place)
            hidden = [path for path in place.iterdir() if path.name.startswith(".")]
            assert all(TEMPORARY.fullmatch(path.name) for path in hidden)
            left += len(hidden)
            for path in hidden:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            process.stdin.write("\n")
            process.stdin.flush()
    assert load(place / "model")
    assert process.returncode == 0 and left > 2, "hardly any kill met a save"
    record_property("kills", kills)


def test_killed_at_every_step_of_replacing_a_model(tmp_path, tmp_path_factory, record_property):
    """SIGKILL before each change to the file system in turn, instead of at any moment."""
    sd = Hunt(tmp_path_factory.mktemp("hunt")).model

    def save(value: float, fatal: int) -> int:
        """Save a model filled with a number, in a process that dies at the fatal change; return its exit status."""
        child = os.fork()
        if not child:
            left = [fatal]

            def step(event: str, arguments: tuple[Any, ...]) -> None:
                changes = event in ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
                if changes or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)

            try:
                for part in (sd.unet, sd.text_encoder, sd.autoencoder):
                    for parameter in part.parameters():
                        parameter.data.fill_(value)
                sys.addaudithook(step)
                sd.save_pretrained(tmp_path / "model")
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(child, 0)[1]

    assert save(0, 0) == 0
    (tmp_path / "model/notes.txt").write_text("kept")
    before, seen = 0.0, {"old": 0, "new": 0, "between": 0}
    for fatal in range(1, 1000):
        status = save(float(fatal), fatal)
        if not (tmp_path / "model").exists():
            seen["between"] += 1
            (old,) = tmp_path.glob(".model.*.old.tmp")
            (new,) = set(tmp_path.glob(".model.*.tmp")) - {old}
            assert values_in(old) == {before} and values_in(new) == {float(fatal)}
            new.rename(tmp_path / "model")
        (value,) = values_in(tmp_path / "model")
        assert value in (before, float(fatal)) and (tmp_path / "model/notes.txt").read_text() == "kept"
        seen["new" if value == fatal else "old"] += 1
        before = value
        for path in tmp_path.glob(".*"):
            assert TEMPORARY.fullmatch(path.name)
            shutil.rmtree(path)
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert load(tmp_path / "model") and seen["between"] == 1 and seen["old"] > 20 and seen["new"] > 10, seen
    record_property("kills", fatal - 1)


def test_several_save_to_one_place(small_model, tmp_path):
    """Three processes, four times each: the last one wins, whole, and pictures without --overwrite are all there."""
    place = Path(shutil.copytree(small_model, tmp_path / "place/model")).parent
    (place / "model/notes.txt").write_text("kept")
    subprocess.run([sys.executable, "-c", TOGETHER, str(small_model), str(place), "4"], env=ENVIRONMENT, check=True)
    check_whole(place)
    names = {path.name for path in place.iterdir()}
    cats = {"cat.png", *(f"cat-{i}.png" for i in range(2, 13))}
    wanted = {"model", "style.safetensors", "checkpoint.pt", "fox.png"} | cats
    assert names == wanted


def in_child(work: Callable[[], None], user: int | None = None, size: int | None = None) -> str:
    """Run something in a forked process, as another user or with a limit to the size of files; return its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if user is not None and os.geteuid() == 0:
                os.setuid(user)
            if size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                work()
                answer = "done"
            except BaseException as error:
                answer = f"{type(error).__mro__} {error}"
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def savers(small_model: Path) -> dict[str, Callable[[Path], Any]]:
    """By the name that each is given, everything that writes for good."""
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    lora = LoRA({name: LowRank(layer, 64) for name, layer in layers_of({"unet": sd.unet}).items()})
    picture, numbers = Image.effect_noise((200, 200), 50), torch.rand(50_000)
    return {
        "model": sd.save_pretrained,
        "style.safetensors": lambda path: save_lora(lora, path),
        "checkpoint.pt": lambda path: save_atomically(lambda temporary: torch.save(numbers, temporary), path),
        "fox.png": lambda path: save_png(picture, path, "text", overwrite=True),
        "cat.png": lambda path: save_png(picture, path, "text"),
    }


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_files_whole(savers, tmp_path):
    for name, save in savers.items():
        for existing in (False, True):
            place = tmp_path / f"{name}-{existing}"
            place.mkdir()
            if existing:
                save(place / name)
            before = contents(place)
            assert bool(before) == existing
            answer = in_child(lambda save=save, place=place, name=name: save(place / name), size=10_000)
            assert "OSError" in answer, (name, answer)
            assert contents(place) == before and len(os.listdir(place)) == existing, name


def test_no_permission_leaves_the_old_files_whole(savers):
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(__import__("tempfile").TemporaryDirectory()))
        place.chmod(0o755)
        for name, save in savers.items():
            save(place / name)
        before = contents(place)
        place.chmod(0o555)
        for name, save in savers.items():
            answer = in_child(lambda save=save, name=name: save(place / name), user=65534)
            assert "PermissionError" in answer and str(place) in answer, (name, answer)
        assert contents(place) == before and len(os.listdir(place)) == len(savers)
        place.chmod(0o755)


def test_targets_that_are_links_or_folders(savers, tmp_path):
    for name, save in savers.items():
        (tmp_path / "real").mkdir()
        target, real = tmp_path / name, tmp_path / "real" / name
        save(real)
        before = contents(tmp_path / "real")
        target.symlink_to(real)
        save(target)
        if name == "model":  # the link stays, and what it names is replaced
            assert target.is_symlink() and load(target) and sorted(os.listdir(tmp_path)) == [name, "real"]
        elif name == "cat.png":  # a name that is taken, so the next
            assert target.is_symlink() and (tmp_path / "cat-2.png").is_file()
        else:  # the link is replaced, and what it named stays
            assert not target.is_symlink() and target.is_file()
        assert name == "model" or contents(tmp_path / "real") == before
        shutil.rmtree(tmp_path / "real")
        target.unlink()
        if name != "model":
            target.mkdir()
            (target / "note.txt").write_text("kept")
            with pytest.raises(OSError) if name != "cat.png" else contextlib.nullcontext():
                save(target)
            assert (target / "note.txt").read_text() == "kept"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_saved_files_can_be_read_by_others(savers, tmp_path):
    """With the permissions that the umask gives, though some writers create them for the owner alone."""
    (tmp_path / "plain").touch()
    for name, save in savers.items():
        save(tmp_path / name)
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {
        (tmp_path / "plain").stat().st_mode
    }


class Line:
    """The smallest training there is."""

    def __init__(self, width: int = 3) -> None:
        self.model = nn.Linear(width, 1)

    def loss(self, *_: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return self.model(torch.ones(1, self.model.in_features)).square().sum(), {}

    def sheet(self, model: nn.Module) -> None: ...

    def export(self, model: nn.Module, folder: Path) -> None: ...


def test_damaged_training_checkpoints_are_not_resumed(small_model, tmp_path, capsys):
    options = Options(tmp_path, steps=2)
    trainer = Trainer(Line(), options)
    trainer.run()
    path, resumed = tmp_path / "checkpoint.pt", replace(options, resume=True)
    good = path.read_bytes()
    again = Trainer(Line(), resumed)
    assert again.step == 2 and torch.equal(again.task.model.weight, trainer.task.model.weight)
    stream = io.BytesIO()
    torch.save({"model": {}}, stream)
    for content in (good[:-100], b"", b"no pickle", stream.getvalue(), archive(call("posix", "system", "true"))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="(?s)checkpoint.pt cannot be resumed .*delete it"):
            Trainer(Line(), resumed)
    places = ["--pictures", str(EXAMPLES), "--model", str(small_model), "--output", str(tmp_path)]
    words = ["--token", "<it>", "--word", "unicorn", "--initial", "fox", "--steps", "3", "--resume"]
    assert main(["train", "inversion", *places, *words]) == 2
    assert "checkpoint.pt cannot be resumed" in capsys.readouterr().err
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="(?s)cannot be resumed .*size mismatch"):
        Trainer(Line(4), resumed)
    (tmp_path / "losses.jsonl").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        Trainer(Line(), resumed)
