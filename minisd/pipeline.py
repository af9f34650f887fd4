"""The pipeline: text encoder, UNet, sampler and autoencoder, put together so that a prompt becomes a picture."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import checkpoint
from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.folder import Defaults
from minisd.images import from_pil, to_pil
from minisd.samplers import Run, Sampler
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

MAX_SEED = 2**63 - 1


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


class StableDiffusion:
    """Text to image, image to image: the public class that runs the parts.

    The parts are attributes to take apart: tokenizer, text_encoder, unet, autoencoder, schedule. The object keeps no
    state between calls, so threads may share it.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        unet: UNet,
        autoencoder: Autoencoder,
        defaults: Defaults | None = None,
    ) -> None:
        self.config, self.defaults = config, defaults or Defaults()
        self.tokenizer, self.text_encoder, self.unet, self.autoencoder = tokenizer, text_encoder, unet, autoencoder
        self.schedule = Schedule(config.schedule)

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.unet.conv_in.weight.dtype

    @torch.inference_mode()
    def encode_text(self, prompts: str | Sequence[str], clip_skip: int = 1) -> Tensor:
        """Prompts to context (n, 77, width). Words past the 77th token are dropped, with a warning that says which."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts:
            if lost := self.tokenizer.truncated(prompt):
                warnings.warn(f"the prompt is longer than 77 tokens; this was left out: {lost!r}", stacklevel=2)
        ids = self.tokenizer(prompts).to(self.device)
        return _finite(self.text_encoder(ids, clip_skip), "text encoder")

    @torch.inference_mode()
    def encode_image(self, image: Image.Image | Tensor) -> Tensor:
        """A PIL picture, or images (n, 3, h, w) in [-1, 1], to latents (n, 4, h/8, w/8): the scaled mean."""
        images = image if isinstance(image, Tensor) else from_pil(image)
        mean = self.autoencoder.encode(images.to(self.device, self.dtype)).mean
        return _finite(mean * self.autoencoder.config.scaling_factor, "autoencoder's encoder")

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (n, 4, h/8, w/8), scaled, to PIL pictures."""
        return to_pil(self.decode_to_tensor(latents))

    @torch.inference_mode()
    def decode_to_tensor(self, latents: Tensor) -> Tensor:
        """Latents (n, 4, h/8, w/8), scaled, to images (n, 3, h, w), about [-1, 1] and not clipped."""
        unscaled = latents.to(self.device, self.dtype) / self.autoencoder.config.scaling_factor
        return _finite(self.autoencoder.decode(unscaled), "autoencoder's decoder")

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of the prompt with a token that the text encoder never learned: its embedding is all zeros."""
        table = self.text_encoder.token_embedding.weight
        words = []
        for word in dict.fromkeys(re.findall(r"[\w'-]+", prompt)):
            ids = self.tokenizer.encode(word)
            if ids and not bool(table[torch.tensor(ids, device=table.device)].any(dim=1).all()):
                words.append(word)
        return words

    def denoise(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Tensor | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        seed: int | Sequence[int] | None = None,
        sampler: str | Sampler | None = None,
        clip_skip: int = 1,
    ) -> Iterator[Step]:
        """Run the sampler, one `Step` per call of the UNet; `decode(step.latents)` of the last is the picture.

        prompt: one, or one per image. image: start from this picture (resized by nobody: its sides must be multiples
        of 8), of which `strength` in (0, 1] is redrawn: int(steps · strength) steps run. guidance_scale: 1 follows the
        prompt alone, 0 the negative prompt alone, larger values exaggerate the difference. seed: one number (image i
        uses seed + i) or one per image. sampler: a name or a `Sampler`. What is None comes from `self.defaults`.
        Raises ValueError for a value out of range, before any work is done.
        """
        if self.unet.config.in_channels != self.autoencoder.config.latent_channels:
            raise ValueError(
                f"this UNet takes {self.unet.config.in_channels} channels: an inpainting model, which needs a mask; "
                f"expected one that takes {self.autoencoder.config.latent_channels}"
            )
        prompts = _listed(prompt, "prompt")
        negatives = _listed(negative_prompt, "negative_prompt")
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.defaults.guidance_scale if guidance_scale is None else float(guidance_scale)
        if not abs(guidance) < float("inf"):
            raise ValueError(
                f"guidance_scale={guidance}; expected a finite number, such as {self.defaults.guidance_scale}"
            )
        chosen = self.defaults.sampler if sampler is None else sampler
        chosen = Sampler(chosen) if isinstance(chosen, str) else chosen
        skipped = 0 if image is None else _skipped_steps(steps, strength)
        run = chosen.plan(self.schedule, steps, start=skipped)
        generators = [torch.Generator().manual_seed(s) for s in seeds(seed, len(prompts))]
        shape = self._latent_shape(height, width, image)
        return self._denoise(prompts, negatives, image, guidance, run, generators, shape, clip_skip)

    @torch.inference_mode()
    def _denoise(
        self,
        prompts: list[str],
        negatives: list[str],
        image: Image.Image | Tensor | None,
        guidance: float,
        run: Run,
        generators: list[torch.Generator],
        shape: tuple[int, int, int],
        clip_skip: int,
    ) -> Iterator[Step]:
        def draw() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        texts = ([] if guidance == 1 else negatives) + ([] if guidance == 0 else prompts)
        context = self.encode_text(texts, clip_skip)
        latents = None if image is None else self.encode_image(image).float()
        state = run.start(draw(), latents)
        for index, t in enumerate(run.timesteps):
            x = run.model_input(state)
            prediction = self.predict(x, t, context, guidance)
            state, x0 = run.step(state, prediction, draw() if run.needs_noise(index) else None)
            yield Step(index, run.calls, t, run.latents(state), x0, run.noise(x, x0, index))

    def predict(self, latents: Tensor, t: float, context: Tensor, guidance: float = 1.0) -> Tensor:
        """The UNet's prediction, guided when the context (2n, 77, d) holds negative and positive prompts.

        latents (n, 4, h/8, w/8) -> prediction (n, 4, h/8, w/8), float32.
        Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6.
        """
        both = len(context) == 2 * len(latents)
        x = torch.cat([latents, latents]) if both else latents
        timestep = torch.tensor(t, device=self.device, dtype=torch.float32)
        prediction = self.unet(x.to(self.dtype), timestep, context).float()
        if not both:
            return prediction
        # ε = ε_negative + s (ε_positive − ε_negative)
        negative, positive = prediction.chunk(2)
        return negative + guidance * (positive - negative)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
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

    def _finish(self, steps: Iterator[Step], numbers: list[int], progress: bool | None) -> list[Image.Image]:
        with tqdm(disable=None if progress is None else not progress, unit="step", leave=False) as bar:
            for step in steps:
                bar.total = step.calls
                bar.update()
        pictures = self.decode(_finite(step.latents, "UNet"))
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

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **choices: Any,
    ) -> Self:
        """Load a model: nothing for the shipped tiny one, a hub id, a diffusers folder, a .safetensors or .ckpt file.

        device: by default cuda, mps or cpu, the first that is there. dtype: by default float16 on cuda, else float32.
        Other choices (variant, prediction_type, revision …) go to `checkpoint.load`, which says what it raises.
        """
        place = torch.device(device) if device is not None else best_device()
        precision = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
        loaded = checkpoint.load(source, device=place, dtype=precision, **choices)
        return cls(
            loaded.config, loaded.tokenizer, loaded.text_encoder, loaded.unet, loaded.autoencoder, loaded.defaults
        )

    def save_pretrained(self, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a folder that diffusers, transformers and minisd load. dtype: by default the weights' own."""
        checkpoint.save(self, folder, dtype)


def best_device() -> torch.device:
    """The fastest device of this machine: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image: a number counts up, a list is taken as it is, None draws a first one at random."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    numbers = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} seeds for {count} images; give one number, or one for each")
    for number in numbers:
        if not 0 <= number <= MAX_SEED:
            raise ValueError(f"seed={number}; expected a whole number from 0 to {MAX_SEED}")
    return numbers


def _listed(text: str | Sequence[str], name: str) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"{name} must be a string or a non-empty list of strings; got {text!r}")
    return texts


def _skipped_steps(steps: int, strength: float) -> int:
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}; expected more than 0 (keep the picture) and at most 1 (forget it)")
    if (running := int(steps * strength)) < 1:
        raise ValueError(f"{steps} steps at strength {strength} run none; raise either, so that steps · strength ≥ 1")
    return steps - running


def _finite(x: Tensor, part: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        advice = "load the model in float32" if x.dtype == torch.float16 else "check the checkpoint"
        raise FloatingPointError(f"the {part} returned NaN or infinity in {x.dtype}; {advice}")
    return x
