"""The last phase of the autoencoder: its decoder alone, against a discriminator.

The encoder stays as it is, and with it every latent that was cached and every UNet that was trained on them. The
decoder loses PSNR and gains edges: the average of all sharp pictures that fit is nearer to the original, but blurred.
Source: Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", section 3.1.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from minisd.autoencoder import Autoencoder
from minisd.training.autoencoder import Weights, reconstruction_loss, save_autoencoder, sheet
from minisd.training.data import Scenes
from minisd.training.discriminator import PatchDiscriminator
from minisd.training.features import SceneFeatures
from minisd.training.loop import Shuffled, channels_last
from minisd.training.losses import adaptive_weight, discriminator_loss, generator_loss, perceptual_loss


@dataclass(frozen=True)
class Adversary:
    """How the discriminator takes part.

    share: the adversarial loss's gradient at the decoder's last layer, as a multiple of the reconstruction loss's.
    alone: for the first steps only the discriminator learns, since an untrained one gives no direction.
    ramp: over how many steps after these the share grows to its full size. ceiling: of the adaptive weight.
    faster: the discriminator's learning rate, as a multiple of the decoder's; with equal rates it lost.
    mix: how far the exported weights lie on the way from the first ones to the last; below 1 there are fewer halos.
    """

    share: float = 0.25
    alone: int = 800
    ramp: int = 100
    ceiling: float = 2.0
    faster: float = 4.0
    mix: float = 0.9

    def at(self, step: int) -> float:
        """The share at a step."""
        return self.share * min(1.0, max(0.0, (step - self.alone) / self.ramp))


class AdversarialTask:
    """What `loop.train` needs to train the decoder against a discriminator.

    Both are in one model and make their steps together. Neither learns from the other's loss: the discriminator sees
    pictures without a graph, the decoder sees a discriminator whose weights are held fixed.
    """

    def __init__(
        self,
        scenes: Scenes,
        autoencoder: Autoencoder,
        features: SceneFeatures,
        seed: int = 0,
        weights: Weights | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        self.scenes, self.features = scenes, features
        self.weights, self.adversary = weights or Weights(), adversary or Adversary()
        torch.manual_seed(seed)
        autoencoder.requires_grad_()
        for part in (autoencoder.encoder, autoencoder.quant_conv):
            part.requires_grad_(False)
        self.autoencoder, self.discriminator = autoencoder, PatchDiscriminator()
        parts = {"autoencoder": self.autoencoder, "discriminator": self.discriminator}
        self.model: nn.Module = channels_last(nn.ModuleDict(parts))
        self.rate_factors = dict.fromkeys(self.discriminator.parameters(), self.adversary.faster)
        self.first = deepcopy(autoencoder).requires_grad_(False)
        self.order = Shuffled(len(scenes), seed)

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        images = self.scenes.images(self.order(positions[local])).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = self.autoencoder.encode(images).mean
        share, weight = self.adversary.at(step), 0.0
        with torch.set_grad_enabled(share > 0):
            output = self.autoencoder.decode(latents)
            compared = perceptual_loss(self.features(output), self.features(images))
            reconstruction = reconstruction_loss(output, images, self.weights) + self.weights.perceptual * compared
        loss = reconstruction
        if share > 0:
            fixed = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            adversarial = generator_loss(functional_call(self.discriminator, fixed, (output,)))
            last = self.autoencoder.decoder.conv_out.weight
            balance = adaptive_weight(reconstruction, adversarial, last, self.adversary.ceiling)
            loss = loss + share * balance * adversarial
            weight = float(share * balance)
        told = discriminator_loss(self.discriminator(images), self.discriminator(output.detach()))
        error = (output.detach().clamp(-1, 1) - images).square().mean() / 4
        details = {
            "reconstruction": float(reconstruction.detach()),
            "features": float(compared.detach()),
            "discriminator": float(told.detach()),
            "weight": weight,
            "psnr": float(-10 * error.log10()),
        }
        return loss + told, details

    def sheet(self, model: nn.Module) -> Image.Image:
        """Held-out pictures above their reconstructions."""
        return sheet(self.autoencoder, self.scenes.held_out())

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `vae/` as diffusers does."""
        save_autoencoder(interpolated(self.first, self.autoencoder, self.adversary.mix), folder / "vae")


@torch.no_grad()
def interpolated(first: Autoencoder, last: Autoencoder, share: float) -> Autoencoder:
    """An autoencoder with the weights (1 − share) · first + share · last.

    Between a blurred decoder and the sharp one that was trained from it, this trades halos for softer edges.
    Source: Wang et al. 2018, "ESRGAN", section 3.4 (network interpolation).
    """
    model, weights = deepcopy(first), last.state_dict()
    model.load_state_dict({name: value.lerp(weights[name], share) for name, value in first.state_dict().items()})
    return model
