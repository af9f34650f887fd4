"""`StableDiffusion`, the public class: it checks what it is given and wires features around the core's loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.editing import KeepUnmasked, latent_mask, masked_image, with_channels
from minisd.features.adapters import Adapters
from minisd.features.deepcache import DeepCache
from minisd.features.fast import speed_up
from minisd.features.prompts import common_length, encode_prompts, find_unknown_words
from minisd.features.tiling import tiled
from minisd.features.validate import (
    check_finite,
    check_finite_input,
    check_float,
    check_int,
    check_shape,
    check_strings,
    check_tensor,
)
from minisd.generate import Model, NoiseSource, Step, gaussian_noise, guided, sample
from minisd.guidance import Guidance
from minisd.images import to_pil
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline import memory
from minisd.pipeline.checks import Request, check_image, check_memory, check_request, check_size
from minisd.pipeline.editing import ImageEditing, ImageInput, Prompt
from minisd.pipeline.model_files import ModelFiles
from minisd.pipeline.settings import Settings
from minisd.preview import linear_preview
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet


class StableDiffusion(ImageEditing, ModelFiles):
    """Text to image, image to image, inpainting.

    The parts are attributes to take apart: tokenizer, text_encoder, unet, autoencoder, schedule. Drawing keeps no state
    between calls, so threads may share the object; only loading and setting adapters changes it.

    Args:
        config, tokenizer, text_encoder, unet, autoencoder: the parts of the model.
        defaults: how it is sampled unless a call says otherwise.
        offload: the device on which a part is only while it computes.
        tile: encode and decode one picture at a time, and large ones in tiles.
    """

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    autoencoder: Autoencoder

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        unet: UNet,
        autoencoder: Autoencoder,
        defaults: Defaults | None = None,
        offload: torch.device | None = None,
        tile: bool = False,
    ) -> None:
        self.config, self.defaults = config, defaults or Defaults()
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.unet, self.autoencoder = unet, autoencoder
        speed_up(unet)
        speed_up(autoencoder)
        self.schedule = Schedule(config.schedule)
        self.adapters = Adapters()
        self.offload, self.tile = offload, unet.config.sample_size * 3 // 2 if tile else None
        self.downscale = config.autoencoder.downscale  # pixels for each latent, along a side

    @property
    def model(self) -> Model:
        """The parts as the core's `generate` takes them."""
        return Model(self.config, self.tokenizer, self.text_encoder, self.unet, self.autoencoder)

    @property
    def device(self) -> torch.device:
        """Where the parts compute."""
        return self.offload or self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.unet.conv_in.weight.dtype

    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: Prompt = "",
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        preset: str | None = None,
        progress: bool | None = None,
        **settings: Any,
    ) -> Any:
        """Draw one PIL picture for one prompt, or a list for a list of prompts or several images per prompt.

        Every picture's `.info["seed"]` is the seed that draws it again.

        Args:
            prompt, negative_prompt, seed, preset, settings: see `denoise`.
            num_images_per_prompt: pictures for each prompt, each with the next seed.
            progress: show a progress bar; by default only on a terminal.
        """
        chosen = self._settings(preset, settings)
        count = check_int("num_images_per_prompt", num_images_per_prompt, 1, 2**31)
        prompts, negatives = check_strings("prompt", prompt), check_strings("negative_prompt", negative_prompt)
        check_size(self, chosen.height, chosen.width, count * len(prompts))  # before there are lists of that length
        prompts = [text for text in prompts for _ in range(count)]
        if len(negatives) > 1:
            negatives = [text for text in negatives for _ in range(count)]
        pictures = self._draw(check_request(self, prompts, negatives, chosen, seed), progress)
        return pictures[0] if isinstance(prompt, str) and count == 1 else pictures

    def denoise(
        self,
        prompt: Prompt,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        *,
        negative_prompt: Prompt = "",
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """Run the sampler, one `Step` per call of the UNet; `decode(step.latents)` of the last is the picture.

        Leave the loop to stop early. All arguments are checked before any work is done.

        Args:
            prompt: one, or one per image, with weights in brackets (see `features.prompts`).
            image: start from this picture, or from images (1 or n, 3, h, w) in [-1, 1]. It is not resized: its sides
                must be multiples of 8.
            mask_image: of the picture's size; only what is white is redrawn.
            negative_prompt: one, or one per image.
            seed: an integer from 0 to 2⁶³ − 1 (image i uses seed + i), or one per image.
            latents: the first noise, unit Gaussian (n, 4, h/8, w/8), in place of the seed's.
            prompt_embeds: the context (n, 77·k, width), in place of the prompt's.
            preset: the name of several settings, see `features.presets`.
            settings: any field of `pipeline.settings.Settings`. What is not given comes from the preset, or from the
                model's defaults.

        Raises:
            TypeError, ValueError: an argument has the wrong type, or cannot be used.
            FloatingPointError: a part, which is named, returned NaN.
            MemoryError: memory ran out; the message says what helps.
        """
        chosen = self._settings(preset, settings)
        return self._denoise(
            check_request(self, prompt, negative_prompt, chosen, seed, image, mask_image, latents, prompt_embeds)
        )

    def _settings(self, preset: str | None, settings: Mapping[str, Any]) -> Settings:
        return Settings.choose({**settings, "preset": preset}, self.defaults)

    def _draw(self, request: Request, progress: bool | None) -> list[Image.Image]:
        with tqdm(disable=None if progress is None else not progress, unit="step", leave=False) as bar:
            for step in self._denoise(request):
                bar.total = step.num_calls
                bar.update()
        pictures = self.decode(step.latents)
        for picture, seed in zip(pictures, request.seeds, strict=True):
            picture.info["seed"] = seed
        return pictures

    @torch.inference_mode()
    def _denoise(self, request: Request) -> Iterator[Step]:
        cond, uncond = self._contexts(request)
        noise = gaussian_noise(request.seeds, request.shape, self.device)
        if request.latents is not None:
            noise = _first(request.latents.float().to(self.device), noise)
        latents = None if request.image is None else self.encode_image(request.image).float()
        unet: Callable[..., Tensor] = self.unet
        if request.settings.feature_reuse is not None:
            unet = DeepCache(self.unet, *request.settings.feature_reuse, compile_options=self._compile_options)
        denoise, after_step = guided(self._checked(unet), cond, uncond, request.guidance), None
        if request.mask is not None and request.image is not None and latents is not None:
            first = noise()
            noise = _first(first, noise)
            mask = latent_mask(request.mask, self.downscale).to(latents)
            if self.unet.config.in_channels == latents.shape[1]:
                after_step = KeepUnmasked(mask, latents, first)
            else:
                masked = self.encode_image(masked_image(request.image, request.mask)).float()
                denoise = with_channels(denoise, torch.cat([mask, masked], dim=1))
            # at full strength a masked picture begins with noise alone: nothing under the mask shows through
            latents = None if request.strength == 1 else latents
        with self._on_device(self.unet):
            for step in sample(denoise, request.plan, noise, latents, after_step):
                check_finite(step.latents, "UNet")
                yield step

    def _contexts(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """The context of the prompts and, where guidance needs it, that of the negative prompts; one call for both."""
        scales, negatives = request.scales, request.negative_prompts
        is_guided, clip_skip = any(scale not in (0, 1) for scale in scales), request.settings.clip_skip
        if request.prompt_embeds is None:
            # at scale 0 the negative prompt is drawn
            texts = [p if scale else n for p, n, scale in zip(request.prompts, negatives, scales, strict=True)]
            contexts = self.encode_text([*texts, *(negatives if is_guided else ())], clip_skip)
            return contexts[: len(texts)], contexts[len(texts) :] if is_guided else None
        cond = request.prompt_embeds.to(self.device, self.dtype)
        if all(scale == 1 for scale in scales):
            return cond, None
        cond, uncond = common_length(cond, self.encode_text(negatives, clip_skip))
        cond = torch.where(cond.new_tensor(scales).view(-1, 1, 1) == 0, uncond, cond)
        return cond, uncond if is_guided else None

    def _checked(self, unet: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Raise FloatingPointError as soon as a prediction is not finite."""

        def call(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            prediction = self._check_part(unet(latents, timestep, context), "UNet")
            # a compiled UNet may reuse the memory of its output at the next call
            return prediction.clone() if self._compile_options is not None else prediction

        return call

    def _check_part(self, output: Tensor, part: str) -> Tensor:
        active = [name for name, lora in self.adapters.loras.items() if lora.weight]
        return check_finite(output, f"{part} with LoRA {', '.join(active)}" if active else part)

    @torch.inference_mode()
    def encode_text(self, prompts: Prompt, clip_skip: int = 1) -> Tensor:
        """Encode prompts, with weights in brackets, to context (n, 77·k, width); see `features.prompts`.

        A prompt of more than 75 tokens is read in k chunks, each by itself, and a warning says so. Prompts of different
        k are brought to one length. Raises ValueError for invalid weights and for prompts that are too long.
        """
        texts = check_strings("prompts", prompts)
        check_int("clip_skip", clip_skip, 1, self.config.text_encoder.num_hidden_layers)

        def encode(ids: Tensor) -> Tensor:
            with self._on_device(self.text_encoder):
                return self._check_part(self.text_encoder(ids.to(self.device), clip_skip), "text encoder")

        return encode_prompts(texts, self.tokenizer, encode)

    @torch.inference_mode()
    def encode_image(self, image: ImageInput) -> Tensor:
        """Encode a PIL picture, or images (n, 3, h, w) in [-1, 1], to latents (n, 4, h/8, w/8): the scaled mean.

        Images may leave the range a little. Raises ValueError for numbers beyond [-2, 2] (pixels from 0 to 255,
        perhaps) and for sides that are not multiples of 8.
        """
        images = check_image(self, image)
        check_memory(self, len(images), images.shape[-2], images.shape[-1], encoding=True)
        with self._on_device(self.autoencoder):
            mean = self._tiled(lambda x: self.autoencoder.encode(x).mean, images.to(self.device, self.dtype))
        return check_finite(mean * self.config.autoencoder.scaling_factor, "autoencoder's encoder")

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode scaled latents (n, 4, h/8, w/8), with a spread of about 1, to PIL pictures; see `decode_to_tensor`."""
        return to_pil(self.decode_to_tensor(latents))

    @torch.inference_mode()
    def decode_to_tensor(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (n, 4, h/8, w/8) to images (n, 3, h, w), about [-1, 1] and not clipped.

        In float16 some decoders overflow; then a float32 copy decodes, and a warning says so. Raises FloatingPointError
        for NaN, in the latents or in what comes of them.
        """
        check_shape("latents", latents, "n", self.config.autoencoder.latent_channels, "h", "w")
        check_memory(self, len(latents), self.downscale * latents.shape[-2], self.downscale * latents.shape[-1])
        check_finite_input("latents", latents)
        unscaled = latents.to(self.device, self.dtype) / self.config.autoencoder.scaling_factor
        with self._on_device(self.autoencoder):
            try:
                return check_finite(self._tiled(self.autoencoder.decode, unscaled), "autoencoder's decoder")
            except FloatingPointError:
                if self.dtype != torch.float16:
                    raise
            warnings.warn("the autoencoder overflows in float16; decoding again in float32", stacklevel=2)
            images = self._tiled(deepcopy(self.autoencoder).float().decode, unscaled.float())
        return check_finite(images, "autoencoder's decoder")

    def _tiled(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the encoder or the decoder on the whole batch, or with `tile` on one picture, and one tile, at a time."""
        if self.tile is None:
            return function(x)
        factor = self.downscale
        tile, zoom = (self.tile * factor, 1 / factor) if x.shape[1] == 3 else (self.tile, factor)
        return torch.cat([tiled(function, one, tile, tile // 2, zoom) for one in x.split(1)]).to(x.dtype)

    @contextmanager
    def _on_device(self, part: nn.Module) -> Iterator[None]:
        """Within this block a part is on its device. Running out of memory there becomes a MemoryError with advice."""
        try:
            if self.offload is None:
                yield
            else:
                with memory.offloaded(part, self.offload):
                    yield
        except RuntimeError as error:
            raise memory.explain(error, part) from error

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Turn scaled latents (n, 4, h/8, w/8) into PIL pictures of their own small size, at almost no cost."""
        check_tensor("latents", latents, "n", self.config.autoencoder.latent_channels, "h", "w")
        return to_pil(linear_preview(latents, self.defaults.preview))

    def predict(self, latents: Tensor, t: float, context: Tensor, guidance: Guidance | float = 1.0) -> Tensor:
        """Call the UNet once, guided if the context (2n, 77, d) holds negative and positive prompts.

        Args:
            latents: (n, 4, h/8, w/8), or with 9 channels for an inpainting UNet.
            t: the timestep.
            context: (n, 77, d) or (2n, 77, d).
            guidance: a scale, or a `Guidance`.

        Returns:
            The prediction, (n, 4, h/8, w/8), float32. Raises FloatingPointError for NaN.
        """
        check_shape("latents", latents, "n", self.unet.config.in_channels, "h", "w")
        check_shape("context", context, "n", "tokens", self.unet.config.cross_attention_dim)
        if len(context) not in (len(latents), 2 * len(latents)):
            raise ValueError(f"{len(context)} rows of context for {len(latents)} latents; expected as many, or twice")
        check_finite_input("latents", latents)
        check_finite_input("context", context)
        context = context.to(self.dtype)
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(check_float("guidance", guidance))
        timestep = torch.tensor(check_float("t", t), device=self.device, dtype=torch.float32)
        uncond, cond = context.chunk(2) if len(context) == 2 * len(latents) else (None, context)
        with self._on_device(self.unet):
            return guided(self._checked(self.unet), cond, uncond, guidance)(latents, timestep, guidance.interval[0])

    def latent_shape(self, height: int | None = None, width: int | None = None, count: int = 1) -> tuple[int, int, int]:
        """The shape (4, h/8, w/8) of one picture's latents; what is None is the model's own size.

        Raises TypeError or ValueError for a size that so many pictures cannot have.
        """
        return check_size(self, height, width, count)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt with a token that the text encoder never learned: its embedding is all zeros."""
        (prompt,) = check_strings("prompt", prompt)
        return find_unknown_words(prompt, self.tokenizer, self.text_encoder.token_embedding.weight)


def _first(first: Tensor, rest: NoiseSource) -> NoiseSource:
    """A noise source that returns `first`, then goes on with the rest."""
    pending = [first]
    return lambda: pending.pop() if pending else rest()
