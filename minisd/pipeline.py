"""The pipeline: text encoder, UNet, sampler and autoencoder, put together so that a prompt becomes a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd.editing import Hole, extend, hide, latent_mask, paste, read_mask, slerp
from minisd.guidance import Guidance
from minisd.images import from_pil, to_pil
from minisd.noise import Noise, seeds
from minisd.parts import Parts, finite
from minisd.prompts import common_length, read
from minisd.samplers import Run, Sampler


@dataclass(frozen=True, eq=False)
class Step:
    """What one call of the UNet brought.

    index: of the call, from 0. calls: how many there will be (PNDM and Heun make more than they have steps).
    t: the timestep the UNet was given. latents: after the step, (n, 4, h/8, w/8), at the model's own
    (variance-preserving) scale whatever the sampler. x0: the clean latents predicted at this call. noise: the noise
    predicted, after guidance.
    """

    index: int
    calls: int
    t: float
    latents: Tensor
    x0: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False)
class _Given:
    """What a run starts from, checked; see `StableDiffusion.denoise`."""

    prompts: list[str]
    negatives: list[str]
    prompt_embeds: Tensor | None
    image: Image.Image | Tensor | None
    mask: Tensor | None
    latents: Tensor | None
    clip_skip: int
    strength: float


class StableDiffusion(Parts):
    """Text to image, image to image, inpainting: the public class that runs the parts.

    The parts are attributes to take apart: tokenizer, text_encoder, unet, autoencoder, schedule. Drawing keeps no
    state between calls, so threads may share the object; only loading and setting adapters changes it.
    """

    def denoise(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Tensor | None = None,
        mask_image: Image.Image | Tensor | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | Sampler | None = None,
        clip_skip: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> Iterator[Step]:
        """Run the sampler, one `Step` per call of the UNet; `decode(step.latents)` of the last is the picture.

        prompt: one, or one per image, with weights in brackets, as the negative one may have (see `prompts.py`).
        image: start from this picture. Nobody resizes it: its sides must be multiples of 8.
        mask_image: of the picture's size; only what is white is redrawn.
        strength: how much of the picture is redrawn, in (0, 1]: int(steps · strength) steps run. By default 0.8, and 1
        with a mask.
        guidance_scale: one number, or one per image. It, guidance_rescale, guidance_interval: see `guidance.Guidance`.
        seed: one number (image i uses seed + i) or one per image.
        sampler: a name or a `Sampler`.
        latents: the first noise, unit Gaussian (n, 4, h/8, w/8), in place of the seed's.
        prompt_embeds: the context (n, 77·k, width), in place of the prompt's.

        What is None comes from `self.defaults`. Stop early by leaving the loop.
        Raises ValueError for a value out of range, before any work is done.
        """
        prompts = _listed(prompt, "prompt")
        negatives = _listed(negative_prompt, "negative_prompt")
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        for text in dict.fromkeys([*prompts, *negatives]):
            read(text, self.tokenizer)
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        scale = tuple(map(float, scale)) if isinstance(scale, Sequence) else float(scale)
        guidance = Guidance(scale, guidance_rescale, guidance_interval)
        guidance.scales(len(prompts))
        shape = self._latent_shape(height, width, image)
        mask = self._read_mask(image, mask_image)
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        skipped = 0 if image is None else _skipped_steps(steps, strength)
        chosen = self.defaults.sampler if sampler is None else sampler
        chosen = Sampler(chosen) if isinstance(chosen, str) else chosen
        run = chosen.plan(self.schedule, steps, start=skipped)
        noise = Noise.seeded(seeds(seed, len(prompts)), shape, self.device)
        if latents is not None:
            _check_shape("latents", latents, (len(prompts), *shape))
        if prompt_embeds is not None:
            chunks = max(1, prompt_embeds.shape[1] // 77) if prompt_embeds.ndim == 3 else 1
            width = self.config.text_encoder.hidden_size
            _check_shape("prompt_embeds", prompt_embeds, (len(prompts), 77 * chunks, width))
        given = _Given(prompts, negatives, prompt_embeds, image, mask, latents, clip_skip, strength)
        return self._denoise(given, guidance, run, noise)

    @torch.inference_mode()
    def _denoise(self, given: _Given, guidance: Guidance, run: Run, noise: Noise) -> Iterator[Step]:
        plain, against = self._contexts(given, guidance)
        first = noise.draw() if given.latents is None else given.latents.float().to(self.device)
        latents = None if given.image is None else self.encode_image(given.image).float()
        hole = self._hole(given, latents)
        # a mask at full strength begins with noise alone: nothing of what was under it shall shine through
        state = run.start(first, None if hole and given.strength == 1 else latents)
        beside = hole.channels(len(first)) if hole else None
        with self._using(self.unet):
            for index, t in enumerate(run.timesteps):
                x = run.model_input(state)
                seen = x if beside is None else torch.cat([x, beside], dim=1)
                acts = against is not None and guidance.acts(index / run.calls)
                context = torch.cat([against, plain]) if against is not None and acts else plain
                prediction = self.predict(seen, t, context, guidance)
                state, x0 = run.step(state, prediction, noise.draw() if run.needs_noise(index) else None)
                state = hole.keep(run, state, first) if hole else state
                yield Step(index, run.calls, t, run.latents(state), x0, run.noise(x, x0, index))

    def _contexts(self, given: _Given, guidance: Guidance) -> tuple[Tensor, Tensor | None]:
        """The context of the prompts and, where guidance needs it, that of the negative ones; one call for both."""
        scales = guidance.scales(len(given.prompts))
        guided = any(scale not in (0, 1) for scale in scales)
        if given.prompt_embeds is None:
            # at scale 0 the negative prompt is the prompt
            plain = [p if s else n for p, n, s in zip(given.prompts, given.negatives, scales, strict=True)]
            contexts = self.encode_text([*plain, *(given.negatives if guided else ())], given.clip_skip)
            return contexts[: len(plain)], contexts[len(plain) :] if guided else None
        embeds = given.prompt_embeds.to(self.device, self.dtype)
        if all(scale == 1 for scale in scales):
            return embeds, None
        embeds, against = common_length(embeds, self.encode_text(given.negatives, given.clip_skip))
        embeds = torch.where(embeds.new_tensor(scales).view(-1, 1, 1) == 0, against, embeds)
        return embeds, against if guided else None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | Sampler | None = None,
        num_images_per_prompt: int = 1,
        clip_skip: int = 1,
        progress: bool | None = None,
    ) -> Any:
        """Draw: one PIL picture for one prompt, or a list for a list of prompts or several images per prompt.

        Arguments as for `denoise`. Every picture's `.info["seed"]` is the seed that draws it again. progress: show a
        bar; by default only on a terminal. Raises FloatingPointError, naming the part, when a part returns NaN.
        """
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}; expected 1 or more")
        prompts = [p for p in _listed(prompt, "prompt") for _ in range(num_images_per_prompt)]
        numbers = seeds(seed, len(prompts))
        if not isinstance(negative_prompt, str) and len(negative_prompt) > 1:
            negative_prompt = [p for p in negative_prompt for _ in range(num_images_per_prompt)]
        steps = self.denoise(
            prompts,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            height=height,
            width=width,
            seed=numbers,
            sampler=sampler,
            clip_skip=clip_skip,
        )
        pictures = self._finish(steps, numbers, progress)
        return pictures[0] if isinstance(prompt, str) and num_images_per_prompt == 1 else pictures

    def image_to_image(
        self, prompt: str, image: Image.Image | Tensor, strength: float = 0.8, **choices: Any
    ) -> Image.Image:
        """Redraw a picture towards a prompt: strength near 0 keeps it, 1 forgets it. Arguments as for `denoise`."""
        progress = choices.pop("progress", None)
        numbers = seeds(choices.pop("seed", None), 1)
        steps = self.denoise(prompt, image, strength=strength, seed=numbers, **choices)
        return self._finish(steps, numbers, progress)[0]

    def inpaint(
        self, prompt: str, image: Image.Image, mask_image: Image.Image | Tensor, strength: float = 1.0, **choices: Any
    ) -> Image.Image:
        """Redraw what is white in the mask; what is black comes back exactly. Arguments as for `denoise`.

        Works with any UNet, and with one of 9 input channels, trained for it, as such.
        """
        mask = read_mask(mask_image, image.size)
        progress = choices.pop("progress", None)
        numbers = seeds(choices.pop("seed", None), 1)
        steps = self.denoise(prompt, image, mask, strength=strength, seed=numbers, **choices)
        drawn = self._finish(steps, numbers, progress)[0]
        result = paste(drawn, to_pil(from_pil(image))[0], mask)
        result.info["seed"] = numbers[0]
        return result

    def outpaint(
        self,
        prompt: str,
        image: Image.Image,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        **choices: Any,
    ) -> Image.Image:
        """Draw beyond the edges of a picture, by so many pixels on each side, multiples of 8; `inpaint` does it."""
        canvas, mask = extend(to_pil(from_pil(image))[0], left, right, top, bottom)
        return self.inpaint(prompt, canvas, mask, **choices)

    def interpolate(
        self,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        count: int = 8,
        progress: bool | None = None,
        **choices: Any,
    ) -> list[Image.Image]:
        """Draw `count` pictures on the way from one prompt and seed to another, both ends included.

        Contexts go along a straight line, first noises along an arc (`editing.slerp`). Arguments as for `denoise`.
        """
        if count < 2:
            raise ValueError(f"count={count}; expected 2 or more: both ends are drawn")
        shares = torch.linspace(0, 1, count).tolist()
        shape = self._latent_shape(choices.get("height"), choices.get("width"), None)
        start, end = (Noise.seeded([seed], shape, self.device).draw() for seed in seeds)
        one, two = self.encode_text(list(prompts), choices.get("clip_skip", 1)).split(1)
        noises = torch.cat([slerp(start, end, share) for share in shares])
        contexts = torch.cat([(1 - share) * one + share * two for share in shares])
        steps = self.denoise(
            [prompts[0]] * count, latents=noises, prompt_embeds=contexts, seed=[seeds[0]] * count, **choices
        )
        return self._finish(steps, [seeds[0]] * count, progress)

    def _read_mask(self, image: Image.Image | Tensor | None, mask: Image.Image | Tensor | None) -> Tensor | None:
        channels, plain = self.unet.config.in_channels, self.autoencoder.config.latent_channels
        if mask is None:
            if channels != plain:
                raise ValueError(
                    f"this UNet takes {channels} channels: an inpainting model, which needs image and mask_image; "
                    f"for text alone expected one that takes {plain}"
                )
            return None
        if image is None:
            raise ValueError("mask_image says which part of a picture is redrawn; pass the picture too, as image")
        size = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
        return read_mask(mask, size)

    def _hole(self, given: _Given, latents: Tensor | None) -> Hole | None:
        if given.mask is None or given.image is None or latents is None:
            return None
        masked = None
        if self.unet.config.in_channels != self.autoencoder.config.latent_channels:
            images = given.image if isinstance(given.image, Tensor) else from_pil(given.image)
            masked = self.encode_image(hide(images, given.mask)).float()
        return Hole(latent_mask(given.mask, self.autoencoder.config.downscale).to(latents), latents, masked)

    def _finish(self, steps: Iterator[Step], numbers: list[int], progress: bool | None) -> list[Image.Image]:
        with tqdm(disable=None if progress is None else not progress, unit="step", leave=False) as bar:
            for step in steps:
                bar.total = step.calls
                bar.update()
        pictures = self.decode(finite(step.latents, "UNet"))
        for picture, number in zip(pictures, numbers, strict=True):
            picture.info["seed"] = number
        return pictures

    def _latent_shape(
        self, height: int | None, width: int | None, image: Image.Image | Tensor | None
    ) -> tuple[int, int, int]:
        factor, channels = self.autoencoder.config.downscale, self.autoencoder.config.latent_channels
        if image is not None:
            given = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
            height, width = height or given[0], width or given[1]
            if (height, width) != tuple(given):
                raise ValueError(f"image is {given[1]}×{given[0]}, not {width}×{height}; resize it first")
        side = self.unet.config.sample_size * factor
        height, width = side if height is None else height, side if width is None else width
        for name, value in (("height", height), ("width", width)):
            if value < factor or value % factor:
                raise ValueError(f"{name}={value}; expected a positive multiple of {factor}, such as {side}")
        return channels, height // factor, width // factor

def _listed(text: str | Sequence[str], name: str) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"{name} must be a string or a non-empty list of strings; got {text!r}")
    return texts


def _check_shape(name: str, given: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(given.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {expected}")


def _skipped_steps(steps: int, strength: float) -> int:
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}; expected more than 0 (keep the picture) and at most 1 (forget it)")
    if (running := int(steps * strength)) < 1:
        raise ValueError(f"{steps} steps at strength {strength} run none; raise either, so that steps · strength ≥ 1")
    return steps - running
