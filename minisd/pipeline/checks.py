"""Validation of pipeline arguments, run before any computation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from minisd.features.deepcache import count_up_layers
from minisd.features.lcm_unet import LCMUNet
from minisd.features.masked_area import MaskedArea, blur_mask, find_area
from minisd.features.more_samplers import WHOLE_TIMESTEPS
from minisd.features.pictures import to_brightness, to_rgb
from minisd.features.validate import (
    check_finite_input,
    check_float,
    check_int,
    check_shape,
    check_strings,
    check_tensor,
    check_unit_range,
)
from minisd.guidance import Guidance
from minisd.images import from_pil
from minisd.pipeline.arguments import Callback
from minisd.pipeline.consistency import check_consistency
from minisd.pipeline.memory import check_memory
from minisd.pipeline.prompting import Loras, Texts, read_prompts
from minisd.pipeline.settings import Settings
from minisd.samplers import Plan

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

MAX_SEED = 2**63 - 1
MAX_SIDE_FACTOR = 16  # relative to the training resolution; at this size attention takes 65,536 times as long
MAX_GUIDANCE = 1000.0  # far beyond any useful value, but far below overflow


@dataclass(frozen=True, eq=False)
class Request:
    """A validated generation request.

    Attributes:
        texts: The prompts at each step, with prompt editing and alternation resolved.
        loras: The LoRAs in the prompts' tags, with their weights, by name.
    """

    prompts: list[str]
    negative_prompts: list[str]
    texts: list[Texts]
    loras: Loras
    seeds: list[int]
    settings: Settings
    guidance: Guidance
    plan: Plan
    shape: tuple[int, int, int]
    strength: float
    image: Tensor | None = None
    mask: Tensor | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    area: MaskedArea | None = None
    callback: Callback | None = None

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scale for each image."""
        scale = self.guidance.scale
        return scale if isinstance(scale, tuple) else (scale,) * len(self.prompts)


def check_request(
    sd: StableDiffusion,
    prompt: Any,
    negative_prompt: Any,
    settings: Settings,
    seed: Any = None,
    image: Any = None,
    mask_image: Any = None,
    latents: Any = None,
    prompt_embeds: Any = None,
) -> Request:
    """Check the arguments of `StableDiffusion.denoise` against each other and the model, without running the model.

    Raises TypeError for a value of the wrong type and ValueError for an invalid value.
    """
    prompts = check_strings("prompt", prompt)
    negatives = check_strings("negative_prompt", negative_prompt)
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; pass one, or one per prompt")
    guidance = check_guidance(settings, len(prompts))
    check_mask_options(settings, mask_image)
    area = None
    if settings.padding_mask_crop is not None:
        image, area = check_area(sd, settings, image, mask_image)
    images = None if image is None else check_image(sd, image)
    sides = (settings.height, settings.width) if area is None else (None, None)
    shape = check_size(sd, *sides, len(prompts), images)
    mask = check_inpainting(sd, images, mask_image, settings.mask_blur or 0) if area is None else area.cut_mask()
    for name, given in (("images", images), ("masks", mask)):
        if given is not None and len(given) not in (1, len(prompts)):
            raise ValueError(f"{len(given)} {name} for {len(prompts)} prompts; pass one, or one per prompt")
    check_feature_reuse(settings.feature_reuse, sd)
    check_int("clip_skip", settings.clip_skip, 1, sd.config.text_encoder.num_hidden_layers)
    plan, strength, steps = check_plan(sd, settings, images is not None, mask is not None)
    texts, loras = read_prompts(sd, prompts, negatives, steps)
    if settings.sampler == "lcm" or isinstance(sd.unet, LCMUNet):
        check_consistency(sd, settings, negatives, loras)
    seeds = resolve_seeds(seed, len(prompts))
    if latents is not None:
        check_tensor("latents", latents, len(prompts), *shape)
    if prompt_embeds is not None:
        rows = prompt_embeds.shape[1] if isinstance(prompt_embeds, Tensor) and prompt_embeds.ndim == 3 else 77
        width = sd.config.text_encoder.hidden_size
        check_tensor("prompt_embeds", prompt_embeds, len(prompts), 77 * max(1, rows // 77), width)
    return Request(
        prompts, negatives, texts, loras, seeds, settings, guidance, plan, shape, strength, images, mask, latents,
        prompt_embeds, area,
    )  # fmt: skip


def check_guidance(settings: Settings, count: int) -> Guidance:
    """Check the guidance settings for a batch of `count` images."""
    scale: Any = settings.guidance_scale
    scale = tuple(scale) if isinstance(scale, (list, tuple)) else scale
    for value in scale if isinstance(scale, tuple) else (scale,):
        check_float("guidance_scale", value, -MAX_GUIDANCE, MAX_GUIDANCE, ", such as 7.5")
    if isinstance(scale, tuple) and len(scale) != count:
        raise ValueError(f"{len(scale)} guidance scales for {count} images; pass one number, or one per image")
    check_float("guidance_rescale", settings.guidance_rescale, 0, 1, " (0 disables it)")
    interval = (0.0, 1.0) if settings.guidance_interval is None else settings.guidance_interval
    ends = interval if isinstance(interval, Sequence) and len(interval) == 2 else ()
    begin, end = (check_float("guidance_interval", x, 0, 1) for x in ends) if ends else (1.0, 0.0)
    if begin > end:
        raise ValueError(f"guidance_interval={interval!r}; expected two numbers, 0 ≤ begin ≤ end ≤ 1")
    return Guidance(scale, settings.guidance_rescale, (begin, end))


def check_image(sd: StableDiffusion, image: Any) -> Tensor:
    """Check a PIL image, a list of them, or a tensor (n, 3, h, w) in [-1, 1], and return it as a tensor.

    Values slightly outside the range are allowed. Raises ValueError for values outside [-2, 2] (such as pixels in
    0…255), for images of several sizes, and for a height or width that is not a multiple of 8.
    """
    if isinstance(image, Tensor):
        check_shape("image", image, "n", sd.config.autoencoder.in_channels, "h", "w")
        check_memory(sd, len(image), image.shape[-2], image.shape[-1], encoding=True)
        images = check_unit_range("image", check_finite_input("image", image))
    else:
        pictures = [from_pil(to_rgb(each)) for each in as_list("image", image)]
        sizes = sorted({(each.shape[-1], each.shape[-2]) for each in pictures})
        if len(sizes) > 1:
            raise ValueError(f"the images have sizes {sizes}; expected one size; draw those of one size together")
        images = torch.cat(pictures)
    height, width = images.shape[-2:]
    nearest = [max(round(side / sd.downscale), 1) * sd.downscale for side in (width, height)]
    if [width, height] != nearest:
        raise ValueError(
            f"image is {width}×{height}; expected multiples of {sd.downscale}; resize it first, for example to "
            f"{nearest[0]}×{nearest[1]}"
        )
    return images


def as_list(name: str, value: Any) -> list[Any]:
    """Return the entries of a list or tuple, or a single value in a list. Raises ValueError if it is empty."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError(f"{name} is an empty list; expected at least one image")
    return values


def check_mask_options(settings: Settings, mask: Any) -> None:
    """Check the settings that require a mask: its blur and the padding around the masked area, both in pixels."""
    blur, padding = settings.mask_blur, settings.padding_mask_crop
    for name, value in (("mask_blur", blur), ("padding_mask_crop", padding)):
        if value is not None and mask is None:
            raise ValueError(f"{name}={value!r} is only valid for inpainting; pass a mask, or omit {name}")
    if blur is not None:
        check_float("mask_blur", blur, 0, 1000, ", in pixels")
    if padding is not None:
        check_int("padding_mask_crop", padding, 0, 2**16)


def check_area(sd: StableDiffusion, settings: Settings, image: Any, mask: Any) -> tuple[Image.Image, MaskedArea]:
    """Return the masked area of an image of any size, scaled to the size of the settings, and its place."""
    if image is None or isinstance(image, Tensor) or len(as_list("image", image)) != 1:
        raise ValueError("padding_mask_crop requires one PIL image per call; pass it as image")
    picture, masks = to_rgb(as_list("image", image)[0]), as_list("mask_image", mask)
    if len(masks) != 1:
        raise ValueError(f"{len(masks)} masks for one image; pass one")
    blurred = blur_mask(check_mask(masks[0], picture.size), settings.mask_blur or 0)
    _, height, width = (sd.downscale * side for side in check_size(sd, settings.height, settings.width, 1))
    area = find_area(blurred, settings.padding_mask_crop or 0, width, height, sd.downscale)
    return area.cut(picture), area


def check_size(
    sd: StableDiffusion, height: int | None, width: int | None, count: int, images: Tensor | None = None
) -> tuple[int, int, int]:
    """Check the size of a batch of `count` images, and return the latent shape of one image, (4, h/8, w/8).

    `height` and `width` default to the size of `images`, or to the model's native size.
    """
    own = sd.config.unet.sample_size * sd.downscale
    usual = (own, own) if images is None else images.shape[-2:]
    sides = []
    for name, value, default in (("height", height, usual[0]), ("width", width, usual[1])):
        side = check_int(name, default if value is None else value, 1, MAX_SIDE_FACTOR * own)
        if side % sd.downscale:
            nearest = max(round(side / sd.downscale), 1) * sd.downscale
            raise ValueError(f"{name}={side}; expected a positive multiple of {sd.downscale}, such as {nearest}")
        sides.append(side)
    if images is not None and sides != [*usual]:
        raise ValueError(f"image is {usual[1]}×{usual[0]}; expected {sides[1]}×{sides[0]}; resize it first")
    check_memory(sd, count, sides[0], sides[1])
    return sd.config.autoencoder.latent_channels, sides[0] // sd.downscale, sides[1] // sd.downscale


def check_inpainting(sd: StableDiffusion, images: Tensor | None, mask: Any, blur: float = 0) -> Tensor | None:
    """Check that masks, images and UNet input channels are compatible, and return the masks, (1 or n, 1, h, w)."""
    channels, latent_channels = sd.config.unet.in_channels, sd.config.autoencoder.latent_channels
    if mask is None:
        if channels != latent_channels:
            raise ValueError(
                f"this is an inpainting model (its UNet takes {channels} channels); pass image and mask_image, or use "
                f"a model whose UNet takes {latent_channels} channels"
            )
        return None
    if images is None:
        raise ValueError("mask_image requires an image to inpaint; pass it as image")
    size = images.shape[-1], images.shape[-2]
    return torch.cat([blur_mask(check_mask(each, size), blur) for each in as_list("mask_image", mask)])


def check_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """Check a mask and return it as float32 (1, 1, h, w) in [0, 1]: 1 (white) is repainted, 0 (black) is kept.

    Args:
        mask: A PIL image of any mode, or a tensor (h, w), (1, h, w) or (1, 1, h, w).
        size: The size of the image to inpaint, (width, height).
    """
    if isinstance(mask, Image.Image):
        values = torch.from_numpy(to_brightness(mask))
    elif isinstance(mask, Tensor) and not mask.is_complex():
        values = mask.detach().float().cpu()
    else:
        raise TypeError(f"the mask must be a PIL image or a real tensor, got {type(mask).__name__}")
    while values.dim() > 2 and values.shape[0] == 1:
        values = values[0]
    if tuple(values.shape) != size[::-1]:
        raise ValueError(f"the mask has shape {tuple(values.shape)}; expected that of the image, {size[::-1]}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("the mask has values outside [0, 1]; expected 1 to repaint a pixel and 0 to keep it")
    if not bool((values >= 0.5).any()):
        raise ValueError("the mask is black everywhere, so nothing would change; paint the area to repaint white")
    return values[None, None]


def check_feature_reuse(value: Any, sd: StableDiffusion) -> None:
    """Check a DeepCache setting: (interval, depth) or None."""
    if value is None:
        return
    if not hasattr(sd.unet, "up_blocks"):
        raise ValueError("feature_reuse needs the blocks of minisd's UNet, and this model has another one; omit it")
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"feature_reuse={value!r}; expected a pair (interval, depth), such as (3, 1)")
    check_int("feature_reuse", value[0], 1, 1000)
    check_int("feature_reuse", value[1], 1, count_up_layers(sd.unet))


def check_plan(sd: StableDiffusion, settings: Settings, has_image: bool, has_mask: bool) -> tuple[Plan, float, int]:
    """Check sampler, steps and strength; return the sampling plan, the strength, and the number of steps that run."""
    steps = check_int("num_inference_steps", settings.num_inference_steps, 1, sd.config.schedule.num_train_timesteps)
    strength = settings.strength
    if strength is not None and not has_image:
        raise ValueError(f"strength={strength!r} is only valid for image-to-image; pass an image, or omit strength")
    strength = (1.0 if has_mask else 0.8) if strength is None else check_float("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}; expected 0 < strength ≤ 1, where 1 ignores the image")
    running = int(steps * strength) if has_image else steps
    if running < 1:
        raise ValueError(f"{steps} steps at strength {strength} run none; raise either, so that steps · strength ≥ 1")
    sampler = settings.sampler_object
    if sampler.spacing and "levels" in sampler.options and sampler.name in WHOLE_TIMESTEPS:
        warnings.warn(
            f"spacing={sampler.spacing!r} has no effect on {sampler.name} with these noise levels", stacklevel=2
        )
    return sampler.plan(sd.schedule, steps, start=steps - running), strength, running


def check_margins(left: int, right: int, top: int, bottom: int) -> None:
    """Check the outpainting margins, in pixels: multiples of 8, and not all 0."""
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, side in sides.items():
        if check_int(name, side, 0, 2**16) % 8:
            raise ValueError(f"{name}={side}; expected a non-negative multiple of 8, in pixels")
    if not any(sides.values()):
        raise ValueError("all margins are 0; set left, right, top or bottom to a number of pixels")


def resolve_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return one seed per image: consecutive seeds from an integer or, for None, from a random one; a list unchanged.

    Raises TypeError or ValueError for seeds that are not integers in [0, 2⁶³ − 1].
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if isinstance(seed, Iterable) and not isinstance(seed, (str, bytes, Tensor)):
        seeds = list(seed)
    else:
        first = check_int("seed", seed, 0, MAX_SEED)
        seeds = [first + i for i in range(count)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images; pass one seed, or one per image")
    return [check_int("seed", number, 0, MAX_SEED) for number in seeds]
