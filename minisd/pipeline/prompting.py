"""The prompts of a request: their texts at every step, their LoRAs, and the denoiser that follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisd.features.adapters import layers_of
from minisd.features.prompt_syntax import composed, split_composition, split_loras, switched, texts_by_step
from minisd.features.prompts import common_length, read
from minisd.generate import Denoiser, guided

if TYPE_CHECKING:
    from minisd.pipeline.checks import Request
    from minisd.pipeline.stable_diffusion import StableDiffusion

Texts = tuple[tuple[str, ...], tuple[str, ...]]  # the prompts and the negative prompts of one step


def read_prompts(
    sd: StableDiffusion, prompts: Sequence[str], negatives: Sequence[str], steps: int
) -> tuple[list[Texts], dict[str, float]]:
    """Return the prompts at each of `steps` steps, and the weights of the LoRAs in their tags.

    Raises:
        ValueError: If a prompt is invalid (see `prompts.read`), or has syntax that is not supported where it stands.
        CheckpointError: If the file of a LoRA does not fit the model.
    """
    plain, loras = zip(*map(split_loras, prompts), strict=True)
    if any(other != loras[0] for other in loras):
        raise ValueError("prompts that are drawn together must name the same LoRAs; draw the others in another call")
    for text in negatives:
        if split_loras(text)[1] or len(split_composition(text)) > 1:
            raise ValueError(f"the negative prompt {text[:80]!r} has a LoRA or AND; expected them in the prompt only")
    rows = [[texts_by_step(text, steps) for text in each] for each in (plain, negatives)]
    for text in dict.fromkeys(chain(*rows[0], *rows[1])):
        for part, _ in split_composition(text):
            read(part, sd.tokenizer)
    if loras[0]:
        sd.find_loras(loras[0])
    return list(zip(zip(*rows[0], strict=True), zip(*rows[1], strict=True), strict=True)), loras[0]


def denoiser(sd: StableDiffusion, request: Request, unet: Callable[..., Tensor]) -> Denoiser:
    """Return the denoiser of a run, which changes with the prompts of its steps.

    Args:
        unet: The UNet, or a callable with the same signature.
    """

    def call(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        with _applied(sd, request.loras):
            return unet(latents, timestep, context)

    if request.prompt_embeds is not None:
        cond, uncond = _given_contexts(sd, request, request.prompt_embeds)
        return guided(call, cond, uncond, request.guidance)
    made: dict[Texts, Denoiser] = {}
    for texts in request.texts:
        if texts not in made:
            made[texts] = _denoiser_of(sd, request, call, *texts)
    return switched([made[texts] for texts in request.texts])


def _denoiser_of(
    sd: StableDiffusion,
    request: Request,
    unet: Callable[..., Tensor],
    prompts: Sequence[str],
    negatives: Sequence[str],
) -> Denoiser:
    """Return the denoiser for the prompts of one step; all of them are encoded in one call."""
    # at scale 0 the prediction follows the negative prompt alone
    texts = [p if scale else n for p, n, scale in zip(prompts, negatives, request.scales, strict=True)]
    parts = [split_composition(text) for text in texts]
    count, size = max(map(len, parts)), len(parts)
    is_guided = any(scale not in (0, 1) for scale in request.scales) or count > 1
    # a prompt with fewer parts repeats its first one, with weight 0
    filled = [[(each + [(each[0][0], 0.0)] * count)[i] for each in parts] for i in range(count)]
    with _applied(sd, request.loras):
        encoded = [text for part in filled for text, _ in part]
        contexts = sd._encode_text([*encoded, *(negatives if is_guided else ())], request.settings.clip_skip)
    conds, uncond = contexts[: count * size].split(size), contexts[count * size :] if is_guided else None
    if uncond is None or not any(len(each) > 1 or each[0][1] != 1 for each in parts):
        return guided(unet, conds[0], uncond, request.guidance)
    weights = torch.tensor([[weight for _, weight in part] for part in filled], device=contexts.device)
    return composed(unet, conds, weights, uncond, request.guidance)


def _given_contexts(sd: StableDiffusion, request: Request, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the contexts for given text embeddings and, if guidance needs them, for the negative prompts."""
    cond, scales = embeds.to(sd.device, sd.dtype), request.scales
    if all(scale == 1 for scale in scales):
        return cond, None
    cond, uncond = common_length(cond, sd._encode_text(request.negative_prompts, request.settings.clip_skip))
    cond = torch.where(cond.new_tensor(scales).view(-1, 1, 1) == 0, uncond, cond)
    return cond, uncond if any(scale not in (0, 1) for scale in scales) else None


@contextmanager
def _applied(sd: StableDiffusion, weights: Mapping[str, float]) -> Iterator[None]:
    """Apply the LoRAs of a prompt while in the context: those in the folder, and loaded ones with other weights."""
    if not weights:
        yield
        return
    found = sd.find_loras(weights)
    old = {name: lora.weight for name, lora in found.items()}
    layers = layers_of({"unet": sd.unet, "text_encoder": sd.text_encoder})
    handles = []
    try:
        for name, lora in found.items():
            lora.weight = weights[name]
            if name not in sd.adapters.loras:
                handles += lora.attach(layers)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, lora in found.items():
            lora.weight = old[name]
