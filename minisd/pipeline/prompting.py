"""The prompts of a request: their texts at every step, their LoRAs, and the denoiser that follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisd.features.adapters import Adapters, Weight, layers_of, part_weights, split_parts
from minisd.features.asynchronous import guidance_on
from minisd.features.lcm_unet import LCMUNet, with_scales
from minisd.features.prompt_syntax import composed, split_composition, split_loras, switched, texts_by_step
from minisd.features.prompts import common_length, read, warn_of_foreign
from minisd.generate import Denoiser, guided
from minisd.guidance import Guidance
from minisd.lora import Layer, LoRA

if TYPE_CHECKING:
    from minisd.pipeline.checks import Request
    from minisd.pipeline.stable_diffusion import StableDiffusion

Texts = tuple[tuple[str, ...], tuple[str, ...]]  # the prompts and the negative prompts of one step
Loras = dict[str, tuple[dict[str, LoRA], Weight]]  # the parts of LoRAs, and their weights, by name


def read_prompts(
    sd: StableDiffusion, prompts: Sequence[str], negatives: Sequence[str], steps: int
) -> tuple[list[Texts], Loras]:
    """Return the prompts at each of `steps` steps, and the LoRAs in their tags.

    Raises:
        ValueError: If a prompt is invalid (see `prompts.read`), or has syntax that is not supported where it stands.
        CheckpointError: If the file of a LoRA does not fit the model.
    """
    plain, tags = zip(*map(split_loras, prompts), strict=True)
    if any(other != tags[0] for other in tags):
        raise ValueError("prompts that are drawn together must name the same LoRAs; draw the others in another call")
    for text in negatives:
        if split_loras(text)[1] or len(split_composition(text)) > 1:
            raise ValueError(f"the negative prompt {text[:80]!r} has a LoRA or AND; expected them in the prompt only")
    rows = [[texts_by_step(text, steps) for text in each] for each in (plain, negatives)]
    for text in dict.fromkeys(chain(*rows[0], *rows[1])):
        for part, _ in split_composition(text):
            read(part, sd.tokenizer)
        warn_of_foreign(text, sd.tokenizer.added)
    loras = {
        name: (split_parts(lora, part_weights(name, tags[0][name], ("unet", "text_encoder"))), tags[0][name])
        for name, lora in (sd.find_loras(tags[0]).items() if tags[0] else ())
    }
    return list(zip(zip(*rows[0], strict=True), zip(*rows[1], strict=True), strict=True)), loras


def denoiser(sd: StableDiffusion, request: Request, unet: Callable[..., Tensor]) -> Denoiser:
    """Return the denoiser of a run, which changes with the prompts of its steps.

    Args:
        unet: The UNet, or a callable with the same signature.
    """
    layers = layers_of({"unet": sd.unet, "text_encoder": sd.text_encoder}) if request.loras else {}
    if isinstance(sd.unet, LCMUNet):
        unet = with_scales(unet, torch.tensor(request.scales, device=sd.device))
        request = replace(request, guidance=Guidance(1.0))

    def call(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        with _applied(request.loras, layers, sd.adapters):
            return unet(latents, timestep, context)

    made: dict[Texts, Denoiser] = {}
    for texts in request.texts:
        if texts not in made:
            with _applied(request.loras, layers, sd.adapters):
                made[texts] = _denoiser_of(sd, request, call, *texts)
    return switched([made[texts] for texts in request.texts])


def _denoiser_of(
    sd: StableDiffusion, request: Request, unet: Callable[..., Tensor], prompts: Sequence[str], negatives: Sequence[str]
) -> Denoiser:
    """Return the denoiser for the prompts of one step; all of them are encoded in one call."""
    clip_skip, scales = request.settings.clip_skip, request.scales
    guidance = request.guidance
    if isinstance(guidance.scale, tuple):
        guidance = guidance_on(guidance, sd.device)
    if request.prompt_embeds is not None:
        cond, uncond = _given_contexts(sd, request.prompt_embeds, negatives, scales, clip_skip)
        return guided(unet, cond, uncond, guidance)
    # at scale 0 the prediction follows the negative prompt alone
    texts = [p if scale else n for p, n, scale in zip(prompts, negatives, scales, strict=True)]
    parts = [split_composition(text) for text in texts]
    count, size = max(map(len, parts)), len(parts)
    is_composed = any(len(each) > 1 for each in parts)
    is_guided = is_composed or any(scale not in (0, 1) for scale in scales)
    # a prompt with fewer parts repeats its first one, with weight 0
    filled = [[(each + [(each[0][0], 0.0)] * count)[i] for each in parts] for i in range(count)]
    encoded = [text for part in filled for text, _ in part]
    contexts = sd.encode_text([*encoded, *(negatives if is_guided else ())], clip_skip)
    conds, uncond = contexts[: count * size].split(size), contexts[count * size :] if is_guided else None
    if uncond is None or not is_composed:
        return guided(unet, conds[0], uncond, guidance)
    weights = torch.tensor([[weight for _, weight in part] for part in filled], device=contexts.device)
    return composed(unet, conds, weights, uncond, guidance)


def _given_contexts(
    sd: StableDiffusion, embeds: Tensor, negatives: Sequence[str], scales: Sequence[float], clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """Return the contexts for given text embeddings and, if guidance needs them, for the negative prompts."""
    cond = embeds.to(sd.device, sd.dtype)
    if all(scale == 1 for scale in scales):
        return cond, None
    cond, uncond = common_length(cond, sd.encode_text(negatives, clip_skip))
    cond = torch.where(cond.new_tensor(scales).view(-1, 1, 1) == 0, uncond, cond)
    return cond, uncond if any(scale not in (0, 1) for scale in scales) else None


@contextmanager
def _applied(loras: Loras, layers: Mapping[str, Layer], adapters: Adapters) -> Iterator[None]:
    """Apply the LoRAs of a prompt while in the context; those that are loaded only change their weights."""
    if not loras:
        yield
        return
    loaded = {name: weight for name, (_, weight) in loras.items() if name in adapters.loras}
    handles = []
    try:
        for lora in (part for name, (parts, _) in loras.items() if name not in loaded for part in parts.values()):
            handles += lora.attach(layers)
        with adapters.weighted(loaded):
            yield
    finally:
        for handle in handles:
            handle.remove()
