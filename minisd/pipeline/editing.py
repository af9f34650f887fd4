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
from minisd.pipeline.checks import Request, as_list, check_margins, check_request, check_size, resolve_seeds

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

Prompt = str | Sequence[str]
ImageInput = Image.Image | Tensor


class ImageEditing:
    """Mixin with the image editing methods of `StableDiffusion`."""

    def image_to_image(
        self: StableDiffusion,
        prompt: Prompt,
        image: ImageInput | Sequence[Image.Image],
        strength: float = 0.8,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """Redraw images to match prompts, with a strength in (0, 1], where 1 ignores the image.

        Args:
            prompt: One prompt, or one per image.
            image: One image for all prompts, or a list of images of one size.
            options: See `denoise`.

        Returns:
            A PIL image for a single prompt and image, otherwise a list.
        """
        request = self._request(prompt, image, None, strength=strength, **options)
        pictures = self._draw(request, progress)
        return pictures if _is_batch(prompt, image) else pictures[0]

    def inpaint(
        self: StableDiffusion,
        prompt: Prompt,
        image: Image.Image | Sequence[Image.Image],
        mask_image: ImageInput | Sequence[ImageInput],
        strength: float = 1.0,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """Repaint the white area of a mask; black pixels are returned unchanged.

        Args:
            prompt: One prompt, or one per image.
            image: One image for all prompts, or a list of images, of one size unless `padding_mask_crop` is set.
            mask_image: One mask for all images, or a list.
            options: See `denoise`. `mask_blur` blurs the edges of the mask. With `padding_mask_crop`, only the masked
                area and so many pixels around it are drawn, at the size that `width` and `height` or else the model
                set, and pasted back; the image can then have any size.

        Returns:
            A PIL image for a single prompt and image, otherwise a list.
        """
        originals, masks = [to_rgb(each) for each in as_list("image", image)], as_list("mask_image", mask_image)
        several = _is_batch(prompt, image, mask_image)
        if several and options.get("padding_mask_crop") is not None:
            return self._inpaint_each(prompt, originals, masks, strength, progress, options)
        request = self._request(prompt, originals, masks, strength=strength, **options)
        drawn, mask, area = self._draw(request, progress), request.mask, request.area
        results = []
        for i, picture in enumerate(drawn):
            original = originals[min(i, len(originals) - 1)]
            if area is not None:
                results.append(area.paste(picture, original))
            elif mask is not None:
                results.append(paste(picture, original, mask[min(i, len(mask) - 1)][None]))
            results[-1].info["seed"] = request.seeds[i]
        return results if several else results[0]

    def _inpaint_each(
        self: StableDiffusion,
        prompt: Prompt,
        images: Sequence[Image.Image],
        masks: Sequence[Any],
        strength: float,
        progress: bool | None,
        options: dict[str, Any],
    ) -> list[Image.Image]:
        """Inpaint one image after the other, since their masked areas can have several sizes."""
        rows: dict[str, list[Any]] = {"image": [*images], "mask_image": [*masks]}
        rows |= {"prompt": check_strings("prompt", prompt)}
        rows |= {"negative_prompt": check_strings("negative_prompt", options.get("negative_prompt", ""))}
        count = max(map(len, rows.values()))
        for name, values in rows.items():
            if len(values) not in (1, count):
                raise ValueError(f"{len(values)} values of {name} for {count} images; pass one, or one per image")
        shared, rows["seed"] = {"strength": strength} | options, resolve_seeds(options.get("seed"), count)
        calls = [
            shared | {name: values[i if len(values) > 1 else 0] for name, values in rows.items()} for i in range(count)
        ]
        for call in calls:  # all are checked before the first is drawn
            self._request(**call)
        return [self.inpaint(**call, progress=progress) for call in calls]

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
        prompt: Prompt,
        image: Any,
        mask_image: Any,
        *,
        negative_prompt: Prompt = "",
        seed: int | Sequence[int] | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> Request:
        prompts = check_strings("prompt", prompt)
        if len(prompts) == 1:
            counts = [len(each) for each in (image, mask_image) if isinstance(each, (list, tuple))]
            prompts *= max([1, *counts, len(image) if isinstance(image, Tensor) else 1])
        return check_request(self, prompts, negative_prompt, self._settings(preset, settings), seed, image, mask_image)


def _is_batch(prompt: Prompt, image: Any, mask_image: Any = None) -> bool:
    several = isinstance(image, Tensor) and len(image) > 1
    return (
        several or not isinstance(prompt, str) or any(isinstance(each, (list, tuple)) for each in (image, mask_image))
    )
