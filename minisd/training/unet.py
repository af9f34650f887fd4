"""Training the denoiser on cached latents: noise a picture, and let the UNet say what the noise was.

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 1; Salimans and Ho 2022, "Progressive
Distillation", section 4 (v-prediction); Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.features.distributed import rank, world_size
from minisd.features.more_samplers import Sampler
from minisd.features.validate import check_writable
from minisd.images import grid
from minisd.io.atomic import save_atomically
from minisd.io.configs import to_dict
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.training.data import Scenes
from minisd.training.layout_loss import Layout, WithLayout, layout_loss
from minisd.training.loop import Shuffled, channels_last, generator
from minisd.unet import UNet

SAMPLING = Defaults(Sampler("dpmpp_2m", spacing="trailing"), num_inference_steps=20, guidance_scale=4.0)

PROMPTS = (
    "a fox in a meadow",
    "a panda in the snow at night",
    "a red car on the beach",
    "a rocket in space",
    "a penguin in the snow",
    "a dolphin under the sea",
    "a castle in the mountains at sunset",
    "a blue balloon on a yellow background",
    "a frog on a pink background",
    "a green robot on a white background",
    "a cat in a meadow",
    "an octopus under the sea",
    "a purple gift on a white background",
    "an elephant in the desert",
    "a cactus in the desert at sunset",
    "a hamburger on a blue background",
)


@torch.no_grad()
def cache_latents(autoencoder: Autoencoder, scenes: Scenes, path: Path, batch: int = 16) -> None:
    """Encode every scene once: the scaled means, float32 (count, 4, 24, 24), into one safetensors file.

    Under torchrun each process encodes its share of the scenes, and the first one writes the file.
    """
    check_writable(path.parent)
    autoencoder = channels_last(autoencoder.eval())
    device = autoencoder.quant_conv.weight.device
    share = torch.arange(len(scenes)).tensor_split(world_size())[rank()]
    parts = [
        autoencoder.encode(
            scenes.images(indices.tolist()).to(device).contiguous(memory_format=torch.channels_last)
        ).mean
        for indices in tqdm(share.split(batch), unit="batch", mininterval=10, disable=rank() > 0)
    ]
    latents = torch.cat(parts).float().cpu() * autoencoder.config.scaling_factor
    shares: list[Any] = [None] * world_size()
    if world_size() > 1:
        dist.gather_object(latents, shares if rank() == 0 else None)
    else:
        shares = [latents]
    if rank() == 0:
        save_atomically(lambda target: save_file({"latents": torch.cat(shares).contiguous()}, target), path)
    if world_size() > 1:
        dist.barrier()  # the other processes read the file next


class UNetTask:
    """What `loop.train` needs to train the UNet on cached latents, with the frozen text encoder's context.

    dropout: the share of captions replaced by the empty one, which is what guidance needs.
    model: train this one further. layout: where the objects are; the UNet is asked for it too (see `layout.py`), with a
    weight that falls from `ask` to 0 in the course of the run. ceiling: see `loss_weight`; a higher one gives more
    weight to the steps of least noise, where outlines are settled. prompts: for the sheet.
    """

    def __init__(
        self,
        latents: Path,
        captions: Sequence[str],
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        config: ModelConfig,
        seed: int = 0,
        dropout: float = 0.1,
        model: UNet | None = None,
        layout: Layout | None = None,
        ask: float = 0.05,
        ceiling: float = 5.0,
        prompts: Sequence[str] = PROMPTS,
    ) -> None:
        self.prompts = list(prompts)
        self.latents = load_file(latents)["latents"]
        if len(self.latents) != len(captions):
            raise ValueError(f"{latents} holds {len(self.latents)} latents for {len(captions)} captions; encode again")
        self.seed, self.dropout, self.config = seed, dropout, config
        self.autoencoder, self.text_encoder = autoencoder.eval(), text_encoder.eval()
        self.tokenizer = Tokenizer.from_pretrained()
        self.schedule = Schedule(config.schedule)
        self.ids = self.tokenizer([*captions, ""])
        torch.manual_seed(seed)
        model = (model or start(UNet(config.unet))).requires_grad_()
        self.layout, self.ask, self.ceiling = layout, ask, ceiling
        self.model: nn.Module = channels_last(model if layout is None else WithLayout(model))
        self.order = Shuffled(len(captions), seed)

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = generator(self.seed, step)
        count = len(positions)
        # one timestep from each of `count` equal slices of the schedule: every step sees all noise levels
        slices = (torch.arange(count) + torch.rand(count, generator=rng)) / count
        timesteps = (slices * self.config.schedule.num_train_timesteps).long()[torch.randperm(count, generator=rng)]
        dropped = torch.rand(count, generator=rng) < self.dropout
        noise = torch.randn(count, *self.latents.shape[1:], generator=rng)[local]
        indices = torch.tensor(self.order(positions))[local]
        device = next((each.device for each in self.model.parameters()), self.latents.device)
        latents, timesteps, noise = (each.to(device) for each in (self.latents[indices], timesteps[local], noise))
        with torch.no_grad():
            ids = self.ids[torch.where(dropped[local], len(self.ids) - 1, indices)]
            context = self.text_encoder(ids.to(device))
        noisy = self.schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        output = self.model(noisy, timesteps, context)
        prediction, answers = output if self.layout else (output, [])
        error = (prediction - self.schedule.target(latents, noise, timesteps)).square().mean((1, 2, 3))
        snr = self.schedule.snr(timesteps).float()
        loss = (loss_weight(snr, ceiling=self.ceiling) * error).mean()
        details = {"denoising": float(loss.detach()), "mse": float(error.detach().mean())}
        if self.layout:
            # in pure noise nothing is anywhere yet: ask in proportion to what can be seen
            seen = snr / (snr + 0.1)
            missed = sum((seen * layout_loss(answer, self.layout[indices])).mean() for answer in answers)
            loss = loss + self.ask * (1 - progress) * missed
            details["layout"] = float(torch.as_tensor(missed).detach())
        return loss, details

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """The prompts, drawn with seed 0."""
        model = _unet(model)
        sd = StableDiffusion(self.config, self.tokenizer, self.text_encoder, model, self.autoencoder, SAMPLING)
        return grid(sd(self.prompts, seed=[0] * len(self.prompts), progress=False), columns=8)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `unet/` as diffusers does."""
        model = _unet(model)
        config = {"_class_name": "UNet2DConditionModel", **to_dict(model.config)}
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        target = folder / "unet"
        save_atomically(lambda path: save_file(weights, path), target / "diffusion_pytorch_model.safetensors")
        save_atomically(
            lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"), target / "config.json"
        )


def _unet(model: nn.Module) -> UNet:
    model = model.unet if isinstance(model, WithLayout) else model
    assert isinstance(model, UNet)
    return model


def loss_weight(snr: Tensor, floor: float = 0.25, ceiling: float = 5.0) -> Tensor:
    """The weight of a timestep's squared error in v, from its signal-to-noise ratio; both (n,).

    As an error of the clean latents it weighs min(SNR + floor, ceiling). Min-SNR weighting has no floor, and all but
    ignores the noisiest steps, where layout is decided. With a floor of 1 these would make up most of the loss, though
    nearly all that is left of it there cannot be learned: the words do not say where in the picture things are.
    """
    # w = min(SNR + 1/4, 5) / (SNR + 1)
    return (snr + floor).clamp(max=ceiling) / (snr + 1)


def start(unet: UNet) -> UNet:
    """Let every attention and the last convolution begin at zero, so that the network begins as a small one."""
    for name, module in unet.named_modules():
        if name.endswith("proj_out") or name == "conv_out":
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return unet
