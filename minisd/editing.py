"""Editing: redraw a part of a picture, draw beyond its edges, and walk from one picture to another.

All of it runs on the pipeline's own loop. A mask adds two things: what is kept is put back after every step, and at
the end the kept pixels are pasted over the result, since the autoencoder would not return them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image
from torch import Tensor

from minisd.images import gray
from minisd.pipeline.checks import whole
from minisd.samplers import Run, State


@dataclass(frozen=True)
class Hole:
    """The part of a picture that is to be redrawn, as the denoising loop needs it.

    mask: (1, 1, h/8, w/8), 1 where latents are redrawn and 0 where they are kept. latents: of the whole picture,
    scaled, (1, 4, h/8, w/8). masked: the latents of the picture with the hole painted grey, for a UNet that was
    trained to see them beside the noise; None for any other.
    """

    mask: Tensor
    latents: Tensor
    masked: Tensor | None = None

    def channels(self, count: int) -> Tensor | None:
        """What an inpainting UNet sees after the 4 noisy channels: the mask and the masked latents, (count, 5, …)."""
        if self.masked is None:
            return None
        return torch.cat([self.mask, self.masked], dim=1).expand(count, -1, -1, -1)

    def keep(self, run: Run, state: State, noise: Tensor) -> State:
        """Put the kept latents back, as noisy as the run is by now (and clean at its end).

        noise: the unit Gaussian that the run began with. An inpainting UNet has learned to keep them by itself.
        Source: Lugmayr et al. 2022, "RePaint", equation 8; diffusers puts back the same latents.
        """
        if self.masked is not None:
            return state
        sigma = run.sigmas[state.index]
        # x̄ = x₀ + σ ε, but at the end of the run x = x₀, at the model's own scale
        end = state.index == run.calls
        kept = self.latents * (sigma**2 + 1) ** 0.5 if end else self.latents + sigma * noise
        return replace(state, sample=self.mask * state.sample + (1 - self.mask) * kept.to(state.sample))


def read_mask(mask: Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """A mask as (1, 1, h, w) float32 in [0, 1]: 1 (white) is redrawn, 0 (black) is kept.

    mask: a PIL picture of any mode, or a tensor (h, w), (1, h, w) or (1, 1, h, w). size: (width, height) of the
    picture. Raises ValueError where sizes or values do not fit, or nothing is to be redrawn, and TypeError for others.
    """
    if isinstance(mask, Image.Image):
        values = torch.from_numpy(gray(mask))
    elif isinstance(mask, Tensor) and not mask.is_complex():
        values = mask.detach().float().cpu()
    else:
        raise TypeError(f"the mask must be a PIL picture or a tensor of numbers; got {type(mask).__name__}")
    while values.dim() > 2 and values.shape[0] == 1:
        values = values[0]
    if tuple(values.shape) != size[::-1]:
        raise ValueError(f"the mask has shape {tuple(values.shape)}; expected {size[::-1]}, height and width of image")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("the mask has values outside [0, 1]; expected 1 where the picture is redrawn, 0 where kept")
    if not bool((values >= 0.5).any()):
        raise ValueError("the mask is black everywhere, so nothing would be redrawn; paint white what is to change")
    return values[None, None]


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask (1, 1, h, w) at the size of latents, (1, 1, h/8, w/8): 1 for each cell with a pixel of at least ½."""
    return reduce((mask >= 0.5).float(), "n c (h a) (w b) -> n c h w", "max", a=factor, b=factor)


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [-1, 1] with the pixels under the mask (1, 1, h, w) grey: what an inpainting UNet sees."""
    return images * (mask.to(images) < 0.5)


def paste(drawn: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """Lay the drawn picture over the original through the mask (1, 1, h, w); where that is 0 no pixel changes."""
    share = mask[0, 0, :, :, None].numpy()
    mixed = share * np.asarray(drawn, np.float32) + (1 - share) * np.asarray(original.convert("RGB"), np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))


def check_margins(left: int, right: int, top: int, bottom: int) -> None:
    """Raise TypeError or ValueError for what is no multiple of 8, 0 or more, or where none is above 0."""
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, side in sides.items():
        if whole(name, side, 0, 2**16) % 8:
            raise ValueError(f"{name}={side}; expected a multiple of 8 pixels, 0 or more")
    if not any(sides.values()):
        raise ValueError("no side is extended; give left, right, top or bottom a number of pixels")


def extend(
    picture: Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A picture on a larger canvas, its edge pixels drawn out, and the mask (white) of what was added.

    The sides are in pixels, multiples of 8. Raises ValueError for other numbers, or where none is above 0.
    """
    check_margins(left, right, top, bottom)
    margins = ((top, bottom), (left, right), (0, 0))
    canvas = Image.fromarray(np.pad(np.asarray(picture.convert("RGB")), margins, mode="edge"))
    mask = Image.new("L", canvas.size, 255)
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return canvas, mask


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The tensor at `share` of the way from start to end, along the great circle between them.

    Halfway between two Gaussian noises a straight line is shorter by √½ than any noise the UNet has seen; the arc is
    not. Source: Shoemake 1985, "Animating Rotation with Quaternion Curves", section 3.3.
    """
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if float(angle.sin().abs()) < 1e-4:  # parallel: the arc is the line
        return (1 - share) * start + share * end
    # (sin((1−s) Ω) a + sin(s Ω) b) / sin Ω
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
