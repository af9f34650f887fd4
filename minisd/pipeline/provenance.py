"""The provenance of an image: model, adapters, precision and device."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd.pipeline.settings import format_number

if TYPE_CHECKING:
    from minisd.features.adapters import Weight
    from minisd.pipeline.stable_diffusion import StableDiffusion


def fact(png: str, usual: str | None = None) -> Any:
    """Define a field of `Provenance` with its key in a PNG's `parameters`, where the usual value is omitted."""
    return field(metadata={"png": png, "usual": usual})


@dataclass(frozen=True)
class Provenance:
    """The model, adapters, precision and device that drew an image.

    Args:
        model: The name of the model.
        precision: The dtype of the weights, such as "float32".
        device: The device type, such as "cuda".
        prediction: The prediction type of the UNet.
        weights: A fingerprint of all loaded weights.
        loras: The names and weights of the LoRAs: "style 0.8, other 1".
        words: The words of textual inversions: "<unicorn>, <cat>".
        vae: The name of the autoencoder, if it is not the model's own.
    """

    model: str = fact("Model")
    precision: str = fact("Precision", "float32")
    device: str = fact("Device", "cpu")
    prediction: str = fact("Prediction type", "epsilon")
    weights: str = fact("Weights")
    loras: str = field(default="", metadata={"png": "LoRA", "usual": ""})
    words: str = field(default="", metadata={"png": "Textual inversion", "usual": ""})
    vae: str = field(default="", metadata={"png": "VAE", "usual": ""})

    @classmethod
    def of(cls, sd: StableDiffusion, model: str | None, vae: str | None = None) -> Provenance:
        """Return the provenance for a loaded model, where `model` and `vae` are the sources it was loaded from."""
        return cls(
            model=display_name(model),
            precision=str(sd.dtype).removeprefix("torch."),
            device=sd.device.type,
            prediction=sd.schedule.config.prediction_type,
            weights=fingerprint(sd),
            loras=", ".join(f"{name} {format_weight(weight)}" for name, weight in sd.adapters.weights.items()),
            words=", ".join(sd.tokenizer.added),
            vae=display_name(vae) if vae else "",
        )

    def texts(self) -> dict[str, str]:
        """Return the values that are not the usual ones, by their keys in a PNG's `parameters`."""
        order = ("model", "weights", "prediction", "precision", "device", "loras", "words", "vae")
        values = {name: getattr(self, name) for name in order}
        return {PNG_NAMES[name]: value for name, value in values.items() if value != USUAL[name]}


WEIGHT = re.compile(r"-?\d*\.?\d+(?::-?\d*\.?\d+)?")
PNG_NAMES = {item.name: item.metadata["png"] for item in fields(Provenance)}
USUAL = {item.name: item.metadata["usual"] for item in fields(Provenance)}


def display_name(model: str | None) -> str:
    """Return a model's name for metadata: the stem of a file or folder, or the hub id."""
    return Path(model).stem if model and Path(model).exists() else model or "tiny"


def split_lora(argument: str) -> tuple[str, Weight | None]:
    """Split FILE, FILE:WEIGHT or FILE:TEXT:UNET, as passed to --lora, into the file and the weight or None."""
    match = None if Path(argument).exists() else re.fullmatch(rf"(.+?):({WEIGHT.pattern})", argument)
    return (match[1], parse_weight(match[2])) if match else (argument, None)


def parse_weight(text: str) -> Weight:
    """Parse a LoRA's weight or, as in the web UI's tags, those of the text encoder and the UNet: "0.8" or "0.5:0.8"."""
    if not WEIGHT.fullmatch(text):
        return 1.0
    first, *second = map(float, text.split(":"))
    return {"text_encoder": first, "unet": second[0]} if second else first


def format_weight(weight: Weight) -> str:
    """Format a LoRA's weight; `parse_weight` is the inverse."""
    if not isinstance(weight, Mapping):
        return format_number(weight)
    return ":".join(format_number(weight.get(part, 1.0)) for part in ("text_encoder", "unet"))


def file_hash(path: Path) -> str:
    """Return the first ten hex digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def fingerprint(sd: StableDiffusion) -> str:
    """Return a ten-digit fingerprint of a model with its adapters, hashed from the configuration and some weights.

    For speed, only the first and last eight values of each tensor are hashed; training changes all values anyway.
    """
    import torch

    parts = {part.name: getattr(sd.config, part.name) for part in fields(sd.config)}
    # only what is not the default, so that a field that is added later changes no fingerprint
    settings = [
        f"{name}.{item.name}={value}"
        for name, part in parts.items()
        for item in fields(part)
        if (value := getattr(part, item.name)) != item.default
    ]
    digest = hashlib.sha256("\n".join(sorted(settings)).encode())
    tensors = {
        f"{part}.{name}": tensor
        for part in ("text_encoder", "unet", "autoencoder")
        for name, tensor in getattr(sd, part).state_dict().items()
    }
    for name, lora in sd.adapters.loras.items():
        for layer, update in lora.items():
            digest.update(f"{name} {layer} {update.scale}".encode())
            for factor, value in update.named_parameters():
                tensors[f"{name} {layer} {factor.removeprefix('lora_')}"] = value.detach()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1)
        ends = torch.cat([flat[:8], flat[-8:]]).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:10]
