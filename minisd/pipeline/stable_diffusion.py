"""The pipeline: text encoder, UNet, sampler and autoencoder, put together so that a prompt becomes a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import noise
from minisd.attention import Kept as Projections
from minisd.attention import keep_projections
from minisd.editing import Hole, check_margins, extend, hide, latent_mask, paste, read_mask, slerp
from minisd.features import presets
from minisd.features.presets import pick
from minisd.features.prompts import common_length, read
from minisd.features.reuse import Kept, Reuse
from minisd.guidance import Guidance
from minisd.images import from_pil, to_pil
from minisd.noise import Noise, seeds
from minisd.pipeline.checks import floats, real, texts, whole
from minisd.pipeline.parts import Parts, finite
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
    image: Tensor | None
    mask: Tensor | None
    latents: Tensor | None
    clip_skip: int
    strength: float


LARGEST = 16  # times the side a model was trained at: attention then takes 65,536 times as long


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
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | Sampler | None = None,
        clip_skip: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        feature_reuse: tuple[int, int] | None = None,
        preset: str | None = None,
    ) -> Iterator[Step]:
        """Run the sampler, one `Step` per call of the UNet; `decode(step.latents)` of the last is the picture.

        prompt: one, or one per image, with weights in brackets, as the negative one may have (see `prompts.py`).
        height, width: multiples of 8, up to 16 times the model's own size. What memory cannot hold is refused.
        image: start from this picture, or from images (1 or n, 3, h, w) in [-1, 1]. Nobody resizes them: their sides
        must be multiples of 8.
        mask_image: of the picture's size; only what is white is redrawn.
        strength: how much of the picture is redrawn, in (0, 1]: int(steps · strength) steps run. By default 0.8, and 1
        with a mask.
        guidance_scale: one number, or one per image. It, guidance_rescale, guidance_interval: see `guidance.Guidance`.
        seed: one whole number from 0 to 2⁶³ − 1 (image i uses seed + i) or one per image.
        sampler: a name or a `Sampler`.
        latents: the first noise, unit Gaussian (n, 4, h/8, w/8), in place of the seed's.
        prompt_embeds: the context (n, 77·k, width), in place of the prompt's.
        feature_reuse: (every, layers), see `reuse.Reuse`; by default every call of the UNet is whole.
        preset: a name in `presets.PRESETS`.

        What is None comes from the preset, if one is named, or from `self.defaults`. Stop early by leaving the loop.
        Raises TypeError for a value of the wrong kind and ValueError for one that cannot be used, before any work is
        done; FloatingPointError, naming the part, for NaN; and MemoryError, with advice, where memory runs out.
        """
        chosen = presets.find(preset)
        prompts = texts("prompt", prompt)
        negatives = texts("negative_prompt", negative_prompt)
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        for text in dict.fromkeys([*prompts, *negatives]):
            read(text, self.tokenizer)
        scale: Any = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        scale = tuple(scale) if isinstance(scale, (list, tuple)) else scale
        interval = pick(guidance_interval, chosen.guidance_interval, (0.0, 1.0))
        guidance = Guidance(scale, guidance_rescale, interval)
        guidance.scales(len(prompts))
        images = None if image is None else self._read_image(image)
        if images is not None and len(images) not in (1, len(prompts)):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts; give one, or one for each")
        shape = self.latent_shape(height, width, len(prompts), images)
        mask = self._read_mask(images, mask_image)
        reuse = Reuse.read(pick(feature_reuse, chosen.feature_reuse), self.unet.layers)
        steps = pick(num_inference_steps, chosen.num_inference_steps, self.defaults.num_inference_steps)
        steps = whole("num_inference_steps", steps, 1, self.schedule.config.num_train_timesteps)
        if strength is not None and images is None:
            raise ValueError(f"strength={strength!r} says how much of a picture is redrawn; pass the picture, as image")
        strength = (0.8 if mask is None else 1.0) if strength is None else real("strength", strength)
        skipped = 0 if images is None else _skipped_steps(steps, strength)
        method = _sampler(pick(sampler, chosen.sampler, self.defaults.sampler))
        run = method.plan(self.schedule, steps, start=skipped)
        stream = Noise.seeded(seeds(seed, len(prompts)), shape, self.device)
        whole("clip_skip", clip_skip, 1, self.config.text_encoder.num_hidden_layers)
        if latents is not None:
            floats("latents", latents, len(prompts), *shape)
        if prompt_embeds is not None:
            tokens = prompt_embeds.shape[1] if isinstance(prompt_embeds, Tensor) and prompt_embeds.ndim == 3 else 77
            features = self.config.text_encoder.hidden_size
            floats("prompt_embeds", prompt_embeds, len(prompts), 77 * max(1, tokens // 77), features)
        given = _Given(prompts, negatives, prompt_embeds, images, mask, latents, clip_skip, strength)
        return self._denoise(given, guidance, reuse, run, stream)

    @torch.inference_mode()
    def _denoise(self, given: _Given, guidance: Guidance, reuse: Reuse, run: Run, stream: Noise) -> Iterator[Step]:
        plain, against = self._contexts(given, guidance)
        first = stream.draw() if given.latents is None else given.latents.float().to(self.device)
        latents = None if given.image is None else self.encode_image(given.image).float()
        hole = self._hole(given, latents)
        # a mask at full strength begins with noise alone: nothing of what was under it shall shine through
        state = run.start(first, None if hole and given.strength == 1 else latents)
        beside = hole.channels(len(first)) if hole else None
        timesteps = torch.tensor(run.timesteps, device=self.device, dtype=torch.float32)  # one copy to the device
        contexts = [plain.to(self.dtype)]  # without guidance, and with it: the same tensors at every call
        contexts += [] if against is None else [torch.cat([against, plain]).to(self.dtype)]
        projections: Projections = {}
        kept = Kept()
        with self._using(self.unet):
            for index, t in enumerate(run.timesteps):
                x = run.model_input(state)
                seen = x if beside is None else torch.cat([x, beside], dim=1)
                acts = against is not None and guidance.acts(index / run.calls)
                old = reuse.feature(kept, len(x) * (2 if acts else 1))
                again = [reuse.layers, old] if reuse.every > 1 else []
                with keep_projections(projections):
                    prediction, new = self._predict(
                        seen, timesteps[index], contexts[acts], guidance if acts else None, *again
                    )
                kept = reuse.keep(kept, old, new)
                state, x0 = run.step(state, prediction, stream.draw() if run.needs_noise(index) else None)
                state = hole.keep(run, state, first) if hole else state
                yield Step(index, run.calls, t, finite(run.latents(state), "UNet"), x0, run.noise(x, x0, index))

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
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | Sampler | None = None,
        num_images_per_prompt: int = 1,
        clip_skip: int = 1,
        feature_reuse: tuple[int, int] | None = None,
        preset: str | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Draw: one PIL picture for one prompt, or a list for a list of prompts or several images per prompt.

        Arguments as for `denoise`. Every picture's `.info["seed"]` is the seed that draws it again. progress: show a
        bar; by default only on a terminal. Raises FloatingPointError, naming the part, when a part returns NaN.
        """
        count = whole("num_images_per_prompt", num_images_per_prompt, 1, 2**31)
        prompts, negatives = texts("prompt", prompt), texts("negative_prompt", negative_prompt)
        self.latent_shape(height, width, count * len(prompts))  # before there are lists of that length
        prompts = [p for p in prompts for _ in range(count)]
        numbers = seeds(seed, len(prompts))
        if len(negatives) > 1:
            negatives = [p for p in negatives for _ in range(count)]
        steps = self.denoise(
            prompts,
            negative_prompt=negatives,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            height=height,
            width=width,
            seed=numbers,
            sampler=sampler,
            clip_skip=clip_skip,
            feature_reuse=feature_reuse,
            preset=preset,
        )
        pictures = self._finish(steps, numbers, progress)
        return pictures[0] if isinstance(prompt, str) and count == 1 else pictures

    def image_to_image(
        self, prompt: str, image: Image.Image | Tensor, strength: float = 0.8, **choices: Any
    ) -> Image.Image:
        """Redraw a picture towards a prompt: strength near 0 keeps it, 1 forgets it. Arguments as for `denoise`."""
        progress, prompt = choices.pop("progress", None), _one(prompt)
        numbers = seeds(choices.pop("seed", None), 1)
        steps = self.denoise(prompt, image, strength=strength, seed=numbers, **choices)
        return self._finish(steps, numbers, progress)[0]

    def inpaint(
        self, prompt: str, image: Image.Image, mask_image: Image.Image | Tensor, strength: float = 1.0, **choices: Any
    ) -> Image.Image:
        """Redraw what is white in the mask; what is black comes back exactly. Arguments as for `denoise`.

        Works with any UNet, and with one of 9 input channels, trained for it, as such.
        """
        image = to_pil(from_pil(image))[0]
        mask = read_mask(mask_image, image.size)
        progress, prompt = choices.pop("progress", None), _one(prompt)
        numbers = seeds(choices.pop("seed", None), 1)
        steps = self.denoise(prompt, image, mask, strength=strength, seed=numbers, **choices)
        drawn = self._finish(steps, numbers, progress)[0]
        result = paste(drawn, image, mask)
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
        picture = to_pil(from_pil(image))[0]
        check_margins(left, right, top, bottom)
        # refused while there is no canvas of that size yet
        self.latent_shape(picture.height + top + bottom, picture.width + left + right)
        canvas, mask = extend(picture, left, right, top, bottom)
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
        count = whole("count", count, 2, 2**31)  # both ends are drawn
        words = texts("prompts", prompts)
        if len(words) != 2:
            raise ValueError(f"{len(words)} prompts; expected two, the first picture's and the last one's")
        shape = self.latent_shape(choices.get("height"), choices.get("width"), count)
        ends = noise.seeds(seeds, 2)
        shares = torch.linspace(0, 1, count).tolist()
        start, end = (Noise.seeded([seed], shape, self.device).draw() for seed in ends)
        one, two = self.encode_text(words, choices.get("clip_skip", 1)).split(1)
        noises = torch.cat([slerp(start, end, share) for share in shares])
        contexts = torch.cat([(1 - share) * one + share * two for share in shares])
        steps = self.denoise(
            [words[0]] * count, latents=noises, prompt_embeds=contexts, seed=[ends[0]] * count, **choices
        )
        return self._finish(steps, [ends[0]] * count, progress)

    def _read_mask(self, image: Tensor | None, mask: Image.Image | Tensor | None) -> Tensor | None:
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
        return read_mask(mask, (image.shape[-1], image.shape[-2]))

    def _hole(self, given: _Given, latents: Tensor | None) -> Hole | None:
        if given.mask is None or given.image is None or latents is None:
            return None
        masked = None
        if self.unet.config.in_channels != self.autoencoder.config.latent_channels:
            masked = self.encode_image(hide(given.image, given.mask)).float()
        return Hole(latent_mask(given.mask, self.autoencoder.config.downscale).to(latents), latents, masked)

    def _finish(self, steps: Iterator[Step], numbers: list[int], progress: bool | None) -> list[Image.Image]:
        with tqdm(disable=None if progress is None else not progress, unit="step", leave=False) as bar:
            for step in steps:
                bar.total = step.calls
                bar.update()
        pictures = self.decode(step.latents)
        for picture, number in zip(pictures, numbers, strict=True):
            picture.info["seed"] = number
        return pictures

    def latent_shape(
        self, height: int | None = None, width: int | None = None, count: int = 1, images: Tensor | None = None
    ) -> tuple[int, int, int]:
        """The shape (4, h/8, w/8) of one picture's latents; what is None is the size of the images, or the model's own.

        Raises TypeError or ValueError for a size that count pictures cannot have, as `denoise` does.
        """
        factor, channels = self.autoencoder.config.downscale, self.autoencoder.config.latent_channels
        own = self.unet.config.sample_size * factor
        usual = (own, own) if images is None else images.shape[-2:]
        sides = []
        for name, value, given in (("height", height, usual[0]), ("width", width, usual[1])):
            side = whole(name, given if value is None else value, 1, LARGEST * own)
            if side % factor:
                raise ValueError(f"{name}={side}; expected a positive multiple of {factor}, such as {own}")
            sides.append(side)
        if images is not None and sides != [*usual]:
            raise ValueError(f"image is {usual[1]}×{usual[0]}, not {sides[1]}×{sides[0]}; resize it first")
        self._check_memory(count, sides[0], sides[1])
        return channels, sides[0] // factor, sides[1] // factor


def _one(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, since one picture is drawn; got {type(prompt).__name__}")
    return prompt


def _sampler(chosen: str | Sampler) -> Sampler:
    if not isinstance(chosen, (str, Sampler)):
        raise TypeError(f"sampler must be a name or a Sampler; got {type(chosen).__name__}")
    return Sampler(chosen) if isinstance(chosen, str) else chosen


def _skipped_steps(steps: int, strength: float) -> int:
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}; expected more than 0 (keep the picture) and at most 1 (forget it)")
    if (running := int(steps * strength)) < 1:
        raise ValueError(f"{steps} steps at strength {strength} run none; raise either, so that steps · strength ≥ 1")
    return steps - running
