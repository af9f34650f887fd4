"""`StableDiffusion`, the public class: argument checks and optional features around the core sampling loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.editing import KeepUnmasked, latent_mask, masked_image, with_channels
from minisd.features.adapters import Adapters
from minisd.features.asynchronous import queued
from minisd.features.deepcache import DeepCache
from minisd.features.fast import speed_up
from minisd.features.lcm_unet import LCMUNet, with_scales
from minisd.features.prompt_syntax import check_single, plain
from minisd.features.prompts import encode_prompts, find_unknown_words
from minisd.features.tiling import tiled
from minisd.features.validate import (
    FiniteChecks,
    check_finite,
    check_finite_input,
    check_float,
    check_int,
    check_shape,
    check_strings,
    check_tensor,
    not_finite,
    not_finite_input,
)
from minisd.generate import Model, NoiseSource, Step, gaussian_noise, guided, sample
from minisd.guidance import Guidance
from minisd.images import to_pil
from minisd.io.diffusers_folder import Defaults
from minisd.lora import LoRA
from minisd.pipeline import memory
from minisd.pipeline.arguments import Hooks, ImageList, MaskList, Prompt
from minisd.pipeline.checks import Request, check_image, check_size
from minisd.pipeline.drawing import Drawing, with_callback
from minisd.pipeline.editing import ImageEditing
from minisd.pipeline.model_files import ModelFiles
from minisd.pipeline.prompting import denoiser
from minisd.preview import linear_preview
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet


class StableDiffusion(Drawing, ImageEditing, ModelFiles):
    """Pipeline for text-to-image, image-to-image and inpainting.

    The modules are plain attributes: tokenizer, text_encoder, unet, autoencoder, schedule. Drawing is stateless and
    thread-safe without `offload` and LoRAs in prompts; only loading and setting adapters modifies the object, and is
    refused while another thread draws.

    Args:
        config, tokenizer, text_encoder, unet, autoencoder: The configuration and the modules of the model.
        defaults: The default sampling settings.
        offload: The device to move each module to while it runs, or None to keep all modules where they are.
        tile: Whether to encode and decode images one at a time, and large ones in tiles.
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
        if type(unet) in (UNet, LCMUNet):  # layers of others may rely on inputs that stay as they are
            speed_up(unet)
        speed_up(autoencoder)
        self.schedule = Schedule(config.schedule)
        self.adapters, self.usage = Adapters(), memory.Usage()
        self._folder_loras = dict[Path, LoRA]()
        self.offload, self.tile = offload, unet.config.sample_size * 3 // 2 if tile else None
        self.downscale = config.autoencoder.downscale  # pixels per latent along each side

    @property
    def model(self) -> Model:
        """The modules as a `Model` for the core's `generate`."""
        return Model(self.config, self.tokenizer, self.text_encoder, self.unet, self.autoencoder)

    @property
    def device(self) -> torch.device:
        """The device that the modules run on."""
        return self.offload or next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.unet.parameters()).dtype

    def denoise(
        self,
        prompt: Prompt,
        image: ImageList | None = None,
        mask_image: MaskList | None = None,
        *,
        negative_prompt: Prompt = "",
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        strength: float | None = None,
        **options: Unpack[Hooks],
    ) -> Iterator[Step]:
        """Run the sampler and yield a `Step` per UNet call. `decode(step.latents)` of the last step is the result.

        Break out of the loop to stop early. All arguments are validated before any computation.

        Args:
            prompt: One prompt, or one per image, with optional weights in brackets (see `features.prompts`) and the web
                UI's syntax for prompt editing and LoRAs (see `features.prompt_syntax`).
            image: The image to start from: a PIL image, a list of them, or a tensor (1 or n, 3, h, w) in [-1, 1]. It is
                not resized; height and width must be multiples of 8. With `padding_mask_crop`, the part that is drawn
                is cut out and scaled.
            mask_image: An inpainting mask of the same size, or one per image. Only the white area is repainted.
            negative_prompt: One negative prompt, or one per image.
            seed: A seed from 0 to 2⁶³ − 1 (image i uses seed + i), or one per image.
            latents: The initial noise, unit Gaussian (n, 4, h/8, w/8). Overrides the noise drawn from the seed.
            prompt_embeds: Text embeddings (n, 77·k, width). Overrides the encoding of the prompt.
            options: `preset`, `guidance` and `callback`, see `pipeline.arguments.Hooks`, and any fields of
                `pipeline.settings.Settings`. Others default to the preset, then to the model.

        Raises:
            TypeError, ValueError: If an argument has the wrong type or an invalid value.
            FloatingPointError: If a module returns NaN or infinity. On a GPU, where no step waits for the result, it
                comes some steps later, and before the last one is yielded.
            MemoryError: If the device runs out of memory.
        """
        arguments = {**options, "seed": seed, "strength": strength}
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
        return self._denoise(self._check(arguments, image=image, mask_image=mask_image, **texts, **tensors))

    def _denoise(self, request: Request) -> Iterator[Step]:
        # a callback may compute gradients
        mode = torch.inference_mode() if request.callback is None else torch.no_grad()
        with self.usage.drawing():
            yield from mode(self._steps)(request)

    def _steps(self, request: Request) -> Iterator[Step]:
        noise, checks = gaussian_noise(request.seeds, request.shape, "cpu"), FiniteChecks()
        if self.device.type != "cpu":
            noise = queued(noise, self.device)
        if request.latents is not None:
            noise = _first(request.latents.float().to(self.device), noise)
        latents = None if request.image is None else self.encode_image(request.image).float()
        unet: Callable[..., Tensor] = self.unet
        if request.settings.feature_reuse is not None:
            unet = DeepCache(self.unet, *request.settings.feature_reuse, compile_options=self._compile_options)
        denoise, after_step = denoiser(self, request, self._checked(unet, checks)), None
        if request.mask is not None and request.image is not None and latents is not None:
            first = noise()
            noise = _first(first, noise)
            mask = latent_mask(request.mask, self.downscale).to(latents)
            if self.unet.config.in_channels == latents.shape[1]:
                after_step = KeepUnmasked(mask, latents, first)
            else:
                masked = self.encode_image(masked_image(request.image, request.mask)).float()
                denoise = with_channels(denoise, torch.cat([mask.expand(len(masked), -1, -1, -1), masked], dim=1))
            # at strength 1 inpainting starts from pure noise, so nothing under the mask shows through
            latents = None if request.strength == 1 else latents
        after = with_callback(request.callback, after_step, checks)
        with self._on_device(self.unet):
            for step in sample(denoise, request.plan, noise, latents, after):
                checks.check(step.latents, not_finite(step.latents.dtype, "UNet"))
                if step.index + 1 == step.num_calls:
                    checks.settle()
                yield step

    def _checked(self, unet: Callable[..., Tensor], checks: FiniteChecks) -> Callable[..., Tensor]:
        """Wrap a UNet to check that its predictions are finite."""

        def call(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            prediction = unet(latents, timestep, context)
            checks.check(prediction, not_finite(prediction.dtype, self._with_loras("UNet")))
            # a compiled UNet may overwrite its output buffer in the next call
            return prediction.clone() if self._compile_options is not None else prediction

        return call

    def _with_loras(self, part: str) -> str:
        """Return the name of a part for an error, with the active LoRAs."""
        active = ", ".join(self.adapters.active) if self.adapters.loras else ""
        return f"{part} with LoRA {active}" if active else part

    @torch.no_grad()
    def encode_text(self, prompts: Prompt, clip_skip: int = 1) -> Tensor:
        """Encode prompts, with optional weights in brackets, to text embeddings (n, 77·k, width).

        Prompts of more than 75 tokens are split into k chunks, encoded separately, with a warning. Shorter embeddings
        are repeated to a common length. Raises ValueError for invalid weights, overlong prompts, and prompts without a
        single encoding, such as those with prompt editing.
        """
        texts = check_strings("prompts", prompts)
        check_int("clip_skip", clip_skip, 1, self.config.text_encoder.num_hidden_layers)
        for text in texts:
            check_single(text)

        def encode(ids: Tensor) -> Tensor:
            with self._on_device(self.text_encoder):
                return check_finite(self.text_encoder(ids.to(self.device), clip_skip), self._with_loras("text encoder"))

        return encode_prompts(texts, self.tokenizer, encode)

    @torch.no_grad()
    def encode_image(self, image: ImageList) -> Tensor:
        """Encode PIL images or a tensor (n, 3, h, w) in [-1, 1] to latents (n, 4, h/8, w/8): the scaled mean.

        Values slightly outside the range are allowed. Raises ValueError for values outside [-2, 2] (such as pixels in
        0…255) and for a height or width that is not a multiple of 8.
        """
        images = check_image(self, image)
        memory.check_memory(self, len(images), images.shape[-2], images.shape[-1], encoding=True)
        with self._on_device(self.autoencoder):
            mean = self._tiled(lambda x: self.autoencoder.encode(x).mean, images.to(self.device, self.dtype))
        return check_finite(mean * self.config.autoencoder.scaling_factor, "autoencoder's encoder")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode scaled latents (n, 4, h/8, w/8), of roughly unit variance, to PIL images; see `decode_to_tensor`."""
        return to_pil(self.decode_to_tensor(latents))

    @torch.no_grad()
    def decode_to_tensor(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (n, 4, h/8, w/8) to images (n, 3, h, w), roughly in [-1, 1] and not clamped.

        If the decoder overflows in float16, it warns and decodes again in float32. Raises FloatingPointError for NaN or
        infinity in the latents or the result.
        """
        check_shape("latents", latents, "n", self.config.autoencoder.latent_channels, "h", "w")
        memory.check_memory(self, len(latents), self.downscale * latents.shape[-2], self.downscale * latents.shape[-1])
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
        """Run the encoder or decoder on the whole batch or, with `tile`, on one tile of one image at a time."""
        if self.tile is None:
            return function(x)
        factor = self.downscale
        tile, zoom = (self.tile * factor, 1 / factor) if x.shape[1] == 3 else (self.tile, factor)
        return torch.cat([tiled(function, one, tile, tile // 2, zoom) for one in x.split(1)]).to(x.dtype)

    @contextmanager
    def _on_device(self, part: nn.Module) -> Iterator[None]:
        """Keep a module on its device inside a `with` block, and convert out-of-memory errors to MemoryError."""
        try:
            if self.offload is None:
                yield
            else:
                with memory.offloaded(part, self.offload):
                    yield
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            raise MemoryError(f"out of memory in the {type(part).__name__}; {memory.ADVICE} ({error})") from error

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Approximate scaled latents (n, 4, h/8, w/8) as PIL images of size w/8 × h/8, without the decoder."""
        check_tensor("latents", latents, "n", self.config.autoencoder.latent_channels, "h", "w")
        return to_pil(linear_preview(latents, self.defaults.preview))

    def predict(self, latents: Tensor, t: float, context: Tensor, guidance: Guidance | float = 1.0) -> Tensor:
        """Call the UNet once, with classifier-free guidance if the context has 2n rows.

        Args:
            latents: The noisy latents, (n, 4, h/8, w/8), or (n, 9, h/8, w/8) for an inpainting UNet.
            t: The timestep.
            context: The text embeddings, (n, 77, d), or (2n, 77, d) with the negative prompts first.
            guidance: The guidance scale or a `Guidance`.

        Returns:
            The prediction, float32 (n, 4, h/8, w/8).
        """
        check_shape("latents", latents, "n", self.unet.config.in_channels, "h", "w")
        check_shape("context", context, "n", "tokens", self.unet.config.cross_attention_dim)
        if len(context) not in (len(latents), 2 * len(latents)):
            raise ValueError(f"{len(context)} rows of context for {len(latents)} latents; expected as many, or twice")
        checks = FiniteChecks()
        for name, value in (("latents", latents), ("context", context)):
            checks.check(value, not_finite_input(name))
        context = context.to(self.dtype)
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(check_float("guidance", guidance))
        timestep = torch.full((), check_float("t", t), device=self.device, dtype=torch.float32)
        uncond, cond = context.chunk(2) if len(context) == 2 * len(latents) else (None, context)
        unet = self._checked(self.unet, checks)
        if isinstance(self.unet, LCMUNet):
            if uncond is not None:
                raise ValueError(
                    "this model's UNet takes the guidance scale; pass the context without negative prompts"
                )
            unet = with_scales(unet, torch.tensor(guidance.scale, device=self.device))
        with self._on_device(self.unet):
            denoise = guided(unet, cond, uncond, guidance)
            prediction = denoise(latents, timestep, guidance.interval[0])
        checks.settle()
        return prediction

    def latent_shape(self, height: int | None = None, width: int | None = None, count: int = 1) -> tuple[int, int, int]:
        """Return the latent shape of one image, (4, h/8, w/8). The size defaults to the model's native size.

        Raises TypeError or ValueError for an invalid size, or if `count` such images do not fit in memory.
        """
        return check_size(self, height, width, count)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt with an untrained token, whose embedding is all zeros."""
        (prompt,) = check_strings("prompt", prompt)
        return find_unknown_words(plain(prompt), self.tokenizer, self.text_encoder.token_embedding.weight)


def _first(first: Tensor, rest: NoiseSource) -> NoiseSource:
    """Return a noise source that yields `first`, then continues with `rest`."""
    pending = [first]
    return lambda: pending.pop() if pending else rest()
