"""Tuning a model: losses and gradients are those of diffusers' example scripts, and files act the same there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from models import difference
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minisd import StableDiffusion
from minisd.schedule import Schedule
from minisd.training.adapting import Adapting, InversionTask, LoRATask
from minisd.training.fine_tuning import FullTask
from minisd.training.loop import Options, learning_rate
from minisd.training.objectives import Batch
from minisd.training.tuning_options import LoRAOptions, Tuning

NEAR = 1e-5  # of the loss, and of the largest gradient
KINDS = ["epsilon", "v_prediction"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, color in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (32, 32), color).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a thing on snow {index}")
    return folder


def load(small_model: Path, kind: str = "epsilon") -> StableDiffusion:
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    sd.schedule = Schedule(replace(sd.config.schedule, prediction_type=kind))  # type: ignore[arg-type]
    return sd


class Theirs:
    """The parts that diffusers' examples/ load, and the formulas that they share."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        config = dict(DDPMScheduler.load_config(folder, subfolder="scheduler")) | {"prediction_type": kind}
        self.scheduler = DDPMScheduler.from_config(config)
        for part in (self.unet, self.text):
            part.requires_grad_(False).train()

    def context(self, captions: list[str]) -> Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text(tokens.input_ids)[0]

    def loss(self, batch: Batch, gamma: float | None = None, prior_weight: float | None = None) -> Tensor:
        """As in train_text_to_image.py and, with a prior_weight, in train_dreambooth.py."""
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = batch.noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        prediction = self.unet(noisy, batch.timesteps, self.context(batch.captions), return_dict=False)[0]
        if prior_weight is not None:
            mine, prior = prediction.chunk(2)
            target, prior_target = target.chunk(2)
            return F.mse_loss(mine, target) + prior_weight * F.mse_loss(prior, prior_target)
        if gamma is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        snr = compute_snr(self.scheduler, batch.timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            snr = snr + 1
        weights = torch.stack([snr, gamma * torch.ones_like(batch.timesteps)], dim=1).min(dim=1)[0] / snr
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])
        return (loss * weights).mean()


def in_float64(task: Adapting, theirs: Theirs, batch: Batch) -> Batch:
    """Make both sides compute in float64, so that only formulas can differ, not the order of sums on a processor."""
    for part in (task.sd.unet, task.sd.text_encoder, task.model, theirs.unet, theirs.text):
        part.double()
    task.contexts = {caption: context.double() for caption, context in task.contexts.items()}
    return replace(batch, latents=batch.latents.double(), noise=batch.noise.double())


def check(task: Adapting, theirs: Theirs, mine: dict[str, Tensor], other: dict[str, Tensor], **how: Any) -> None:
    """The loss and all gradients of one batch on both sides."""
    batch = in_float64(task, theirs, task.batch(3, range(12, 16), slice(0, 4)))
    loss, _ = task.loss_of(batch)
    expected = theirs.loss(batch, **how)
    loss.backward()
    expected.backward()
    loss, expected = loss.detach(), expected.detach()
    apart = abs(float(loss) - float(expected))
    assert mine.keys() == other.keys()
    pairs = {name: (mine[name].grad, other[name].grad) for name in mine}
    largest = max(float(theirs_.abs().max()) for _, theirs_ in pairs.values() if theirs_ is not None)
    worst = max(float((one - two).abs().max()) for one, two in pairs.values() if one is not None and two is not None)
    print(f"loss {float(loss):.4f}, apart {apart:.1e}; gradients up to {largest:.1e}, apart {worst / largest:.1e}")
    assert float(loss) > 0.01 and largest > 1e-4 and all(one is not None for one, _ in pairs.values())
    assert apart <= NEAR and worst <= NEAR * largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [None, 0.1])  # small, so that it counts at most timesteps
def test_full(small_model, pictures, kind, gamma):
    sd, theirs = load(small_model, kind), Theirs(small_model, kind)
    tuning = Tuning(min_snr=gamma, noise_offset=0.1, caption_dropout=0.5, checkpointing=True)
    task = FullTask(sd, pictures, text_encoder=True, tuning=tuning)
    theirs.unet.requires_grad_(True)
    check(task, theirs, dict(sd.unet.named_parameters()), dict(theirs.unet.named_parameters()), gamma=gamma)
    assert any(parameter.grad.any() for parameter in sd.text_encoder.parameters())


def test_dreambooth(small_model, pictures, tmp_path):
    """With pictures of the class, drawn by the model itself."""
    sd, theirs = load(small_model), Theirs(small_model, "epsilon")
    Image.new("RGB", (40, 32), "gray").save(tmp_path / "photo.png")
    tuning = Tuning(class_pictures=tmp_path, class_prompt="a fox", class_count=4, prior_weight=0.7)
    task = FullTask(sd, pictures, tuning=tuning)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"class-00000{i}.png" for i in range(3)), "photo.png"]
    theirs.unet.requires_grad_(True)
    check(task, theirs, dict(sd.unet.named_parameters()), dict(theirs.unet.named_parameters()), prior_weight=0.7)
    assert task.batch(0, range(4), slice(1, 3)).captions[2:] == ["a fox"] * 2


def randomize(task: LoRATask) -> None:
    torch.manual_seed(5)
    for _, update in task.model.items():
        nn.init.normal_(update.lora_B, std=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_lora(small_model, pictures, kind):
    """Of the UNet and the text encoder, as peft computes it."""
    sd, theirs = load(small_model, kind), Theirs(small_model, kind)
    options = LoRAOptions(alpha=6, text_encoder=True)
    task = LoRATask(sd, pictures, 2, "attention", options=options, tuning=Tuning(checkpointing=True))
    randomize(task)
    theirs.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    # by peft itself: transformers' own method may ask for a peft that is not yet published
    words = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    inject_adapter_in_model(words, theirs.text)
    mine, other = {}, {}
    modules = {"unet": dict(theirs.unet.named_modules()), "text_encoder": dict(theirs.text.named_modules())}
    for name, update in task.model.items():
        part, _, layer = name.partition(".")
        known = modules[part]
        module = known[layer] if layer in known else known[layer.removeprefix("text_model.")]
        for factor in ("lora_A", "lora_B"):
            parameter = getattr(module, factor)["default"].weight
            parameter.data.copy_(getattr(update, factor).detach())
            mine[f"{name}.{factor}"], other[f"{name}.{factor}"] = getattr(update, factor), parameter
    assert any(name.startswith("text_encoder") for name in mine)
    check(task, theirs, mine, other)


def test_inversion(small_model, pictures):
    """As in textual_inversion.py: all rows but the new ones keep still, so their gradients do not count."""
    sd, theirs = load(small_model), Theirs(small_model, "epsilon")
    task = InversionTask(sd, pictures, "<it>", "thing", "fox", vectors=2)
    nn.init.normal_(task.model.vectors, std=0.02)
    theirs.tokenizer.add_tokens(["<it>", "<it>_1"])
    theirs.text.resize_token_embeddings(len(theirs.tokenizer), mean_resizing=False)
    table = theirs.text.get_input_embeddings().weight
    table.data[-2:] = task.model.vectors.detach()
    table.requires_grad_(True)
    batch = in_float64(task, theirs, task.batch(1, range(4, 8), slice(0, 4)))
    loss, _ = task.loss_of(batch)
    renamed = replace(batch, captions=[text.replace("thing", "<it> <it>_1") for text in batch.captions])
    expected = theirs.loss(renamed)
    loss.backward()
    expected.backward()
    assert abs(float(loss) - float(expected)) <= NEAR
    gradient, wanted = task.model.vectors.grad, table.grad[-2:]
    assert gradient is not None and wanted.abs().max() > 1e-3
    assert (gradient - wanted).abs().max() <= NEAR * wanted.abs().max()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_lora_acts_the_same_in_diffusers(small_model, pictures, tmp_path, layout, layers):
    task = LoRATask(load(small_model), pictures, 2, layers, options=LoRAOptions(3, True, layout=layout))
    randomize(task)
    task.export(task.model, tmp_path / "style" / "export")
    (path,) = (tmp_path / "style/export").iterdir()
    assert path.name == {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "style.safetensors"}[layout]
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert (facts["ss_network_dim"], float(facts["ss_network_alpha"])) == ("2", 3.0)
    assert json.loads(facts["ss_tag_frequency"]) == {"pictures": {f"a thing on snow {i}": 1 for i in range(4)}}
    ours = StableDiffusion.from_pretrained(small_model, device="cpu")
    pipe = StableDiffusionPipeline.from_pretrained(small_model, local_files_only=True)
    plain = ours.encode_text("a fox")
    ours.load_lora(path)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    with torch.inference_mode():
        context = ours.encode_text("a fox")
        assert difference(context, pipe.encode_prompt("a fox", "cpu", 1, False)[0]) <= NEAR
        assert difference(context, plain) > 1e-3
        noisy, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
        mine, other = ours.unet(noisy, t, context), pipe.unet(noisy, t, context).sample
    assert difference(mine, other) <= NEAR


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_of_the_learning_rate(tmp_path, name):
    options = Options(tmp_path, steps=50, lr=0.1, warmup=10, schedule=name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name, optimizer, num_warmup_steps=10, num_training_steps=50
    )
    expected = []
    for _ in range(50):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = [learning_rate(options, step, step / 50) for step in range(50)]
    assert found[:9] == pytest.approx(expected[1:10])  # they begin with a step of rate 0
    assert found[10:] == pytest.approx(expected[10:])
