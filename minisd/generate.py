"""Text-to-image generation: the model, the denoising loop, and `generate`, the complete pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.guidance import Guidance
from minisd.images import to_pil
from minisd.samplers import Plan, Sampler, State
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

Denoiser = Callable[[Tensor, Tensor, float], Tensor]  # (latents, timestep, progress in [0, 1)) -> prediction
NoiseSource = Callable[[], Tensor]  # () -> unit Gaussian noise, (n, 4, h/8, w/8)


@dataclass(frozen=True, eq=False)
class Model:
    """Components of a Stable Diffusion model."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    autoencoder: Autoencoder

    @property
    def schedule(self) -> Schedule:
        """Noise schedule the UNet was trained with."""
        return Schedule(self.config.schedule)


@dataclass(frozen=True, eq=False)
class Step:
    """Result of one UNet call and the sampler step that follows it.

    Attributes:
        index: Zero-based index of the UNet call.
        num_calls: Total number of UNet calls (greater than the number of steps for PNDM and Heun).
        t: Timestep passed to the UNet.
        latents: Latents after the step, (n, 4, h/8, w/8), at the variance-preserving scale.
        x0: Predicted clean latents, after guidance.
        noise: Predicted noise, after guidance.
    """

    index: int
    num_calls: int
    t: float
    latents: Tensor
    x0: Tensor
    noise: Tensor


def guided(unet: Callable[..., Tensor], cond: Tensor, uncond: Tensor | None, guidance: Guidance) -> Denoiser:
    """Wrap a UNet in classifier-free guidance.

    Args:
        unet: UNet, or a callable with the same signature.
        cond: Text embeddings of the prompts, (n, tokens, d).
        uncond: Text embeddings of the negative prompts, (n, tokens, d), or None to disable guidance.
        guidance: Guidance scale, rescaling and interval.
    """
    both = None if uncond is None else torch.cat([uncond, cond])

    def denoise(latents: Tensor, timestep: Tensor, progress: float) -> Tensor:
        latents = latents.to(cond.dtype)
        if both is None or not guidance.is_active(progress):
            return unet(latents, timestep, cond).float()
        return guidance.combine(*unet(torch.cat([latents, latents]), timestep, both).float().chunk(2))

    return denoise


def sample(
    denoise: Denoiser,
    plan: Plan,
    noise: NoiseSource,
    latents: Tensor | None = None,
    after_step: Callable[[Plan, State], State] | None = None,
) -> Iterator[Step]:
    """Run the denoising loop and yield every step; the result is the latents of the last step.

    Args:
        denoise: Function that returns the (guided) prediction of the UNet.
        plan: Plan of the run, created by a sampler.
        noise: Source of the initial noise, and of the noise added by stochastic samplers.
        latents: Clean latents to start from (image-to-image), noised to the first noise level of the plan.
        after_step: Callback that returns a modified state after each step, for example for inpainting.
    """
    state = plan.start(noise(), latents)
    timesteps = torch.tensor(plan.timesteps, device=state.sample.device, dtype=torch.float32)
    for index, t in enumerate(plan.timesteps):
        x = plan.latents(state)
        prediction = denoise(x, timesteps[index], index / plan.num_calls)
        state, x0 = plan.step(state, prediction, noise() if plan.needs_noise(index) else None)
        if after_step is not None:
            state = after_step(plan, state)
        yield Step(index, plan.num_calls, t, plan.latents(state), x0, plan.noise(x, x0, index))


def gaussian_noise(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str) -> NoiseSource:
    """Return a noise source with one CPU generator per image: the noise does not depend on batch size or device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[str],
    negative_prompt: str = "",
    sampler: Sampler | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    seeds: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Generate one image per prompt.

    Args:
        model: Model components, such as `sd.model` of a loaded `StableDiffusion`.
        prompts: Text prompts.
        negative_prompt: Text describing what to avoid, shared by all images.
        sampler: Sampler; DPM-Solver++ (2M) by default.
        num_inference_steps: Number of denoising steps.
        guidance_scale: Strength of classifier-free guidance; 1 disables it.
        seeds: One random seed per prompt; 0, 1, 2, … by default.

    Raises:
        ValueError: If `prompts` is a string or empty, or the number of seeds differs from the number of prompts.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of prompts, got {prompts!r}")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"expected one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
    # 1. prompts to text embeddings: (n, 77, d)
    weight = model.unet.conv_in.weight
    texts = [*prompts, *[negative_prompt] * len(prompts)]
    cond, uncond = model.text_encoder(model.tokenizer(texts).to(weight.device)).chunk(2)
    # 2. noise to latents: (n, 4, h/8, w/8)
    size = model.config.unet.sample_size
    noise = gaussian_noise(seeds, (model.config.autoencoder.latent_channels, size, size), weight.device)
    denoise = guided(model.unet, cond, uncond if guidance_scale != 1 else None, Guidance(guidance_scale))
    plan = (sampler or Sampler("dpmpp_2m")).plan(model.schedule, num_inference_steps)
    for step in sample(denoise, plan, noise):
        latents = step.latents
    # 3. latents to images: (n, 3, h, w)
    latents = latents.to(weight.dtype) / model.config.autoencoder.scaling_factor
    return to_pil(model.autoencoder.decode(latents))
