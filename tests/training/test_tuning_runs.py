"""How tuning runs: pieces of a batch, what is saved and drawn when, devices, and the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import module, together
from PIL import Image
from small_training import count_lines
from torch import nn

from minisd import StableDiffusion
from minisd.app.cli import main
from minisd.training import loop, tuning_commands
from minisd.training.adapting import LoRATask
from minisd.training.loop import Options, Trainer, train
from minisd.training.tuning_options import LoRAOptions, Tuning


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two shapes, named after their folder or captioned beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "2_a thing").mkdir()
    for index, size in enumerate(((32, 32), (64, 32), (32, 32), (64, 32))):
        Image.new("RGB", size, ("red", "blue", "green", "white")[index]).save(folder / f"2_a thing/{index}.png")
    (folder / "2_a thing/0.txt").write_text("a thing on snow")
    return folder


class Clocked:
    """A task of one weight on a clock of its own: a step takes a second, a sheet five."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.model = clock, nn.Linear(1, 1)
        self.sheets: list[float] = []
        self.exports: list[str] = []

    def loss(self, *_: Any) -> tuple[torch.Tensor, dict[str, float]]:
        self.clock[0] += 1
        return self.model(torch.ones(1, 1)).square().sum(), {}

    def sheet(self, model: nn.Module) -> None:
        self.sheets.append(self.clock[0])
        self.clock[0] += 5

    def export(self, model: nn.Module, folder: Path) -> None:
        self.exports.append(folder.name)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop, "draw_curves", lambda lines, path: path.write_text(""))
    return Clocked(clock)


def test_sheets_take_at_most_a_tenth_of_the_time(clocked, tmp_path):
    train(clocked, Options(tmp_path, steps=200, batch=1, save_minutes=1 / 60))
    first, *later, last = clocked.sheets
    assert first <= 2 and last == clocked.clock[0] - 5 and 2 <= len(later) <= 5
    between = [b - a for a, b in zip(clocked.sheets, clocked.sheets[1:-1], strict=False)]
    assert min(between) >= 10 * 5


@pytest.mark.parametrize(("every", "drawn"), [(0, 0), (4, 3), (5, 2)])
def test_saves_and_sheets_every_so_many_steps(clocked, tmp_path, every, drawn):
    train(clocked, Options(tmp_path, steps=10, batch=1, save_every=3, sheet_every=every, keep=True))
    assert len(clocked.sheets) == drawn  # the last one at the end
    kept = [name for step in (3, 6, 9, 10) for name in ("export", f"export-{step:06d}")]
    assert clocked.exports == kept


def test_pieces_of_a_batch_make_the_step_of_the_whole(small_model, pictures, tmp_path):
    tuning = Tuning(flip=True, caption_dropout=0.3, noise_offset=0.1, buckets=True)
    found = []
    for pieces in (1, 2, 4):
        sd = StableDiffusion.from_pretrained(small_model, device="cpu")
        task = LoRATask(sd, pictures, 2, options=LoRAOptions(text_encoder=True, text_factor=0.5), tuning=tuning)
        trainer = Trainer(task, Options(tmp_path, steps=3, batch=4, warmup=1, lr=1e-2, accumulate=pieces))
        losses = [trainer.advance(0)["loss"]]
        gradients = torch.cat([p.grad.flatten() for p in task.model.parameters() if p.grad is not None])
        losses += [trainer.advance(step / 3)["loss"] for step in (1, 2)]
        rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
        assert len(rates) == 2 and rates[0] == pytest.approx(rates[1] / 2)
        found.append((losses, gradients))
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradients, found[0][1], rtol=0, atol=1e-5 * float(gradients.abs().max()))


def test_every_process_of_torchrun_has_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(StableDiffusion, "from_pretrained", lambda model, **options: taken.append(options["device"]))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        tuning_commands.base(None, None)
        tuning_commands.base(None, "cpu")
    assert taken == ["cuda:0", "cpu", "cuda:1", "cpu"]


def test_optimizer_that_fits(monkeypatch):
    """AdamW takes 14.0 GB for the UNet of Stable Diffusion 1.5, and adafactor 8.9 GB."""
    cuda = torch.device("cuda:0")
    for memory, expected in ((12e9, "adafactor"), (16e9, "adafactor"), (24e9, "adamw")):
        card = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert tuning_commands.default_optimizer("full", cuda) == expected
        assert tuning_commands.default_optimizer("lora", cuda) == "adamw"
    assert tuning_commands.default_optimizer("full", torch.device("cpu")) == "adamw"


def test_what_is_not_installed_is_named(clocked, tmp_path):
    options = Options(tmp_path, steps=1, batch=1)
    for library, more in (("tensorboard", {"tensorboard": True}), ("bitsandbytes", {"optimizer": "adamw8bit"})):
        if find_spec(library) is None:
            with pytest.raises(ValueError, match=f"pip install {library}"):
                train(clocked, replace(options, **more))  # type: ignore[arg-type]


def test_options_that_make_no_sense(tmp_path):
    for more, message in (
        ({"caption_dropout": 2.0}, "caption_dropout=2"), ({"min_snr": 0.0}, "min_snr=0"),
        ({"class_prompt": "a dog"}, "give both or neither"), ({"noise_offset": -1.0}, "noise_offset=-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Tuning(**more)  # type: ignore[arg-type]
    for choices, message in (
        ({"batch": 6, "accumulate": 4}, "does not divide into 4 pieces"), ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"bfloat16": True, "float16": True}, "exclude each other"), ({"sheet_every": -1}, "sheet_every=-1"),
        ({"schedule": "step"}, "schedule='step'"), ({"save_every": 0}, "save_every=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Options(tmp_path, steps=1, **choices)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(small_model, pictures, tmp_path):
    """With class pictures, which the first process draws while the other waits."""
    classes = ["--class-prompt", "a fox", "--class-count", "2", "--flip", "--caption-dropout", "0.3"]
    run = ["lora", "--model", str(small_model), "--device", "cpu", "--pictures", str(pictures), "--steps", "3"]
    run += ["--batch", "4", "--sheet-every", "0", *classes]
    places = {name: ["--output", str(tmp_path / name), "--class-pictures", f"{tmp_path / name}-class"] for name in "12"}
    assert main(["train", *run, *places["1"]]) == 0
    one, other = together(2, module, "minisd.training.commands", *run, *places["2"])
    assert (one.code, other.code) == (0, 0), one.err[-2000:] + other.err[-2000:]
    assert one.out.count("pytorch_lora_weights.safetensors") == 1 and other.out == ""
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        for name in "12"
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 3
    assert max(losses[0]) - min(losses[0]) > 1e-3


def test_commands(small_model, pictures, tmp_path, capsys, monkeypatch):
    """Each writes what it says, and `full` a model that loads."""
    monkeypatch.setattr(loop, "draw_curves", count_lines)
    common = ["--model", str(small_model), "--device", "cpu", "--pictures", str(pictures), "--steps", "2", "--batch"]
    common += ["2", "--precision", "bfloat16", "--checkpointing", "--warmup", "0"]
    classes = ["--class-pictures", str(tmp_path / "class"), "--class-prompt", "a fox", "--class-count", "2"]
    for command, *more, written in (
        ("lora", "--layout", "kohya", "--alpha", "4", "--text-encoder", "--buckets", "--flip", "lora.safetensors"),
        ("dreambooth", "--caption", "a red thing", *classes, "--sheet-every", "0", "model"),
        ("full", "--text-encoder", "--optimizer", "adafactor", "--crop", "random", "--keep", "model"),
    ):
        output = tmp_path / command
        assert main(["train", command, *common, "--output", str(output), *more]) == 0
        assert capsys.readouterr().out.splitlines() == [str(output / "export" / written)]
        assert (output / "sheet-000002.png").exists() == (command != "dreambooth")
    assert (tmp_path / "full/export-000002/model/unet/config.json").exists()
    tuned = StableDiffusion.from_pretrained(tmp_path / "full/export/model", device="cpu")
    before = StableDiffusion.from_pretrained(small_model, device="cpu")
    for part in ("unet", "text_encoder"):
        ours, theirs = (dict(getattr(sd, part).named_parameters()) for sd in (tuned, before))
        assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], theirs[name]) for name in ours)
    before.load_lora(tmp_path / "lora/export/lora.safetensors")
    assert main(["train", "dreambooth", *common, "--output", str(tmp_path / "x")]) == 2
    assert "needs a --caption" in capsys.readouterr().err
