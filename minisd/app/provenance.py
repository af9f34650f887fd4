"""The provenance of an image: model, adapters, precision and device."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd.pipeline.settings import format_number

if TYPE_CHECKING:
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
    """

    model: str = fact("Model")
    precision: str = fact("Precision", "float32")
    device: str = fact("Device", "cpu")
    prediction: str = fact("Prediction type", "epsilon")
    weights: str = fact("Weights")
    loras: str = field(default="", metadata={"png": "LoRA", "usual": ""})
    words: str = field(default="", metadata={"png": "Textual inversion", "usual": ""})

    @classmethod
    def of(cls, sd: StableDiffusion, model: str | None) -> Provenance:
        """Return the provenance for a loaded model, where `model` is the source it was loaded from."""
        return cls(
            model=display_name(model),
            precision=str(sd.dtype).removeprefix("torch."),
            device=sd.device.type,
            prediction=sd.schedule.config.prediction_type,
            weights=fingerprint(sd),
            loras=", ".join(f"{name} {format_number(weight)}" for name, weight in sd.adapters.weights.items()),
            words=", ".join(sd.tokenizer.added),
        )

    def texts(self) -> dict[str, str]:
        """Return the values that are not the usual ones, by their keys in a PNG's `parameters`."""
        order = ("model", "weights", "prediction", "precision", "device", "loras", "words")
        values = {name: getattr(self, name) for name in order}
        return {PNG_NAMES[name]: value for name, value in values.items() if value != USUAL[name]}


PNG_NAMES = {item.name: item.metadata["png"] for item in fields(Provenance)}
USUAL = {item.name: item.metadata["usual"] for item in fields(Provenance)}


def display_name(model: str | None) -> str:
    """Return a model's name for metadata: the stem of a file or folder, or the hub id."""
    return Path(model).stem if model and Path(model).exists() else model or "tiny"


def split_lora(argument: str) -> tuple[str, float | None]:
    """Split FILE or FILE:WEIGHT, as passed to --lora, into the file and the weight or None."""
    match = None if Path(argument).exists() else re.fullmatch(r"(.+):(-?\d*\.?\d+)", argument)
    return (match[1], float(match[2])) if match else (argument, None)


def file_hash(path: Path) -> str:
    """Return the first ten hex digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def fingerprint(sd: StableDiffusion) -> str:
    """Return a ten-digit fingerprint of a model with its adapters, hashed from the configuration and some weights.

    For speed, only the first and last eight values of each tensor are hashed; training changes all values anyway.
    """
    import torch

    # as the configuration was once written, so that fingerprints in older images stay valid
    config = repr(sd.config).replace("timestep_spacing=None", "timestep_spacing='leading'")
    config = config.replace(", rescale_betas_zero_snr=False", ", clip_sample=False")
    digest = hashlib.sha256(config.encode())
    tensors = {
        f"{part}.{name}": tensor
        for part in ("text_encoder", "unet", "autoencoder")
        for name, tensor in getattr(sd, part).state_dict().items()
    }
    for name, lora in sd.adapters.loras.items():
        for layer, update in lora.items():
            digest.update(f"{name} {layer} {update.scale}".encode())
            tensors |= {f"{name} {layer} A": update.lora_A.detach(), f"{name} {layer} B": update.lora_B.detach()}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1)
        ends = torch.cat([flat[:8], flat[-8:]]).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:10]
