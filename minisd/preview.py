"""Cheap previews of latents: a linear projection of the 4 latent channels to RGB."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

Factors = tuple[tuple[float, float, float], ...]

# Factors for Stable Diffusion 1: one row per latent channel, followed by a bias. Source: published by "keturn" on
# discuss.huggingface.co in 2022 (thread 23204), and widely used.
SD1: Factors = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
    (0.0, 0.0, 0.0),
)


def linear_preview(latents: Tensor, factors: Factors = SD1) -> Tensor:
    """Project scaled latents (n, 4, h/8, w/8) to images (n, 3, h/8, w/8), approximately in [-1, 1]: rgb = z W + b."""
    *rows, bias = torch.tensor(factors, dtype=torch.float32, device=latents.device)
    colors = torch.einsum("n c h w, c r -> n r h w", latents.float(), torch.stack(rows))
    return colors + bias[:, None, None]


def fit_preview(latents: Tensor, images: Tensor) -> Factors:
    """Return the least-squares fit of the factors to pairs of latents and images.

    latents (n, 4, h/8, w/8), scaled; images (n, 3, h, w) in [-1, 1].
    """
    factor = images.shape[-1] // latents.shape[-1]
    cells = rearrange(latents.double(), "n c h w -> (n h w) c")
    cells = torch.cat([cells, cells.new_ones(len(cells), 1)], dim=1)
    means = reduce(images.double(), "n r (h a) (w b) -> (n h w) r", "mean", a=factor, b=factor)
    # W = argmin ‖ z W − rgb ‖²
    solution = torch.linalg.lstsq(cells, means).solution
    return tuple((round(r, 4), round(g, 4), round(b, 4)) for r, g, b in solution.tolist())
