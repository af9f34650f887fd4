"""From a prompt to a picture: the parts of a model, the denoising loop, and `generate`, which joins them."""

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

Denoiser = Callable[[Tensor, Tensor, float], Tensor]  # (latents, timestep, progress from 0 to 1) -> prediction
NoiseSource = Callable[[], Tensor]  # the next unit Gaussian noise, (n, 4, h/8, w/8)


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of a Stable Diffusion."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    autoencoder: Autoencoder

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the UNet was trained with."""
        return Schedule(self.config.schedule)


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the UNet.

    Attributes:
        index: of the call, from 0.
        num_calls: how many there will be (PNDM and Heun make more calls than steps).
        t: the timestep the UNet was given.
        latents: after the step, (n, 4, h/8, w/8), at the scale the UNet sees, whatever the sampler.
        x0: the clean latents predicted at this call.
        noise: the noise predicted at this call, after guidance.
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
        unet: the UNet, or what is called like it.
        cond: the context of the prompts, (n, tokens, d).
        uncond: the context of the negative prompts, or None for no guidance.
        guidance: how both predictions are combined, and when.
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
    """Run a sampler and yield every step; the last one's latents are the result.

    Args:
        denoise: predicts epsilon or v; wrap it to change what the UNet sees or does, as `guided` does.
        plan: the run, planned by a sampler.
        noise: the source of the first noise, and of the fresh noise of samplers that add some.
        latents: start from these, noised to the plan's first level (image-to-image), not from noise alone.
        after_step: changes the state after each step, as inpainting does.
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
    """Return a stream of noise with one CPU generator per image, so that neither batch nor device changes a picture."""
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
    seeds: Sequence[int] = (0,),
) -> list[Image.Image]:
    """Draw one picture for each prompt: the whole of text to image.

    Args:
        model: the parts; those of a loaded `StableDiffusion` are `sd.model`.
        prompts: what to draw.
        negative_prompt: what to keep away from.
        sampler: how to walk from noise to a picture; by default DPM++ 2M.
        num_inference_steps: the steps of the sampler.
        guidance_scale: how strongly to follow the prompt; 1 is without guidance.
        seeds: one for each prompt.
    """
    # 1. words to context: (n, 77, d)
    weight = model.unet.conv_in.weight
    cond, uncond = (
        model.text_encoder(model.tokenizer(texts).to(weight.device))
        for texts in (list(prompts), [negative_prompt] * len(prompts))
    )
    # 2. noise to latents: (n, 4, h/8, w/8)
    size = model.config.unet.sample_size
    noise = gaussian_noise(seeds, (model.config.autoencoder.latent_channels, size, size), weight.device)
    denoise = guided(model.unet, cond, uncond, Guidance(guidance_scale))
    plan = (sampler or Sampler("dpmpp_2m")).plan(model.schedule, num_inference_steps)
    *_, last = sample(denoise, plan, noise)
    # 3. latents to pixels: (n, 3, h, w)
    latents = last.latents.to(weight.dtype) / model.config.autoencoder.scaling_factor
    return to_pil(model.autoencoder.decode(latents))
