"""Image editing methods of `StableDiffusion`: image-to-image, inpainting, outpainting, interpolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from PIL import Image, ImageOps
from torch import Tensor

from minisd.editing import extend_canvas, paste, slerp
from minisd.features.pictures import to_gray, to_rgb
from minisd.features.validate import check_int, check_strings
from minisd.generate import gaussian_noise
from minisd.pipeline.arguments import Arrays, ImageInput, ImageList, MaskList, Options, Prompt
from minisd.pipeline.checks import Request, as_list, check_margins, check_size, resolve_seeds
from minisd.pipeline.drawing import as_output, check_output_type

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion


class ImageEditing:
    """Mixin with the image editing methods of `StableDiffusion`."""

    @overload
    def image_to_image(
        self,
        prompt: str,
        image: Image.Image,
        strength: float = 0.8,
        *,
        resize: bool = False,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[Options],
    ) -> Image.Image: ...
    @overload
    def image_to_image(
        self,
        prompt: Prompt,
        image: ImageList,
        strength: float = 0.8,
        *,
        resize: bool = False,
        output_type: Literal["pil"] | Arrays = "pil",
        **options: Unpack[Options],
    ) -> Any: ...
    def image_to_image(
        self: StableDiffusion,
        prompt: Prompt,
        image: ImageList,
        strength: float = 0.8,
        *,
        resize: bool = False,
        output_type: Literal["pil"] | Arrays = "pil",
        **options: Unpack[Options],
    ) -> Any:
        """Redraw images to match prompts, with a strength in (0, 1], where 1 ignores the image.

        Args:
            prompt: One prompt, or one per image.
            image: One image for all prompts, or a list of images, of one size unless `resize` is set.
            resize: Whether to scale and crop PIL images to `width` and `height`, by default the model's native size.
            output_type: See `__call__`.
            options: See `denoise`.

        Returns:
            A PIL image for a single prompt and image, otherwise a list.
        """
        if resize:
            image, _ = self._resized(image, None, options)
        request = self._request(prompt, image, None, strength=strength, **options)
        return self._finished(request, options.get("progress"), output_type, not _is_batch(prompt, image))

    @overload
    def inpaint(
        self,
        prompt: str,
        image: Image.Image,
        mask_image: ImageInput,
        strength: float = 1.0,
        *,
        resize: bool = False,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[Options],
    ) -> Image.Image: ...
    @overload
    def inpaint(
        self,
        prompt: Prompt,
        image: Image.Image | Sequence[Image.Image],
        mask_image: MaskList,
        strength: float = 1.0,
        *,
        resize: bool = False,
        output_type: Literal["pil"] | Arrays = "pil",
        **options: Unpack[Options],
    ) -> Any: ...
    def inpaint(
        self: StableDiffusion,
        prompt: Prompt,
        image: Image.Image | Sequence[Image.Image],
        mask_image: MaskList,
        strength: float = 1.0,
        *,
        resize: bool = False,
        output_type: Literal["pil"] | Arrays = "pil",
        **options: Unpack[Options],
    ) -> Any:
        """Repaint the white area of a mask; black pixels are returned unchanged.

        Args:
            prompt: One prompt, or one per image.
            image: One image for all prompts, or a list of images, of one size unless `padding_mask_crop` or `resize` is
                set.
            mask_image: One mask for all images, or a list.
            resize: Whether to scale and crop images and masks to `width` and `height`, by default the model's native
                size. What is returned, and unchanged where the mask is black, is the scaled image.
            output_type: See `__call__`. Latents are those that were drawn, before anything is pasted back.
            options: See `denoise`. `mask_blur` blurs the edges of the mask. With `padding_mask_crop`, only the masked
                area and so many pixels around it are drawn, at the size that `width` and `height` or else the model
                set, and pasted back; the image can then have any size.

        Returns:
            A PIL image for a single prompt and image, otherwise a list.
        """
        check_output_type(output_type)
        several = _is_batch(prompt, image, mask_image)
        if resize:
            image, mask_image = self._resized(image, mask_image, options)
        originals, masks = [to_rgb(each) for each in as_list("image", image)], as_list("mask_image", mask_image)
        if several and options.get("padding_mask_crop") is not None:
            if output_type != "pil" or options.get("callback"):
                raise ValueError("lists with padding_mask_crop are drawn one by one; pass one image per call")
            return self._inpaint_each(prompt, originals, masks, strength, {**options})
        request = self._request(prompt, originals, masks, strength=strength, **options)
        latents = self._draw_latents(request, options.get("progress"))
        if output_type == "latent":
            return latents.clone()
        results = self._pasted(request, self._pictures(request, latents), originals)
        if output_type != "pil":
            return as_output(results, output_type, self.device)
        return results if several else results[0]

    def _pasted(
        self, request: Request, pictures: Sequence[Image.Image], originals: Sequence[Image.Image]
    ) -> list[Image.Image]:
        """Paste what was drawn where the mask is white into the original images."""
        mask, area, results = request.mask, request.area, []
        for i, picture in enumerate(pictures):
            original = originals[min(i, len(originals) - 1)]
            if area is not None:
                results.append(area.paste(picture, original))
            elif mask is not None:
                results.append(paste(picture, original, mask[min(i, len(mask) - 1)][None]))
            results[-1].info |= {name: picture.info[name] for name in ("seed", "settings")}
        return results

    def _resized(self: StableDiffusion, image: Any, mask: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
        """Scale and crop PIL images and masks to the size in the options."""
        if options.get("padding_mask_crop") is not None:
            raise ValueError("resize and padding_mask_crop exclude each other; an image of any size needs no resizing")
        _, height, width = self.latent_shape(options.get("height"), options.get("width"))
        size = width * self.downscale, height * self.downscale

        def fit(value: Any, mode: str) -> Any:
            pictures = [to_rgb(each) if mode == "RGB" else to_gray(each) for each in as_list("image", value)]
            fitted = [ImageOps.fit(each, size, Image.Resampling.LANCZOS) for each in pictures]
            return fitted if isinstance(value, (list, tuple)) else fitted[0]

        return fit(image, "RGB"), None if mask is None else fit(mask, "L")

    def _inpaint_each(
        self: StableDiffusion,
        prompt: Prompt,
        images: Sequence[Image.Image],
        masks: Sequence[Any],
        strength: float,
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
        return [self.inpaint(**call) for call in calls]

    def outpaint(
        self: StableDiffusion,
        prompt: Prompt,
        image: Image.Image | Sequence[Image.Image],
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        strength: float = 1.0,
        output_type: Literal["pil"] | Arrays = "pil",
        **options: Unpack[Options],
    ) -> Any:
        """Extend images by the given number of pixels per side (multiples of 8), using `inpaint`."""
        pictures = [to_rgb(each) for each in as_list("image", image)]
        check_margins(left, right, top, bottom)
        for picture in pictures:
            check_size(self, picture.height + top + bottom, picture.width + left + right, len(pictures))
        extended = [extend_canvas(picture, left, right, top, bottom) for picture in pictures]
        canvases, masks = [canvas for canvas, _ in extended], [mask for _, mask in extended]
        images, mask = (canvases, masks) if isinstance(image, (list, tuple)) else (canvases[0], masks[0])
        return self.inpaint(prompt, images, mask, strength, output_type=output_type, **options)

    def interpolate(
        self: StableDiffusion,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        count: int = 8,
        **options: Unpack[Options],
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
        arguments: dict[str, Any] = {**options, "seed": [ends[0]] * count}
        negative_prompt, progress = arguments.pop("negative_prompt", ""), arguments.pop("progress", None)
        with self.usage.drawing():  # no LoRA may be loaded between the embeddings and the images
            clip_skip = options.get("clip_skip")
            first, last = self.encode_text(texts, 1 if clip_skip is None else clip_skip).split(1)
            embeds = torch.cat([(1 - share) * first + share * last for share in shares])
            inputs = {"latents": latents, "prompt_embeds": embeds}
            request = self._check(arguments, prompt=[texts[0]] * count, negative_prompt=negative_prompt, **inputs)
            return self._pictures(request, self._draw_latents(request, progress))

    def _request(self: StableDiffusion, prompt: Prompt, image: Any, mask_image: Any, **options: Any) -> Request:
        prompts = check_strings("prompt", prompt)
        if len(prompts) == 1:
            counts = [len(each) for each in (image, mask_image) if isinstance(each, (list, tuple))]
            prompts *= max([1, *counts, len(image) if isinstance(image, Tensor) else 1])
        arguments = {name: value for name, value in options.items() if name not in ("negative_prompt", "progress")}
        negative_prompt = options.get("negative_prompt", "")
        inputs = {"image": image, "mask_image": mask_image}
        return self._check(arguments, prompt=prompts, negative_prompt=negative_prompt, **inputs)


def _is_batch(prompt: Prompt, image: Any, mask_image: Any = None) -> bool:
    several = isinstance(image, Tensor) and len(image) > 1
    return (
        several or not isinstance(prompt, str) or any(isinstance(each, (list, tuple)) for each in (image, mask_image))
    )
