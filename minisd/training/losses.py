"""The losses of an autoencoder whose pictures should be sharp: features of another network, and a discriminator.

An L1 loss alone is smallest at the median of all the pictures that fit the latents, and a median of edges is a blur.
The two losses here ask for something else: that a trained network sees the same in both pictures, and that a network
that learns to tell them apart fails. Stable Diffusion's autoencoder was trained with both (Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models", appendix G).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def perceptual_loss(output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Distance between two pictures as a trained network sees them, averaged over the batch.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1,
    with all channels weighted equally.

    Args:
        output: features of the reconstructions, one tensor (n, c, h, w) per stage of the network.
        target: features of the originals, of the same shapes.

    Returns:
        A scalar between 0 and 4 for each stage, summed over the stages: 0 where all features point the same way.
    """
    # d(x, y) = Σ_l 1/(H_l W_l) Σ_hw ‖ŷ_l − x̂_l‖², every pixel's feature vector scaled to unit length
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
        for a, b in zip(output, target, strict=True)
    ]
    return torch.stack(distances).sum()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator: scores of real pictures should exceed 1, those of reconstructions fall below −1.

    Source: Lim and Ye 2017, "Geometric GAN", equation 11; Esser et al. 2021, "Taming Transformers", code.

    Args:
        real: scores of real pictures, of any shape.
        fake: scores of reconstructions, of any shape.

    Returns:
        A scalar: 1 for a discriminator that scores everything 0, and 0 for one that is never within the margin.
    """
    # L_D = ½ E[max(0, 1 − D(x))] + ½ E[max(0, 1 + D(x̂))]
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """Adversarial loss of the decoder: the higher the discriminator scores its pictures, the lower. Scalar."""
    # L_G = −E[D(x̂)]
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, ceiling: float = 1e4) -> Tensor:
    """Weight that gives both losses gradients of equal size at the decoder's last layer.

    Source: Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", equation 7.

    Args:
        reconstruction: the loss that compares with the original, a scalar with a graph.
        adversarial: the loss that asks the discriminator, a scalar with a graph.
        last_layer: the weights of the decoder's last convolution, on which both depend.
        ceiling: the largest weight returned; a discriminator that has learned nothing has next to no gradient.

    Returns:
        A scalar without a graph.
    """
    # λ = ‖∇_L L_rec‖ / (‖∇_L L_G‖ + δ)
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-6)).clamp(max=ceiling).detach()
