"""`StableDiffusion`, the public class: it checks what it is given and wires features around the core's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import generate
from minisd.editing import KeepUnmasked, extend_canvas, latent_mask, masked_image, paste, slerp, with_channels
from minisd.features import adapters
from minisd.features.deepcache import DeepCache
from minisd.features.prompts import common_length
from minisd.features.validate import (
    check_dtype,
    check_finite,
    check_int,
    check_strings,
)
from minisd.generate import NoiseSource, Step, gaussian_noise, guided
from minisd.images import from_pil, to_pil
from minisd.io import checkpoint
from minisd.pipeline import memory
from minisd.pipeline.checks import (
    Request,
    check_margins,
    check_mask,
    check_request,
    check_size,
    resolve_seeds,
)
from minisd.pipeline.parts import ImageInput, Parts, Prompt
from minisd.pipeline.settings import Settings


class StableDiffusion(Parts):
    """Text to image, image to image, inpainting.

    The parts are attributes to take apart: tokenizer, text_encoder, unet, autoencoder, schedule. Drawing keeps no state
    between calls, so threads may share the object; only loading and setting adapters changes it.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        tile: bool = False,
        **options: Any,
    ) -> Self:
        """Load a model.

        Args:
            source: a hub id, a diffusers folder, a .safetensors or .ckpt file; by default the tiny model inside.
            device: by default the first there is of cuda, mps and cpu.
            dtype: by default float16 on cuda, else float32.
            offload: keep the parts in main memory, each on the device only while it computes. In float16 the largest,
                the UNet, takes 1.7 GB there in place of 2.1 GB for all three. Slower, and threads may not share it.
            tile: encode and decode one picture at a time, and those of more than 1½ times the model's own size in
                tiles.
            options: variant, prediction_type, revision …, see `io.checkpoint.load`, which says what it raises.

        Raises:
            ValueError: this machine lacks the device, or weights cannot have the dtype.
        """
        place = memory.usable_device(device) if device is not None else memory.best_device()
        default_dtype = torch.float16 if place.type == "cuda" else torch.float32
        dtype = check_dtype(default_dtype if dtype is None else dtype)
        loaded = checkpoint.load(source, device="cpu" if offload else place, dtype=dtype, **options)
        parts = loaded.tokenizer, loaded.text_encoder, loaded.unet, loaded.autoencoder
        if place.type == "cuda" and not offload:
            memory.move(loaded.unet, place)
        return cls(loaded.config, *parts, loaded.defaults, offload=place if offload else None, tile=tile)

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
        with memory.on_device(self.unet, self.offload):
            for step in generate.sample(denoise, request.plan, noise, latents, after_step):
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

    def _draw(self, request: Request, progress: bool | None) -> list[Image.Image]:
        with tqdm(disable=None if progress is None else not progress, unit="step", leave=False) as bar:
            for step in self._denoise(request):
                bar.total = step.num_calls
                bar.update()
        pictures = self.decode(step.latents)
        for picture, seed in zip(pictures, request.seeds, strict=True):
            picture.info["seed"] = seed
        return pictures

    def image_to_image(
        self, prompt: str, image: ImageInput, strength: float = 0.8, *, progress: bool | None = None, **options: Any
    ) -> Image.Image:
        """Redraw a picture towards a prompt: strength near 0 keeps it, 1 forgets it. Options as for `denoise`."""
        request = self._request(prompt, image, None, strength=strength, **options)
        return self._draw(request, progress)[0]

    def inpaint(
        self,
        prompt: str,
        image: Image.Image,
        mask_image: ImageInput,
        strength: float = 1.0,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Image.Image:
        """Redraw what is white in the mask; what is black comes back exactly. Options as for `denoise`.

        Works with any UNet, and as it was trained with one of 9 input channels.
        """
        image = to_pil(from_pil(image))[0]
        mask = check_mask(mask_image, image.size)
        request = self._request(prompt, image, mask, strength=strength, **options)
        result = paste(self._draw(request, progress)[0], image, mask)
        result.info["seed"] = request.seeds[0]
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
        **options: Any,
    ) -> Image.Image:
        """Draw beyond the edges of a picture, by so many pixels on each side (multiples of 8); `inpaint` does it."""
        picture = to_pil(from_pil(image))[0]
        check_margins(left, right, top, bottom)
        check_size(self, picture.height + top + bottom, picture.width + left + right, 1)
        canvas, mask = extend_canvas(picture, left, right, top, bottom)
        return self.inpaint(prompt, canvas, mask, **options)

    def _request(
        self,
        prompt: str,
        image: ImageInput,
        mask: Tensor | None,
        *,
        negative_prompt: Prompt = "",
        seed: int | Sequence[int] | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> Request:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, since one picture is drawn; got {type(prompt).__name__}")
        return check_request(self, prompt, negative_prompt, self._settings(preset, settings), seed, image, mask)

    def interpolate(
        self,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        count: int = 8,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw `count` pictures on the way from one prompt and seed to another, both ends included.

        Contexts go along a straight line, first noises along an arc (`editing.slerp`). Options as for `denoise`.
        """
        count = check_int("count", count, 2, 2**31)
        texts = check_strings("prompts", prompts)
        if len(texts) != 2:
            raise ValueError(f"{len(texts)} prompts; expected two, the first picture's and the last one's")
        shape = self.latent_shape(options.get("height"), options.get("width"), count)
        ends = resolve_seeds(seeds, 2)
        shares = torch.linspace(0, 1, count).tolist()
        start, end = (gaussian_noise([seed], shape, self.device)() for seed in ends)
        first, last = self.encode_text(texts, options.get("clip_skip", 1)).split(1)
        latents = torch.cat([slerp(start, end, share) for share in shares])
        embeds = torch.cat([(1 - share) * first + share * last for share in shares])
        negative_prompt, settings = (
            options.pop("negative_prompt", ""),
            self._settings(options.pop("preset", None), options),
        )
        numbers = [ends[0]] * count
        request = check_request(
            self, [texts[0]] * count, negative_prompt, settings, numbers, latents=latents, prompt_embeds=embeds
        )
        return self._draw(request, progress)

    def save_pretrained(self, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a folder that diffusers, transformers and minisd load. dtype: by default the weights' own.

        Fused LoRAs are saved in the weights. Raises ValueError if there are others, or textual inversions, which such a
        folder cannot hold.
        """
        if self.adapters.loras and not self.adapters.fused:
            raise ValueError(f"{', '.join(self.adapters.loras)} is not fused; call fuse_lora() or unload_lora() first")
        if self.tokenizer.added:
            raise ValueError(f"a model folder cannot hold {', '.join(self.tokenizer.added)}; keep their own files")
        checkpoint.save(self, folder, None if dtype is None else check_dtype(dtype))

    def load_lora(self, path: str | PathLike[str], name: str | None = None, weight: float = 1.0) -> str:
        """Load a LoRA beside those already there, acting with `weight`; return its name, by default the file's.

        path: a .safetensors, .bin or .pt file in the layouts of diffusers, peft or kohya, or a folder with one. Raises
        CheckpointError, naming keys and shapes, if it does not fit, and ValueError if the name is taken.
        """
        return self.adapters.load(path, {"unet": self.unet, "text_encoder": self.text_encoder}, name, weight)

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Let the named LoRAs act with these weights, and the others not at all. ValueError for an unknown name."""
        self.adapters.set_weights(weights)

    def fuse_lora(self) -> None:
        """Add the loaded LoRAs to the weights, so that drawing costs nothing extra; `unfuse_lora` undoes it exactly."""
        self.adapters.fuse()

    def unfuse_lora(self) -> None:
        """Put back the weights as they were before `fuse_lora`, bit for bit; the LoRAs act beside them again."""
        self.adapters.unfuse()

    def unload_lora(self, name: str | None = None) -> None:
        """Remove one LoRA, or all of them, exactly, fused or not."""
        self.adapters.unload(name)

    def load_textual_inversion(self, path: str | PathLike[str], token: str | None = None) -> str:
        """Teach the text encoder a word, and return it. path: a file of diffusers or the web UI. token: another word.

        Raises CheckpointError for other files, ValueError for a word that is known already or vectors that do not fit.
        """
        word, vectors = adapters.read_textual_inversion(path, token)
        self.tokenizer = adapters.add_word(self.tokenizer, self.text_encoder, word, vectors)
        return word


def _first(first: Tensor, rest: NoiseSource) -> NoiseSource:
    """A noise source that returns `first`, then goes on with the rest."""
    pending = [first]
    return lambda: pending.pop() if pending else rest()
