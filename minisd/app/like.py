"""What `minisd generate --like` does: reads in a picture how it was drawn, and says what cannot be drawn again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from minisd.app.drawing import Means, file_hash, split_lora
from minisd.app.metadata import Parameters, parse_parameters, read_parameters, read_sampler
from minisd.samplers import SAMPLERS

TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]+)(?::([^<>]*))?>")
# read below, or of no consequence for the pixels
UNDERSTOOD = {
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Weights", "Prediction type"),
    *("Precision", "Device", "LoRA", "Textual inversion", "Timestep spacing", "Eta", "Guidance rescale", "Clip skip"),
    *("Guidance interval", "Feature reuse"),
    *("Denoising strength", "Mask", "Mask hash", "Outpaint", "Image", "Image hash", "Images"),
    *("Batch size", "Batch pos"),
    *("Version", "Model hash", "Lora hashes", "TI hashes", "Hashes", "Size-1", "Size-2"),
}


@dataclass(frozen=True)
class Recalled:
    """What a picture says, with what was asked for in its place.

    options: those of `generate`, by their names in Python. place: of a batch, as `draw_all` takes it. lora_weights: by
    the names of the LoRAs.
    """

    source: Path
    said: Parameters
    options: dict[str, Any]
    place: tuple[int, int] | None
    lora_weights: dict[str, float]

    def check(self, means: Means) -> None:
        """Compare what was loaded with what drew the picture. Raises BadParameter for a word that is missing."""
        said = self.said.settings
        loaded = means.words.split(", ")
        for word in _words(said):
            if word not in loaded:
                raise typer.BadParameter(
                    f"{self.source} was drawn with the learned word {word!r}; give its file with --textual-inversion"
                )
        if not _ours(self.said):
            return
        if (kind := said.get("Prediction type", "epsilon")) != means.prediction:
            raise typer.BadParameter(
                f"{self.source} was drawn by a model that predicts {kind}, this one predicts {means.prediction}; give "
                f"--prediction-type {kind}"
            )
        if said.get("Device", "cpu") != means.device:
            _warn(f"{self.source} was drawn on {said.get('Device', 'cpu')}; on {means.device} some pixels will differ")
        same = said.get("Precision", "float32") == means.precision
        if same and said.get("Weights", means.weights) != means.weights:
            _warn(
                f"{self.source} was drawn with other weights than those loaded now (model, LoRA or textual inversion); "
                "the picture will be another one"
            )


def recall(path: Path, given: Mapping[str, Any], model: str | None, loras: Sequence[str]) -> Recalled:
    """Read a picture's parameters, and fill in with them the options that were not given (None).

    Raises OSError where there are none, BadParameter for what is missing or not known here and which option would say
    it, and warns of settings that it does not understand.
    """
    text = read_parameters(path)
    if text is None:
        raise OSError(f"{path} does not say how it was drawn; give a prompt and options in place of --like")
    said = parse_parameters(text)
    settings = said.settings
    if "Interpolation" in settings:
        raise typer.BadParameter(f"{path} was drawn by `minisd interpolate`, which draws it again; see `minisd info`")
    _say_what_is_lost(path, said, given)
    prompt, weights = _loras(said) if _ours(said) or given["prompt"] is None else (said.prompt, {})
    _needs_model(path, said, model)
    _needs_loras(path, said, weights, loras)
    _needs_pictures(path, said, given)

    def read(option: str, name: str, kind: Callable[[str], Any], flag: str, default: Any = None) -> None:
        if given[option] is not None:
            return
        if name not in settings and default is None:
            raise typer.BadParameter(f"{path} does not say {name}; give {flag}")
        try:
            options[option] = kind(settings[name]) if name in settings else default[0]
        except ValueError as error:
            raise typer.BadParameter(f"{path} says {name}: {settings[name]!r}, which is none; give {flag}") from error

    options: dict[str, Any] = dict(given)
    options["prompt"] = prompt if given["prompt"] is None else given["prompt"]
    options["negative_prompt"] = said.negative_prompt if given["negative_prompt"] is None else given["negative_prompt"]
    read("num_inference_steps", "Steps", int, "--steps")
    read("guidance_scale", "CFG scale", float, "--guidance")
    read("seed", "Seed", int, "--seed")
    read("clip_skip", "Clip skip", int, "--clip-skip", [1])
    read("guidance_rescale", "Guidance rescale", float, "--rescale", [0.0])
    read("guidance_interval", "Guidance interval", _pair_of(float), "--guidance-interval", [None])
    read("feature_reuse", "Feature reuse", _pair_of(int), "--reuse", [None])
    read("outpaint", "Outpaint", _sides, "--outpaint", [None])
    if options["image"] is not None:
        read("strength", "Denoising strength", float, "--strength", [None])
    sides = _sides(settings["Outpaint"]) if "Outpaint" in settings else (0, 0, 0, 0)
    read("width", "Size", lambda size: _size(size)[0] - sides[0] - sides[1], "--width")
    read("height", "Size", lambda size: _size(size)[1] - sides[2] - sides[3], "--height")
    _read_sampler(path, said, options)
    place = None
    if _ours(said):
        read("dtype", "Precision", str, "--dtype", ["float32"])
        read("grid", "Images", lambda count: int(count) > 1, "--grid", [None])
        place = _read_batch(path, settings, given, options)
    return Recalled(path, said, options, place, weights)


def _read_sampler(path: Path, said: Parameters, options: dict[str, Any]) -> None:
    """Set sampler, spacing, karras and eta, unless another sampler is asked for."""
    if options["sampler"] is not None:
        return
    settings = said.settings
    found = read_sampler(settings)
    label = ", ".join(settings[name] for name in ("Sampler", "Schedule type") if name in settings) or "none"
    if found is None or found[0] not in SAMPLERS or (found[1] and not SAMPLERS[found[0]].karras):
        raise typer.BadParameter(
            f"{path} was drawn with the sampler {label}, which is not known here; choose one with --sampler: "
            f"{', '.join(SAMPLERS)}"
        )
    options["sampler"] = found[0]
    options["karras"] = found[1] if options["karras"] is None else options["karras"]
    options["spacing"] = options["spacing"] or settings.get("Timestep spacing")
    if found[0] == "ddim" and "Eta" in settings:
        try:
            options["eta"] = float(settings["Eta"])
        except ValueError as error:
            raise typer.BadParameter(f"{path} says Eta: {settings['Eta']!r}; choose with --sampler ddim") from error


def _read_batch(
    path: Path, settings: Mapping[str, str], given: Mapping[str, Any], options: dict[str, Any]
) -> tuple[int, int] | None:
    """How pictures were drawn together, which decides their last digits; for a grid, how many they are."""
    if given["images"] is not None or options["image"] is not None:
        return None
    numbers = [settings.get(name, "1") for name in ("Batch size", "Batch pos", "Images")]
    if not all(re.fullmatch("[0-9]{1,4}", text) for text in numbers):
        raise typer.BadParameter(f"{path} says Batch size, Batch pos, Images: {', '.join(numbers)}; give --images 1")
    size, at, images = map(int, numbers)
    if "Images" in settings:
        options["images"] = images
        options["batch"] = given["batch"] or size
        return None
    return (size, at) if given["batch"] is None and at < size else None


def _needs_model(path: Path, said: Parameters, model: str | None) -> None:
    name = said.settings.get("Model", said.settings.get("Model hash", "an unknown one"))
    if model is None and not (_ours(said) and name == "tiny"):
        raise typer.BadParameter(f"{path} was drawn with the model {name}; give it, or another one, with --model")


def _needs_loras(path: Path, said: Parameters, weights: Mapping[str, float], loras: Sequence[str]) -> None:
    names = {Path(split_lora(one)[0]).stem for one in loras}
    for name, weight in weights.items():
        if name not in names:
            raise typer.BadParameter(
                f"{path} was drawn with the LoRA {name!r} at {weight:g}; give its file: --lora {name}.safetensors"
                + ("" if _ours(said) else ", or a prompt without it")
            )


def _needs_pictures(path: Path, said: Parameters, given: Mapping[str, Any]) -> None:
    settings = said.settings
    redrawn = "Denoising strength" in settings and not any(name.startswith("Hires") for name in settings)
    if given["image"] is None and (redrawn or "Image" in settings or "Outpaint" in settings):
        name = settings.get("Image", "another picture")
        raise typer.BadParameter(f"{path} was drawn from {name}; give it with --image")
    if given["mask"] is None and "Mask" in settings:
        raise typer.BadParameter(f"{path} was drawn with the mask {settings['Mask']}; give it with --mask")
    for option in ("image", "mask"):
        hashed = settings.get(f"{option.title()} hash")
        if hashed and given[option] and file_hash(given[option]) != hashed:
            _warn(f"{given[option]} is not the file that {path} was drawn from; the picture will be another one")


def _say_what_is_lost(path: Path, said: Parameters, given: Mapping[str, Any]) -> None:
    if not _ours(said):
        version = said.settings.get("Version", "it does not say which")
        _warn(
            f"{path} was drawn by another program ({version}), with noise and rounding of its own; expect a picture of "
            "that kind, not that picture"
        )
    unknown = [f"{name}: {value}" for name, value in said.settings.items() if name not in UNDERSTOOD]
    if not _ours(said):
        if "Eta" in said.settings and read_sampler(said.settings) != ("ddim", False):
            unknown.append(f"Eta: {said.settings['Eta']}")
        unknown += [match[0] for match in TAG.finditer(said.prompt) if match[1] == "hypernet"]
    if unknown:
        _warn(f"{path} was drawn with settings that are not known here, and are left out: {', '.join(unknown)}")


def _loras(said: Parameters) -> tuple[str, dict[str, float]]:
    """The prompt, and the LoRAs with their weights. Other programs name them in the prompt: <lora:style:0.8>."""
    weights: dict[str, float] = {}
    if _ours(said):
        for one in filter(None, said.settings.get("LoRA", "").split(", ")):
            name, _, weight = one.rpartition(" ")
            weights[name or weight] = _float(weight) if name else 1.0
        return said.prompt, weights
    for match in TAG.finditer(said.prompt):
        if match[1] != "hypernet":
            weights[match[2].strip()] = _float((match[3] or "1").split(":")[0])
    return TAG.sub("", said.prompt).strip(), weights


def _words(settings: Mapping[str, str]) -> list[str]:
    """The words that textual inversions brought: here by themselves, elsewhere "name: hash, name: hash"."""
    if "TI hashes" in settings:
        return [one.partition(":")[0].strip() for one in settings["TI hashes"].split(",") if one.strip()]
    return [word for word in settings.get("Textual inversion", "").split(", ") if word]


def _ours(said: Parameters) -> bool:
    return said.settings.get("Version", "").startswith("minisd ")


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise ValueError(text)
    return int(match[1]), int(match[2])


def _pair_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    def read(text: str) -> tuple[Any, Any]:
        one, two = map(kind, text.split())
        return one, two

    return read


def _sides(text: str) -> tuple[int, int, int, int]:
    left, right, top, bottom = map(int, text.split())
    return left, right, top, bottom


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
