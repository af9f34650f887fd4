"""Weighted sums of the weights of several models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

PARTS = ("text_encoder", "unet")  # the autoencoder is the same in most models, and kept


@torch.no_grad()
def merge(sd: StableDiffusion, other: StableDiffusion, weight: float, base: StableDiffusion | None = None) -> None:
    """Replace the weights of a model in place; see `StableDiffusion.merge`. They are summed in float32."""
    models = [sd, other, *([] if base is None else [base])]
    for model in models:
        if model.adapters.loras:
            raise ValueError(f"a model has the LoRA {', '.join(model.adapters.loras)}; call unload_lora() first")
        for part in (*PARTS, "schedule"):
            mine, its = getattr(sd.config, part), getattr(model.config, part)
            if part == "schedule":
                mine, its = mine.prediction_type, its.prediction_type
            if mine != its:
                raise ValueError(f"the models differ in their {part} ({its} instead of {mine}); use models of one kind")
        if model.tokenizer.vocabulary != sd.tokenizer.vocabulary:
            raise ValueError("the models differ in their vocabulary; load them without textual inversions")
    for part in PARTS:
        own, *others = (getattr(model, part).state_dict() for model in models)
        merged = {}
        for name, value in own.items():
            rest = [state[name].to(value.device, torch.float32) for state in others]
            merged[name] = _sum(value.float(), rest, weight).to(value.dtype)
        getattr(sd, part).load_state_dict(merged, assign=True)
        getattr(sd, part).requires_grad_(False)


def _sum(own: Tensor, others: list[Tensor], weight: float) -> Tensor:
    # W = (1 − w) W₁ + w W₂,   or with a base W = W₁ + w (W₂ − W_base)
    return torch.lerp(own, others[0], weight) if len(others) == 1 else own + weight * (others[0] - others[1])
