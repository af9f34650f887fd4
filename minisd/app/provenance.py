"""Where a picture comes from: the model, what was loaded beside it, and where it ran."""

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
    """A field of `Provenance`. png: its name in a PNG's `parameters`, where the usual value is left out."""
    return field(metadata={"png": png, "usual": usual})


@dataclass(frozen=True)
class Provenance:
    """What drew a picture.

    Args:
        model: Its name.
        precision: Of the weights, such as "float32".
        device: Its type, such as "cuda".
        prediction: The UNet's prediction type.
        weights: A fingerprint of all weights that were loaded.
        loras: Names and weights of the LoRAs: "style 0.8, other 1".
        words: Those that textual inversions brought: "<unicorn>, <cat>".
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
        """The provenance of what a loaded model draws. model: as it was asked for."""
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
        """What is not as usual, by its names in a PNG's `parameters`."""
        order = ("model", "weights", "prediction", "precision", "device", "loras", "words")
        values = {name: getattr(self, name) for name in order}
        return {PNG_NAMES[name]: value for name, value in values.items() if value != USUAL[name]}


PNG_NAMES = {item.name: item.metadata["png"] for item in fields(Provenance)}
USUAL = {item.name: item.metadata["usual"] for item in fields(Provenance)}


def display_name(model: str | None) -> str:
    """What pictures call a model: a file or folder by its name without ending, a hub id as it is."""
    return Path(model).stem if model and Path(model).exists() else model or "tiny"


def split_lora(argument: str) -> tuple[str, float | None]:
    """FILE or FILE:WEIGHT, as --lora takes it, to the file and the weight, None where there is none."""
    match = None if Path(argument).exists() else re.fullmatch(r"(.+):(-?\d*\.?\d+)", argument)
    return (match[1], float(match[2])) if match else (argument, None)


def file_hash(path: Path) -> str:
    """The first ten digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def fingerprint(sd: StableDiffusion) -> str:
    """Ten digits that differ if models or adapters do: a hash of the configuration and of some of the weights.

    Only the first and the last eight values of each tensor are read, which takes no time; training changes all of them.
    """
    import torch

    # the configuration once had another field; with it, pictures from that time are recognised
    config = repr(sd.config).removesuffix("))") + ", clip_sample=False))"
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
