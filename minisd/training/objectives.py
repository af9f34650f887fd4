"""The loss of a model that is tuned: batches, and how errors are weighed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.schedule import Schedule
from minisd.training.tuning_options import Tuning


@dataclass(frozen=True)
class Batch:
    """Clean latents and noise (n, 4, h, w), timesteps (n,), captions; the last `prior` rows preserve the prior."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    prior: int = 0


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return the weight of a squared error of the UNet's prediction, from signal-to-noise ratios (n,).

    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4. For v it is
    diffusers' variant, in which γ bounds SNR + 1.
    """
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    # ε: w = min(SNR, γ) / SNR; v: w = min(SNR + 1, γ) / (SNR + 1)
    snr = snr + 1 if prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / snr


def with_offset(noise: Tensor, offset: float, rng: torch.Generator) -> Tensor:
    """Add to noise (n, c, h, w) one number per picture and channel, drawn with the standard deviation `offset`.

    Source: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    if not offset:
        return noise
    # ε' = ε + offset · δ, δ ∼ N(0, 1) of shape (n, c, 1, 1)
    return noise + offset * torch.randn(*noise.shape[:2], 1, 1, generator=rng)


def tuning_loss(prediction: Tensor, batch: Batch, schedule: Schedule, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """Return the loss of the pictures and that of the class pictures (0 without any), both scalars.

    prediction: of the UNet for the noisy latents, (n, 4, h, w).
    """
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    # L = ‖prediction − target‖², the target being ε or v, as the model was trained
    errors = (prediction.float() - target.float()).square().mean((1, 2, 3))
    if tuning.min_snr is not None:
        snr = schedule.snr(batch.timesteps)
        errors = errors * min_snr_weight(snr, tuning.min_snr, schedule.config.prediction_type)
    count = len(errors) - batch.prior
    return errors[:count].mean(), errors[count:].mean() if batch.prior else errors.new_zeros(())
