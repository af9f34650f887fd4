"""`minisd generate --like`: reading the settings of an image drawn by minisd or another program.

PNGs drawn by minisd contain a complete and exact record. Otherwise the record is built from the `parameters` text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import typer

from minisd.app.options import LoadOptions
from minisd.features.adapters import Weight, default_name
from minisd.features.more_samplers import Sampler
from minisd.features.prompt_syntax import TAG, split_loras
from minisd.pipeline.metadata import Parameters, no_metadata, parse_parameters, read_sampler, read_texts
from minisd.pipeline.provenance import PNG_NAMES, USUAL, Provenance, file_hash, format_weight, parse_weight, split_lora
from minisd.pipeline.settings import SAMPLER_LABELS, SAMPLER_PARTS, SETTINGS, Setting, Settings

REQUIRED = {"seed"} | {item.name for item in fields(Settings) if item.default is MISSING}
TEXTS = {"seed": Setting(int, option="--seed", png="Seed")} | dict(SETTINGS)
BATCH = {"batch_size": "Batch size", "batch_pos": "Batch pos", "images": "Images"}
SOURCE = {"image": "Image", "image_hash": "Image hash", "mask": "Mask", "mask_hash": "Mask hash"}
# keys in `parameters` that are read here or do not affect the pixels
KNOWN = {setting.png for setting in TEXTS.values()} | {*PNG_NAMES.values(), *BATCH.values(), *SOURCE.values()}
KNOWN |= {"Size", "Outpaint", "Schedule type", "Interpolation", "Version", "Inpaint area", "Template"}
KNOWN |= {"Negative Template", "Model hash", "VAE hash", "Lora hashes", "TI hashes", "Hashes", "Size-1", "Size-2"}
# The nearest to other samplers of the web UI and its extensions.
NEAREST = {
    "lms": "euler", "dpm2": "heun", "dpm2 a": "euler_a", "dpm++ 2s a": "dpmpp_sde", "dpm++ 3m sde": "dpmpp_2m_sde",
    "dpm++ 2m sde heun": "dpmpp_2m_sde", "dpm fast": "dpmpp_2m", "dpm adaptive": "dpmpp_2m", "restart": "heun",
    "ddim cfg++": "ddim", "tcd": "lcm", "sa-solver": "dpmpp_2m_sde", "sa solver": "dpmpp_2m_sde", "ipndm": "pndm",
}  # fmt: skip


@dataclass(frozen=True)
class ImageSettings:
    """The generation settings of an existing image.

    Args:
        path: The image file.
        record: The record, see `Job.record`. For other programs, its only provenance is the model name.
        ours: Whether the image was drawn by minisd.
    """

    path: Path
    record: Mapping[str, Any]
    ours: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in the record, as arguments for `Settings.choose`."""
        return {name: value for name, value in self.record.items() if name in SETTINGS}

    @property
    def batch(self) -> tuple[int, int]:
        """The batch size, and the position of the image in the batch."""
        size, position = self.record.get("batch_size", 1), self.record.get("batch_pos", 0)
        return (size, position) if 0 <= position < size < 10_000 else (1, 0)

    @property
    def lora_weights(self) -> dict[str, Weight]:
        """The weight of each LoRA, by name."""
        pairs = [text.rpartition(" ") for text in self.record.get("loras", "").split(", ") if text]
        return {name or weight: parse_weight(weight) if name else 1.0 for name, _, weight in pairs}

    def check_options(self, image: Path | None, mask: Path | None, loading: LoadOptions) -> None:
        """Raise BadParameter if a required model, LoRA or input image is missing; warn if an input file differs."""
        record, path, loras = self.record, self.path, loading.lora or []
        if (vae := record.get("vae")) and loading.vae is None:
            if self.ours:
                raise typer.BadParameter(f"{path} was drawn with the autoencoder {vae}; pass it with --vae")
            warn(
                f"{path} was drawn with the autoencoder {vae}, not the model's own; if you have it, pass it with --vae"
            )
        if loading.model is None and not (self.ours and record["model"] == "tiny"):
            raise typer.BadParameter(f"{path} was drawn with the model {record['model']}; specify one with --model")
        names: list[str] = []
        for argument in loras:
            names.append(default_name(Path(split_lora(argument)[0]), names))
        for name, weight in self.lora_weights.items():
            if name not in names:
                advice = f"--lora {name}.safetensors" + ("" if self.ours else " or a prompt without it")
                raise typer.BadParameter(
                    f"{path} was drawn with the LoRA {name!r} at {format_weight(weight)}; pass {advice}"
                )
        for option, file in (("image", image), ("mask", mask)):
            if record.get(option) and file is None:
                raise typer.BadParameter(
                    f"{path} was drawn with the {option} {record[option]}; pass it with --{option}"
                )
            if file and record.get(f"{option}_hash") not in (None, "", file_hash(file)):
                warn(f"{file} is not the file that {path} was drawn from; the result will differ")

    def check_model(self, provenance: Provenance) -> None:
        """Compare the loaded model with that of the record. Raises BadParameter for a missing textual inversion."""
        record, path = self.record, self.path
        for word in filter(None, record.get("words", "").split(", ")):
            if word not in provenance.words.split(", "):
                raise typer.BadParameter(
                    f"{path} was drawn with the textual inversion {word!r}; pass its file with --textual-inversion"
                )
        if not self.ours:
            return
        if record["prediction"] != provenance.prediction:
            raise typer.BadParameter(
                f"{path} was drawn with prediction type {record['prediction']}, but the model has "
                f"{provenance.prediction}; pass --prediction-type {record['prediction']}"
            )
        if record["device"] != provenance.device:
            warn(f"{path} was drawn on {record['device']}; on {provenance.device} some pixels will differ")
        if record["precision"] == provenance.precision and record.get("weights") not in (None, provenance.weights):
            warn(
                f"{path} was drawn with weights that differ from those loaded (model, LoRA or textual inversion); "
                "the result will differ"
            )


def settings_from_image(path: Path, given: Mapping[str, Any]) -> ImageSettings:
    """Read the generation settings of an image. Warns about settings that are ignored.

    Args:
        given: The options from the command line, by argument name. The settings that they override are not read.

    Raises OSError for an image without metadata, and BadParameter for a setting that is missing or unsupported.
    """
    text, record, program = read_texts(path)
    record = None if record is None else _check_record(record)
    if record is None and text is None:
        raise no_metadata(path, program)
    if record is None:
        parameters = parse_parameters(text or "")
        ours = parameters.settings.get("Version", "").startswith("minisd ")
        _warn_of_losses(path, parameters, ours)
        record = _record_from_parameters(path, parameters, ours, given)
    else:
        ours = True
    if "interpolation" in record:
        raise typer.BadParameter(f"{path} was drawn by `minisd interpolate`; use that command instead of --like")
    # eta=0 was once recorded for every sampler
    kept = {name: value for name, value in record.items() if value is not None and (name, value) != ("eta", 0)}
    return ImageSettings(path, kept, ours)


def _check_record(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Validate the types in a PNG's record. Returns None if it is invalid."""
    kinds = {name: Setting(str) for name in ("prompt", "negative_prompt", "version", *SOURCE, *PNG_NAMES)}
    kinds |= {name: Setting(int) for name in BATCH} | TEXTS
    optional = {*SETTINGS, *SOURCE, "images", "vae"} - REQUIRED
    checked: dict[str, Any] = {"interpolation": True} if "interpolation" in record else {}
    try:
        for name, kind in kinds.items():
            if name not in optional or record.get(name) is not None:
                checked[name] = kind.from_json(name, record[name])
        if record["outpaint"] is not None:
            left, right, top, bottom = (Setting(int).from_json("outpaint", side) for side in record["outpaint"])
            checked["outpaint"] = left, right, top, bottom
    except (KeyError, TypeError, ValueError):
        return None
    return checked


def _record_from_parameters(path: Path, parameters: Parameters, ours: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """Build a record from a `parameters` text, without the settings in `given`."""
    texts = parameters.settings
    record: dict[str, Any] = {"prompt": parameters.prompt, "negative_prompt": parameters.negative_prompt}
    if "Interpolation" in texts:
        return record | {"interpolation": True}
    record |= {name: texts.get(png) for name, png in SOURCE.items()} | {
        "outpaint": _integers(texts, "Outpaint", " ", 4)
    }
    if ours:
        record |= {name: texts.get(png, USUAL[name]) for name, png in PNG_NAMES.items()}
        record |= {name: int(texts[png]) for name, png in BATCH.items() if texts.get(png, "").isdecimal()}
    else:
        model = texts.get("Model", texts.get("Model hash", "(unknown)"))
        vae = texts.get("VAE", "")
        record |= {"model": model, "words": _words(texts), "vae": "" if vae in ("None", "Automatic") else vae}
        if "prompt" not in given:  # prompts may contain LoRA tags, which a folder of LoRAs makes valid
            record |= _read_tags(path, parameters.prompt, "lora_folder" in given)
        redrawn = "Denoising strength" in texts and not any(name.startswith("Hires") for name in texts)
        record |= {"image": "(unknown)"} if redrawn else {}
        record |= {"mask": "(unknown)"} if {"Mask blur", "Inpaint area"} & texts.keys() else {}
    skipped = {"sampler", *given, *(SAMPLER_PARTS if "sampler" in given else ())}
    skipped |= set() if "image" in given else {"strength"}
    skipped |= set() if "mask" in given else {"mask_blur", "padding_mask_crop"}
    for name, kind in TEXTS.items():
        if kind.png and name not in skipped and (kind.png in texts or name in REQUIRED):
            record[name] = _read(path, texts, kind)
    if not {"width", "height"} <= given.keys():
        record |= _read_size(path, texts, record["outpaint"] or (0, 0, 0, 0))
    return record if "sampler" in given else _add_sampler(path, texts, record)


def _read(path: Path, texts: Mapping[str, str], kind: Setting) -> Any:
    if kind.png not in texts:
        raise typer.BadParameter(f"{path} has no {kind.png}; pass {kind.option}")
    try:
        return kind.from_text(texts[kind.png])
    except ValueError as error:
        text = f"{kind.png}: {texts[kind.png]!r}"
        raise typer.BadParameter(f"{path} has an invalid {text}; pass {kind.option}") from error


def _read_size(path: Path, texts: Mapping[str, str], margins: Sequence[int]) -> dict[str, int]:
    """Read width and height, without the outpainting margins."""
    size = _integers(texts, "Size", "x", 2)
    if size is None:
        raise typer.BadParameter(f"{path} has an invalid Size: {texts.get('Size')!r}; pass --width and --height")
    left, right, top, bottom = margins
    return {"width": size[0] - left - right, "height": size[1] - top - bottom}


def _integers(texts: Mapping[str, str], name: str, separator: str, count: int) -> tuple[int, ...] | None:
    parts = texts.get(name, "").split(separator)
    return tuple(map(int, parts)) if len(parts) == count and all(re.fullmatch("[0-9]{1,5}", x) for x in parts) else None


def _add_sampler(path: Path, texts: Mapping[str, str], record: dict[str, Any]) -> dict[str, Any]:
    """Add the sampler to a record, and drop options that it does not support, such as another program's eta."""
    sampler = read_sampler(texts)
    if sampler is None:
        label = ", ".join(texts[name] for name in ("Sampler", "Schedule type") if name in texts) or "none"
        nearest = NEAREST.get(re.sub(" (karras|exponential)$", "", texts.get("Sampler", "").strip().lower()), "")
        hint = f"the nearest is {nearest} of {', '.join(SAMPLER_LABELS)}" if nearest else ", ".join(SAMPLER_LABELS)
        raise typer.BadParameter(
            f"{path} was drawn with the unsupported sampler {label}; choose one with --sampler: {hint}"
        )
    name, karras, sigmas = sampler
    record = record | {"sampler": name, "karras": karras} | ({"sigmas": sigmas} if sigmas else {})
    for part in SAMPLER_PARTS:
        try:
            Sampler(name, **{part: record[part]} if part in record else {})
        except ValueError as error:
            warn(f"{path}: {error}; ignoring {part}")
            del record[part]
    return record


def _warn_of_losses(path: Path, parameters: Parameters, ours: bool) -> None:
    """Warn about images from other programs and about unsupported settings."""
    texts = parameters.settings
    unknown = [f"{name}: {text}" for name, text in texts.items() if name not in KNOWN]
    if not ours:
        version = texts.get("Version", "unknown version")
        warn(
            f"{path} was drawn by another program ({version}), with different noise and rounding; expect a similar "
            "picture, not an identical one"
        )
        unknown += [match[0] for match in TAG.finditer(parameters.prompt) if match[1] == "hypernet"]
    if unknown:
        warn(f"{path} was drawn with unsupported settings, which are ignored: {', '.join(unknown)}")


def _read_tags(path: Path, prompt: str, keep: bool) -> dict[str, str]:
    """Remove tags such as <lora:style:0.8> from a prompt, and return the LoRAs in record format: "style 0.8".

    With `keep`, only the tags of hypernetworks are removed. Raises BadParameter for tags that are not supported.
    """
    prompt = TAG.sub(lambda tag: "" if tag[1] == "hypernet" else tag[0], prompt).strip()
    if keep:
        return {"prompt": prompt}
    try:
        prompt, loras = split_loras(prompt)
    except ValueError as error:
        raise typer.BadParameter(f"{path}: {error}; or pass another prompt") from error
    return {"prompt": prompt, "loras": ", ".join(f"{name} {format_weight(each)}" for name, each in loras.items())}


def _words(texts: Mapping[str, str]) -> str:
    """Return the words of textual inversions, which other programs write as "name: hash, name: hash"."""
    if "TI hashes" not in texts:
        return texts.get("Textual inversion", "")
    return ", ".join(pair.partition(":")[0].strip() for pair in texts["TI hashes"].split(",") if pair.strip())


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
