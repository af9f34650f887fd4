"""Training the autoencoder: squeeze a picture 48 times, and get it back.

Stable Diffusion's autoencoder was trained with an L1 loss, a tiny KL term, a perceptual loss (LPIPS) and a
discriminator. Here the L1 loss is taken at three scales and on differences of neighbouring pixels as well, which
rewards edges in their place, and the perceptual loss compares features of a small network of this world
(`features.py`). The discriminator comes in a phase of its own (`adversarial.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig
from minisd.images import to_images, to_pixels
from minisd.io.atomic import save_atomically
from minisd.io.configs import to_dict
from minisd.training.data import Scenes
from minisd.training.features import SceneFeatures
from minisd.training.loop import Shuffled, channels_last, generator
from minisd.training.losses import perceptual_loss


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of the loss, beside 1 for L1 at full size; `perceptual` counts where there are features."""

    half: float = 0.5
    quarter: float = 0.25
    edges: float = 0.5
    kl: float = 1e-4
    perceptual: float = 1.0
    equivariance: float = 0.5
    equivariance_every: int = 4
    correlation: float = 0.02


def reconstruction_loss(output: Tensor, target: Tensor, weights: Weights) -> Tensor:
    """L1 at full, half and quarter size, and L1 of the differences between neighbouring pixels."""
    error = output - target
    loss = error.abs().mean()
    loss = loss + weights.half * F.avg_pool2d(error, 2).abs().mean()
    loss = loss + weights.quarter * F.avg_pool2d(error, 4).abs().mean()
    return loss + weights.edges * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def correlation_loss(latents: Tensor) -> Tensor:
    """The mean square of the correlations between channels of latents (n, c, h, w): 0 if none repeats another.

    It is no mean over pictures: under `torchrun` each process takes it of its own share of the batch.
    """
    values = rearrange(latents, "n c h w -> c (n h w)")
    values = values - values.mean(1, keepdim=True)
    values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-6)
    pairs = torch.triu(values @ values.T, diagonal=1)
    return pairs.square().sum() * 2 / (len(values) * (len(values) - 1))


class AutoencoderTask:
    """What `loop.train` needs to train the autoencoder on rendered scenes.

    crop: side of the random crops of most of the run; from `whole_from` of the run on, whole pictures are used, a
    quarter as many, since normalisation sees whole pictures in use. decoder_only freezes the encoder, so that latents
    cached from it stay valid while the decoder gets sharper. model: train this one further, its latents whitened first.
    features: the network whose features the reconstructions should share, or None for no perceptual loss. The model is
    trained on the device that it is moved to after this.
    """

    def __init__(
        self,
        scenes: Scenes,
        config: AutoencoderConfig,
        seed: int = 0,
        crop: int = 64,
        whole_from: float = 0.75,
        weights: Weights | None = None,
        decoder_only: bool = False,
        model: Autoencoder | None = None,
        features: SceneFeatures | None = None,
    ) -> None:
        self.scenes, self.seed, self.crop, self.whole_from = scenes, seed, crop, whole_from
        self.weights = weights or Weights()
        self.decoder_only, self.features = decoder_only, features
        torch.manual_seed(seed)
        if model is not None and not decoder_only:
            model = normalised(model, scenes)
        model = channels_last(model or start(Autoencoder(config))).requires_grad_()
        if decoder_only:
            for part in (model.encoder, model.quant_conv):
                part.requires_grad_(False)
        self.model: nn.Module = model
        self.order = Shuffled(len(scenes), seed)

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(self.model, Autoencoder)
        rng = generator(self.seed, step)
        whole = progress >= self.whole_from
        device = self.model.quant_conv.weight.device
        images = self.scenes.images(self.order(positions[local])).to(device)
        if whole:
            images = images[::4]
        else:
            crop = min(self.crop, images.shape[-1])
            places = torch.randint(0, images.shape[-1] - crop + 1, (len(positions), 2), generator=rng)[local]
            flips = torch.rand(len(positions), generator=rng)[local] < 0.5
            images = _crop(images, places, flips, crop)
        side = images.shape[-1] // self.model.config.downscale
        noise = torch.randn(len(positions), 4, side, side, generator=rng)[local][:: 4 if whole else 1].to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        output, posterior = self.model(images, noise)
        reconstruction = reconstruction_loss(output, images, self.weights)
        loss = reconstruction
        if self.features is not None:
            loss = loss + self.weights.perceptual * perceptual_loss(self.features(output), self.features(images))
        loss = loss + self.weights.kl * posterior.kl().mean() / posterior.mean[0].numel()
        loss = loss + self.weights.correlation * correlation_loss(posterior.mean.float())
        if self.weights.equivariance and not self.decoder_only and step % self.weights.equivariance_every == 0:
            # shrunken latents should decode to the shrunken picture: latents that behave like a picture diffuse well
            shrunk = self.model.decode(F.avg_pool2d(posterior.sample(noise), 2))
            loss = loss + self.weights.equivariance * F.l1_loss(shrunk, F.avg_pool2d(images, 2))
        error = (output.detach().clamp(-1, 1) - images).square().mean() / 4
        return loss, {"psnr": float(-10 * error.log10()), "std": float(posterior.mean.detach().std())}

    def sheet(self, model: nn.Module) -> Image.Image:
        """Held-out pictures above their reconstructions."""
        return sheet(model, self.scenes.held_out())

    def export(self, model: nn.Module, folder: Path) -> None:
        """Normalise the latents' channels, and write `vae/` as diffusers does."""
        assert isinstance(model, Autoencoder)
        finished = model if self.decoder_only else normalised(model, self.scenes)
        save_autoencoder(finished, folder / "vae")


@torch.no_grad()
def sheet(model: nn.Module, pixels: np.ndarray) -> Image.Image:
    """Pictures (n, h, w, 3) uint8 above what the autoencoder makes of them."""
    output, _ = model(to_images(pixels).to(next(model.parameters()).device))
    again = to_pixels(output)
    return Image.fromarray(np.vstack([np.hstack(list(pixels)), np.hstack(list(again))]))


def start(model: Autoencoder) -> Autoencoder:
    """Let the log-variance begin at −6 for every picture: a little noise, so that the mean can be learned first."""
    channels = model.config.latent_channels
    with torch.no_grad():
        model.quant_conv.weight[channels:].zero_()
        assert model.quant_conv.bias is not None
        model.quant_conv.bias[channels:].fill_(-6.0)
    return model


def _crop(images: Tensor, places: Tensor, flips: Tensor, size: int) -> Tensor:
    crops = []
    for image, (y, x), flip in zip(images, places.tolist(), flips.tolist(), strict=True):
        crop = image[:, y : y + size, x : x + size]
        crops.append(crop.flip(-1) if flip else crop)
    return torch.stack(crops)


@torch.no_grad()
def normalised(model: Autoencoder, scenes: Scenes, count: int = 512) -> Autoencoder:
    """Return a copy whose latents are white: mean 0, equal spread in each channel, no two of them correlated.

    Its scaling factor is 1/spread. This is where Stable Diffusion's 0.18215 comes from: one over the standard deviation
    of the latents of its training set. The change is folded into the 1×1 convolutions on both sides of the latents, so
    pictures decode as before. Of all matrices that whiten, this one (symmetric: "ZCA") changes the channels least. The
    noise of the posterior keeps its size only if it is alike in all channels; the means are exact.
    """
    model.eval()
    batches = torch.arange(min(count, len(scenes))).split(16)
    device = model.quant_conv.weight.device
    means = torch.cat([model.encode(scenes.images(batch.tolist()).to(device)).mean for batch in batches])
    values = rearrange(means, "n c h w -> c (n h w)").cpu().double()  # MPS has no float64
    mean, covariance = values.mean(1), torch.cov(values)
    overall = float(covariance.diag().mean().sqrt())
    spread, directions = torch.linalg.eigh(covariance)
    whiten = directions @ (overall / spread.sqrt()).diag() @ directions.T
    copy = Autoencoder(replace(model.config, scaling_factor=round(1 / overall, 5)))
    copy.load_state_dict(model.state_dict())
    channels = model.config.latent_channels
    before, after = copy.quant_conv, copy.post_quant_conv
    assert before.bias is not None and after.bias is not None
    into, out = before.weight[:, :, 0, 0].double(), after.weight[:, :, 0, 0].double()
    before.weight[:channels, :, 0, 0] = (whiten @ into[:channels]).float()
    before.bias[:channels] = (whiten @ (before.bias[:channels].double() - mean)).float()
    before.bias[channels:] += whiten.square().sum(1).log().float()
    after.bias += (out @ mean).float()
    after.weight[:, :, 0, 0] = (out @ torch.linalg.inv(whiten)).float()
    return copy.eval()


def save_autoencoder(model: Autoencoder, folder: Path) -> None:
    """Write config.json and the weights, float32, under diffusers' names."""
    config = {"_class_name": "AutoencoderKL", **to_dict(model.config)}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_atomically(lambda path: save_file(weights, path), folder / "diffusion_pytorch_model.safetensors")
    save_atomically(
        lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"), folder / "config.json"
    )
