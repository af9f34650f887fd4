"""Editing in latent space: inpainting, outpainting's canvas, and the way from one noise to another.

All of it runs on the loop of `generate.sample`: `KeepUnmasked` changes the state after each step, `with_channels`
changes what the UNet sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image
from torch import Tensor

from minisd.generate import Denoiser
from minisd.samplers import Plan, State


@dataclass(frozen=True, eq=False)
class KeepUnmasked:
    """Puts the unmasked latents back after each step, at the noise level of the run: `after_step` of `sample`.

    Args:
        mask: (1, 1, h/8, w/8), 1 where latents are redrawn, 0 where they are kept.
        original: the scaled latents of the whole picture, (1, 4, h/8, w/8).
        noise: the unit Gaussian noise that the run began with, (n, 4, h/8, w/8).

    Source: Lugmayr et al. 2022, "RePaint", equation 8.
    """

    mask: Tensor
    original: Tensor
    noise: Tensor

    def __call__(self, plan: Plan, state: State) -> State:
        sigma = plan.sigmas[state.index]
        # x̄ = x₀ + σ ε; at the end of the run x = x₀, at the scale the UNet sees
        is_end = state.index == plan.num_calls
        known = self.original * (sigma**2 + 1) ** 0.5 if is_end else self.original + sigma * self.noise
        return replace(state, sample=self.mask * state.sample + (1 - self.mask) * known.to(state.sample))


def with_channels(denoise: Denoiser, channels: Tensor) -> Denoiser:
    """Show an inpainting UNet (9 input channels) the mask and the masked picture's latents, (1, 5, h/8, w/8), too."""

    def denoise_with_channels(latents: Tensor, timestep: Tensor, progress: float) -> Tensor:
        return denoise(torch.cat([latents, channels.expand(len(latents), -1, -1, -1)], dim=1), timestep, progress)

    return denoise_with_channels


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask (1, 1, h, w) at the size of latents, (1, 1, h/8, w/8): 1 for each cell with a pixel of at least ½."""
    return reduce((mask >= 0.5).float(), "n c (h a) (w b) -> n c h w", "max", a=factor, b=factor)


def masked_image(images: Tensor, mask: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [-1, 1], grey where the mask (1, 1, h, w) is white: what an inpainting UNet sees."""
    return images * (mask.to(images) < 0.5)


def paste(redrawn: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """Lay a redrawn picture over the original through the mask (1, 1, h, w); where that is 0, no pixel changes."""
    share = mask[0, 0, :, :, None].numpy()
    mixed = share * np.asarray(redrawn, np.float32) + (1 - share) * np.asarray(original.convert("RGB"), np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))


def extend_canvas(
    picture: Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Put a picture on a larger canvas, its edge pixels repeated; return it and the mask of what was added (white)."""
    margins = ((top, bottom), (left, right), (0, 0))
    canvas = Image.fromarray(np.pad(np.asarray(picture.convert("RGB")), margins, mode="edge"))
    mask = Image.new("L", canvas.size, 255)
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return canvas, mask


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Interpolate between two noises along the great circle, which keeps the norm that Gaussian noise has.

    Halfway, a straight line would be shorter by √½ than any noise the UNet has seen.
    Source: Shoemake 1985, "Animating Rotation with Quaternion Curves", section 3.3.
    """
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if float(angle.sin().abs()) < 1e-4:  # parallel: the arc is the line
        return (1 - share) * start + share * end
    # (sin((1−s) Ω) a + sin(s Ω) b) / sin Ω
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
