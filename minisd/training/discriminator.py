"""The discriminator: a network that tells real pictures from reconstructions, patch by patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU


class PatchDiscriminator(nn.Module):
    """A patch discriminator: a score for each patch of 70 × 70 pixels of a picture.

    Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2.2, half
    as wide and without normalisation layers: with group or spectral normalisation this small one learned nothing.
    Beside the picture it sees what a blur of 3 × 3 pixels would take away, four times as strong, since that is where a
    reconstruction differs from a real picture.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        channels = (6, *widths)
        strides = [2] * (len(widths) - 1) + [1]
        layers: list[nn.Module] = []
        for before, after, stride in zip(channels, widths, strides, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride, padding=1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, SLOPE)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1] to scores (n, 1, h/8 − 2, w/8 − 2), high where a patch looks real."""
        return self.layers(torch.cat([images, 4 * fine_detail(images)], dim=1))


def fine_detail(images: Tensor) -> Tensor:
    """Images minus their 3 × 3 mean: (n, c, h, w), near 0 where a picture is smooth."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return images - F.avg_pool2d(padded, 3, stride=1)
