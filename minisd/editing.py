"""Image editing: inpainting, outpainting and interpolation between noise tensors.

Inpainting hooks into the loop of `generate.sample`: `KeepUnmasked` modifies the state after each step, and
`with_channels` feeds the UNet additional input channels.
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
    """Resets unmasked latents to the noised original after each step; pass it to `sample` as `after_step`.

    Args:
        mask: Inpainting mask, (1, 1, h/8, w/8): 1 where latents are regenerated, 0 where they are kept.
        original: Scaled latents of the original image, (1, 4, h/8, w/8).
        noise: Initial unit Gaussian noise of the run, (n, 4, h/8, w/8).

    Source: simplified from Lugmayr et al. 2022, "RePaint", equation 8 (fixed noise, no resampling).
    """

    mask: Tensor
    original: Tensor
    noise: Tensor

    def __call__(self, plan: Plan, state: State) -> State:
        sigma = plan.sigmas[state.index]
        # x̄ = x₀ + σ ε; at the end x̄ = √(σ²+1) x₀, since `Plan.latents` divides by √(σ²+1), even if the last σ > 0
        is_end = state.index == plan.num_calls
        known = self.original * (sigma**2 + 1) ** 0.5 if is_end else self.original + sigma * self.noise
        return replace(state, sample=self.mask * state.sample + (1 - self.mask) * known.to(state.sample))


def with_channels(denoise: Denoiser, channels: Tensor) -> Denoiser:
    """Concatenate mask and masked-image latents, (1, 5, h/8, w/8), to the input of an inpainting UNet (9 channels)."""

    def denoise_with_channels(latents: Tensor, timestep: Tensor, progress: float) -> Tensor:
        return denoise(torch.cat([latents, channels.expand(len(latents), -1, -1, -1)], dim=1), timestep, progress)

    return denoise_with_channels


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Max-pool a mask (1, 1, h, w), binarized at 0.5, to the resolution of the latents, (1, 1, h/8, w/8)."""
    return reduce((mask >= 0.5).float(), "n c (h a) (w b) -> n c h w", "max", a=factor, b=factor)


def masked_image(images: Tensor, mask: Tensor) -> Tensor:
    """Return images (n, 3, h, w) in [-1, 1] with pixels where the mask (1, 1, h, w) is at least 0.5 set to gray."""
    return images * (mask.to(images) < 0.5)


def paste(redrawn: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """Composite a regenerated image over the original with a mask (1, 1, h, w) as alpha; 0 keeps original pixels."""
    share = mask[0, 0, :, :, None].numpy()
    mixed = share * np.asarray(redrawn, np.float32) + (1 - share) * np.asarray(original.convert("RGB"), np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))


def extend_canvas(
    picture: Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Extend an image by margins of repeated edge pixels; return it with a mask in which the margins are white."""
    margins = ((top, bottom), (left, right), (0, 0))
    canvas = Image.fromarray(np.pad(np.asarray(picture.convert("RGB")), margins, mode="edge"))
    mask = Image.new("L", canvas.size, 255)
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return canvas, mask


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Interpolate spherically between two noise tensors, which preserves the norm expected of Gaussian noise.

    Linear interpolation would reduce the norm by a factor of √2 at the midpoint: noise that the UNet has never seen.
    Source: Shoemake 1985, "Animating Rotation with Quaternion Curves", section 3.3.
    """
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if float(angle.sin().abs()) < 1e-4:  # nearly parallel (or opposite): interpolate linearly
        return (1 - share) * start + share * end
    # (sin((1−s) Ω) a + sin(s Ω) b) / sin Ω
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
