"""Image editing methods of `StableDiffusion`: image-to-image, inpainting, outpainting, interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from minisd.editing import extend_canvas, paste, slerp
from minisd.features.pictures import to_rgb
from minisd.features.validate import check_int, check_strings
from minisd.generate import gaussian_noise
from minisd.pipeline.checks import Request, check_margins, check_mask, check_request, check_size, resolve_seeds

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

Prompt = str | Sequence[str]
ImageInput = Image.Image | Tensor


class ImageEditing:
    """Mixin with the image editing methods of `StableDiffusion`."""

    def image_to_image(
        self: StableDiffusion,
        prompt: str,
        image: ImageInput,
        strength: float = 0.8,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Image.Image:
        """Redraw an image to match a prompt, with a strength in (0, 1], where 1 ignores the image.

        Accepts the options of `denoise`.
        """
        request = self._request(prompt, image, None, strength=strength, **options)
        return self._draw(request, progress)[0]

    def inpaint(
        self: StableDiffusion,
        prompt: str,
        image: Image.Image,
        mask_image: ImageInput,
        strength: float = 1.0,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Image.Image:
        """Repaint the white area of a mask; black pixels are returned unchanged. Accepts the options of `denoise`."""
        image = to_rgb(image)
        mask = check_mask(mask_image, image.size)
        request = self._request(prompt, image, mask, strength=strength, **options)
        result = paste(self._draw(request, progress)[0], image, mask)
        result.info["seed"] = request.seeds[0]
        return result

    def outpaint(
        self: StableDiffusion,
        prompt: str,
        image: Image.Image,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        **options: Any,
    ) -> Image.Image:
        """Extend an image by the given number of pixels per side (multiples of 8), using `inpaint`."""
        picture = to_rgb(image)
        check_margins(left, right, top, bottom)
        check_size(self, picture.height + top + bottom, picture.width + left + right, 1)
        canvas, mask = extend_canvas(picture, left, right, top, bottom)
        return self.inpaint(prompt, canvas, mask, **options)

    def interpolate(
        self: StableDiffusion,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        count: int = 8,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw `count` images that interpolate between two prompts and seeds, endpoints included.

        Interpolates text embeddings linearly and noise spherically (`editing.slerp`). Accepts the options of `denoise`.
        """
        count = check_int("count", count, 2, 2**31)
        texts = check_strings("prompts", prompts)
        if len(texts) != 2:
            raise ValueError(f"expected two prompts, for the first and the last image, got {len(texts)}")
        shape = self.latent_shape(options.get("height"), options.get("width"), count)
        ends = resolve_seeds(seeds, 2)
        shares = torch.linspace(0, 1, count).tolist()
        start, end = (gaussian_noise([seed], shape, self.device)() for seed in ends)
        latents = torch.cat([slerp(start, end, share) for share in shares])
        negative_prompt, preset = options.pop("negative_prompt", ""), options.pop("preset", None)
        settings, numbers = self._settings(preset, options), [ends[0]] * count
        with self.usage.drawing():  # no LoRA may be loaded between the embeddings and the images
            first, last = self.encode_text(texts, options.get("clip_skip", 1)).split(1)
            embeds = torch.cat([(1 - share) * first + share * last for share in shares])
            request = check_request(
                self, [texts[0]] * count, negative_prompt, settings, numbers, latents=latents, prompt_embeds=embeds
            )
            return self._draw(request, progress)

    def _request(
        self: StableDiffusion,
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
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}; pass one prompt per call")
        return check_request(self, prompt, negative_prompt, self._settings(preset, settings), seed, image, mask)
