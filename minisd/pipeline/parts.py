"""The parts of a model, on their device, and what each of them does; `stable_diffusion.py` puts them together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.features.adapters import Adapters
from minisd.features.fast import speed_up
from minisd.features.prompts import encode_prompts, find_unknown_words
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
from minisd.generate import Model, guided
from minisd.guidance import Guidance
from minisd.images import to_pil
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline import memory
from minisd.pipeline.checks import check_image, check_size
from minisd.preview import linear_preview
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

Prompt = str | Sequence[str]
ImageInput = Image.Image | Tensor


class Parts:
    """Tokenizer, text encoder, UNet, autoencoder and noise schedule of one model.

    Args:
        config, tokenizer, text_encoder, unet, autoencoder: the parts.
        defaults: how the model is sampled unless a call says otherwise.
        offload: the device on which a part is only while it computes.
        tile: encode and decode one picture at a time, and large ones in tiles.
    """

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
        self._compile_options: dict[str, Any] | None = None

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

    @torch.inference_mode()
    def encode_text(self, prompts: Prompt, clip_skip: int = 1) -> Tensor:
        """Encode prompts, with weights in brackets, to context (n, 77·k, width); see `features.prompts`.

        A prompt of more than 75 tokens is read in k chunks, each by itself, and a warning says so. Prompts of different
        k are brought to one length. Raises ValueError for invalid weights and for prompts that are too long.
        """
        texts = check_strings("prompts", prompts)
        check_int("clip_skip", clip_skip, 1, self.config.text_encoder.num_hidden_layers)

        def encode(ids: Tensor) -> Tensor:
            with memory.on_device(self.text_encoder, self.offload):
                return self._check_part(self.text_encoder(ids.to(self.device), clip_skip), "text encoder")

        return encode_prompts(texts, self.tokenizer, encode)

    @torch.inference_mode()
    def encode_image(self, image: ImageInput) -> Tensor:
        """Encode a PIL picture, or images (n, 3, h, w) in [-1, 1], to latents (n, 4, h/8, w/8): the scaled mean.

        Images may leave the range a little. Raises ValueError for numbers beyond [-2, 2] (pixels from 0 to 255,
        perhaps) and for sides that are not multiples of 8.
        """
        images = check_image(self, image)
        self.check_memory(len(images), images.shape[-2], images.shape[-1], encoding=True)
        with memory.on_device(self.autoencoder, self.offload):
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
        self.check_memory(len(latents), self.downscale * latents.shape[-2], self.downscale * latents.shape[-1])
        check_finite_input("latents", latents)
        unscaled = latents.to(self.device, self.dtype) / self.config.autoencoder.scaling_factor
        with memory.on_device(self.autoencoder, self.offload):
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
        with memory.on_device(self.unet, self.offload):
            return guided(self._checked(self.unet), cond, uncond, guidance)(latents, timestep, guidance.interval[0])

    def _checked(self, unet: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Raise FloatingPointError as soon as a prediction is not finite."""

        def call(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            prediction = self._check_part(unet(latents, timestep, context), "UNet")
            # a compiled UNet may reuse the memory of its output at the next call
            return prediction.clone() if self._compile_options is not None else prediction

        return call

    def _check_part(self, output: Tensor, part: str) -> Tensor:
        active = [name for name, weight in self.adapters.weights.items() if weight]
        return check_finite(output, f"{part} with LoRA {', '.join(active)}" if active else part)

    def latent_shape(self, height: int | None = None, width: int | None = None, count: int = 1) -> tuple[int, int, int]:
        """The shape (4, h/8, w/8) of one picture's latents; what is None is the model's own size.

        Raises TypeError or ValueError for a size that so many pictures cannot have.
        """
        return check_size(self, height, width, count)

    def check_memory(self, count: int, height: int, width: int, encoding: bool = False) -> None:
        """Raise ValueError if so many pictures of so many pixels cannot fit into what the device has left."""
        memory.check_memory(
            self.config,
            count,
            height,
            width,
            device=self.device,
            itemsize=self.dtype.itemsize,
            tiled=self.tile is not None,
            encoding=encoding,
        )

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt with a token that the text encoder never learned: its embedding is all zeros."""
        (prompt,) = check_strings("prompt", prompt)
        return find_unknown_words(prompt, self.tokenizer, self.text_encoder.token_embedding.weight)

    def compile(self, **options: Any) -> None:
        """Compile the UNet and the decoder with torch.compile, one graph each.

        Each new size and number of pictures is compiled when it first comes, which takes a minute or more; from then on
        it is faster, most of all on a GPU. On a CPU a C++ compiler is needed. Where attention is recorded, the plain
        code runs.

        Args:
            options: of torch.compile, such as mode="reduce-overhead".
        """
        self._compile_options = {"fullgraph": True, "dynamic": False, **options}
        for part in (self.unet, self.autoencoder.decoder):
            part.compile(**self._compile_options)
