"""Drawing methods of `StableDiffusion`: text to image, kinds of output, and files with their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import __version__
from minisd.features.validate import FiniteChecks, check_int, check_path, check_shape, check_strings, not_finite_input
from minisd.generate import Step
from minisd.guidance import Guidance
from minisd.images import from_pil
from minisd.pipeline.arguments import Arrays, Callback, Options, Prompt
from minisd.pipeline.checks import Request, check_request, check_size
from minisd.pipeline.consistency import check_own_guidance
from minisd.pipeline.metadata import parameters_text, save_png
from minisd.pipeline.provenance import Provenance
from minisd.pipeline.settings import Settings, format_number
from minisd.samplers import Plan, State

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

OUTPUTS = ("pil", "np", "pt", "latent")
AfterStep = Callable[[Plan, State], State]


class Drawing:
    """Mixin with the methods of `StableDiffusion` that draw from text, and what all drawing has in common."""

    name = "(in memory)"  # of the model and, if it is not its own, of its autoencoder, as files name them
    vae_name = ""

    @overload
    def __call__(
        self,
        prompt: str,
        *,
        num_images_per_prompt: Literal[1] = 1,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[Options],
    ) -> Image.Image: ...
    @overload
    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images_per_prompt: int = 1,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[Options],
    ) -> list[Image.Image]: ...
    @overload
    def __call__(
        self, prompt: Prompt, *, num_images_per_prompt: int = 1, output_type: Literal["np"], **options: Unpack[Options]
    ) -> NDArray[np.float32]: ...
    @overload
    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images_per_prompt: int = 1,
        output_type: Literal["pt", "latent"],
        **options: Unpack[Options],
    ) -> Tensor: ...
    def __call__(
        self: StableDiffusion,
        prompt: Prompt,
        *,
        num_images_per_prompt: int = 1,
        output_type: Literal["pil"] | Arrays = "pil",
        **options: Unpack[Options],
    ) -> Any:
        """Draw images from text.

        Args:
            prompt: See `denoise`.
            num_images_per_prompt: The number of images per prompt, with consecutive seeds.
            output_type: "pil" for PIL images; "np" for an array (n, h, w, 3) or "pt" for a tensor (n, 3, h, w), both
                float32 in [0, 1]; "latent" for scaled latents (n, 4, h/8, w/8), which are not decoded.
            options: See `denoise`. `progress` is whether to show a progress bar; by default on a terminal only.

        Returns:
            A PIL image for a single prompt, otherwise a list. The seed of each image is in `image.info["seed"]`.
        """
        arguments: dict[str, Any] = {**options}
        given, progress = arguments.pop("negative_prompt", ""), arguments.pop("progress", None)
        size = self._settings(arguments)
        count = check_int("num_images_per_prompt", num_images_per_prompt, 1, 2**31)
        prompts, negatives = check_strings("prompt", prompt), check_strings("negative_prompt", given)
        check_size(self, size.height, size.width, count * len(prompts))  # before allocating lists of that length
        prompts = [text for text in prompts for _ in range(count)]
        if len(negatives) > 1:
            negatives = [text for text in negatives for _ in range(count)]
        request = self._check(arguments, prompt=prompts, negative_prompt=negatives)
        return self._finished(request, progress, output_type, isinstance(prompt, str) and count == 1)

    def save(self: StableDiffusion, picture: Image.Image, path: str | PathLike[str], overwrite: bool = False) -> Path:
        """Save an image that this model has drawn as a PNG with its settings, and return its path.

        `minisd info` shows the settings, and `minisd generate --like` draws the image again. Unless `overwrite` is set,
        a number is added to the name of an existing file.

        Raises:
            ValueError: If the image has no settings, because it was not drawn by this package, or the name does not end
                in .png.
        """
        target, texts = check_path("path", path), picture.info.get("settings")
        if target.suffix.lower() != ".png":
            raise ValueError(f"{target} has the settings of an image only in a PNG; expected a name ending in .png")
        if texts is None:
            raise ValueError("this image was not drawn by minisd, so that its settings are unknown; use picture.save")
        made = replace(Provenance.of(self, None), model=self.name, vae=self.vae_name).texts()
        more = {name: text for name, text in texts.items() if name not in ("prompt", "negative_prompt")}
        settings = more | made | {"Version": f"minisd {__version__}"}
        text = parameters_text(texts["prompt"], texts["negative_prompt"], settings)
        return save_png(picture, target, text, overwrite)

    def _settings(self: StableDiffusion, arguments: Mapping[str, Any]) -> Settings:
        changes = {name: value for name, value in arguments.items() if name not in ("seed", "guidance", "callback")}
        return Settings.choose(changes, self.defaults)

    def _check(self: StableDiffusion, arguments: Mapping[str, Any], **inputs: Any) -> Request:
        """Check the arguments of `denoise`; `inputs` are those of `check_request`."""
        changes, guidance, callback = {**arguments}, arguments.get("guidance"), arguments.get("callback")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback={callback!r:.80}; expected a function of index, t and latents, or None")
        if guidance is not None:
            parts = {"guidance_scale": "scale", "guidance_rescale": "rescale", "guidance_interval": "interval"}
            if not isinstance(guidance, Guidance):
                raise TypeError(f"guidance={guidance!r:.80}; expected a Guidance, such as Guidance(7.5)")
            if both := [name for name in parts if changes.get(name) is not None]:
                raise ValueError(f"guidance and {both[0]} exclude each other; pass one of them")
            changes |= {name: getattr(guidance, part) for name, part in parts.items()}
        if guidance is not None:
            check_own_guidance(self, guidance)
        request = check_request(self, settings=self._settings(changes), seed=changes.get("seed"), **inputs)
        return replace(request, guidance=guidance or request.guidance, callback=callback)

    def _finished(self: StableDiffusion, request: Request, progress: Any, output_type: str, single: bool) -> Any:
        """Draw a request, and return it as `output_type`; of PIL images only the first if `single`."""
        check_output_type(output_type)
        latents = self._draw_latents(request, progress)
        if output_type == "latent":
            return latents.clone()  # so that it is no inference tensor
        if output_type == "pil":
            pictures = self._pictures(request, latents)
            return pictures[0] if single else pictures
        return as_array((self.decode_to_tensor(latents).float().clamp(-1, 1) + 1) / 2, output_type)

    def _draw_latents(self: StableDiffusion, request: Request, progress: bool | None) -> Tensor:
        step: Step | None = None
        with tqdm(disable=None if progress is None else not progress, unit="step", leave=False) as bar:
            for step in self._denoise(request):
                bar.total = step.num_calls
                bar.update()
        assert step is not None
        return step.latents

    def _pictures(self: StableDiffusion, request: Request, latents: Tensor) -> list[Image.Image]:
        pictures = self.decode(latents)
        for index, picture in enumerate(pictures):
            label(picture, request, index)
        return pictures


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an unknown kind of output."""
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type={output_type!r}; expected one of {', '.join(map(repr, OUTPUTS))}")


def as_array(images: Tensor, output_type: str) -> Any:
    """Return images (n, 3, h, w) in [0, 1] as a tensor, or for "np" as an array (n, h, w, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images


def as_output(pictures: Sequence[Image.Image], output_type: str, device: torch.device) -> Any:
    """Return finished PIL images as a tensor or array in [0, 1]."""
    return as_array((torch.cat([from_pil(picture) for picture in pictures]).to(device) + 1) / 2, output_type)


def label(picture: Image.Image, request: Request, index: int) -> None:
    """Attach seed and settings to image `index` of a request, for `save`."""
    picture.info["seed"] = request.seeds[index]
    own = replace(request.settings, guidance_scale=request.scales[index]).texts()
    first = {name: own.pop(name) for name in ("Steps", "Sampler", "CFG scale")}
    more = {
        "Denoising strength": format_number(request.strength) if request.image is not None else "",
        "Image": "(in memory)" if request.image is not None else "",
        "Mask": "(in memory)" if request.mask is not None or request.area is not None else "",
        "Batch size": str(len(request.seeds)) if len(request.seeds) > 1 else "",
        "Batch pos": str(index) if len(request.seeds) > 1 else "",
        "Guidance": "" if type(request.guidance) is Guidance else type(request.guidance).__name__,
        "Callback": "" if request.callback is None else getattr(request.callback, "__name__", "(in memory)"),
        "Latents": "" if request.latents is None else "(in memory)",
        "Embeddings": "" if request.prompt_embeds is None else "(in memory)",
    }
    own.pop("Denoising strength", None)
    texts = {"prompt": request.prompts[index], "negative_prompt": request.negative_prompts[index]}
    texts |= first | {"Seed": str(request.seeds[index]), "Size": f"{picture.width}x{picture.height}"} | own
    picture.info["settings"] = texts | {name: text for name, text in more.items() if text}


def with_callback(callback: Callback | None, after_step: AfterStep | None, checks: FiniteChecks) -> AfterStep | None:
    """Return what runs after each step: the callback of a user, then `after_step`."""
    if callback is None:
        return after_step

    def call(plan: Plan, state: State) -> State:
        latents, index = plan.latents(state), state.index - 1
        new = callback(index, plan.timesteps[index], latents)
        if new is not None:
            check_shape("the callback's result", new, *latents.shape)
            checks.check(new, not_finite_input("the callback's result"))
            # x̄ = √(σ²+1) x
            state = replace(state, sample=new.detach().to(state.sample) * math.sqrt(plan.sigmas[state.index] ** 2 + 1))
        return state if after_step is None else after_step(plan, state)

    return call
