"""The diffusers folder: what its files are called, what its JSON files say, and how it is written."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig
from minisd.features import validate as checks
from minisd.io.tensors import CheckpointError, read_json, save_atomically, shown
from minisd.preview import SD1, Factors
from minisd.samplers import Sampler
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import BOS, EOS, Tokenizer
from minisd.unet import UNet

STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
CLASSES = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
PIPELINES = tuple(f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
# For each sampler diffusers' class, and what that class is told beyond the schedule.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    "lcm": ("LCMScheduler", {}),
}
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "steps_offset",
)


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled unless the caller says otherwise.

    A folder's `minisd.json` says it. Without one the folder's scheduler names the sampler: 25 steps for DPM++ 2M,
    50 for the others, guidance 7.5; but 4 steps without guidance for LCM. A single file, which has neither, gets the
    values below. preview: the linear map from its latents to colours.
    """

    sampler: Sampler = Sampler("dpmpp_2m", karras=True)
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    preview: Factors = SD1


class Model(Protocol):
    """What can be saved: a loaded checkpoint or a pipeline."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def text_encoder(self) -> TextEncoder: ...
    @property
    def autoencoder(self) -> Autoencoder: ...
    @property
    def unet(self) -> UNet: ...
    @property
    def defaults(self) -> Any: ...


def read_configs(folder: Path) -> tuple[ModelConfig, Defaults]:
    """Read the JSON files of a folder; CheckpointError where one is missing, damaged, or of another model."""
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder / 'model_index.json'} is missing; {_instead(folder)}")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(
            f"{folder} is a {shown(str(index.get('_class_name')))}; expected {', '.join(PIPELINES)} "
            "(Stable Diffusion 1 or 2)"
        )
    for part, name in CLASSES.items():
        given = index.get(part)
        if not isinstance(given, list) or given[-1:] != [name]:
            raise CheckpointError(f"{folder / 'model_index.json'} has {part}={shown(repr(given))}; expected a {name}")
    scheduler = folder / "scheduler/scheduler_config.json"
    config = ModelConfig(
        _read_config(TextEncoderConfig, folder / "text_encoder/config.json"),
        _read_config(AutoencoderConfig, folder / "vae/config.json"),
        _read_config(UNetConfig, folder / "unet/config.json"),
        _read_config(ScheduleConfig, scheduler, clip_sample=False),  # diffusers' pipeline turns it off as well
    )
    return config, _read_defaults(folder, read_json(scheduler))


def _instead(folder: Path) -> str:
    """What a folder that is no model holds, and what to do."""
    if (folder / "config.json").is_file():
        values = read_json(folder / "config.json")
        kind = str(values.get("_class_name") or values.get("architectures") or values.get("model_type"))[:80]
        return f"there is only a part, {kind}; give the folder that holds all parts"
    for path in folder.glob("*.safetensors"):
        return f"to read the single file {path.name}, or to load it as an adapter, give its own path"
    return "fetch the whole folder"


def _read_config(kind: Any, path: Path, **changes: Any) -> Any:
    values = read_json(path)
    try:
        return kind.from_dict(values | changes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} describes no model that minisd builds: {error}") from error


def _read_defaults(folder: Path, scheduler: Mapping[str, Any]) -> Defaults:
    path = folder / "minisd.json"
    if path.is_file():
        values = read_json(path)
        try:
            preview = tuple((float(r), float(g), float(b)) for r, g, b in values.get("preview", SD1))
            defaults = Defaults(**values | {"sampler": Sampler(**values["sampler"]), "preview": preview})
            steps, guidance = defaults.num_inference_steps, defaults.guidance_scale
            if type(steps) is not int or not 1 <= steps <= 1000 or not math.isfinite(guidance):
                raise ValueError(f"num_inference_steps={steps!r}, guidance_scale={guidance!r}")
            if not all(math.isfinite(number) for row in preview for number in row):
                raise ValueError("preview has numbers that are not finite")
            return defaults
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path} has no valid generation defaults ({error!r}); fetch it again") from error
    names = {name: sampler for sampler, (name, _) in SCHEDULERS.items()}
    sampler = names.get(str(scheduler.get("_class_name")), "ddim")
    karras = "use_karras_sigmas" in SCHEDULERS[sampler][1] and bool(scheduler.get("use_karras_sigmas"))
    if sampler == "lcm":
        return Defaults(Sampler(sampler), num_inference_steps=4, guidance_scale=1.0)
    return Defaults(Sampler(sampler, karras=karras), 25 if sampler == "dpmpp_2m" else 50)


def save(model: Model, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a folder that minisd, diffusers and transformers load. dtype: by default the weights' own.

    Everything is written into a folder beside it first, which then takes the name: whoever reads sees the old model or
    the new one, never a mixture, and a model that maps the old files keeps them. What else the folder holds stays. A
    kill may leave a folder .NAME.….tmp, whole or not, beside it; it can be deleted. Raises FileExistsError where the
    folder holds anything but a model with the same files.
    """
    target = checks.check_path("folder", folder)
    with _moved_into(target) as new:
        parts: dict[str, nn.Module] = {
            "text_encoder": model.text_encoder,
            "vae": model.autoencoder,
            "unet": model.unet,
        }
        configs = {
            "text_encoder": model.config.text_encoder.to_dict()
            # without "dtype", diffusers would load float16 files in float16 here and in float32 elsewhere
            | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}
            | {"bos_token_id": model.tokenizer.bos_token_id, "eos_token_id": model.tokenizer.eos_token_id},
            "vae": {"_class_name": CLASSES["vae"]} | model.config.autoencoder.to_dict(),
            "unet": {"_class_name": CLASSES["unet"]} | model.config.unet.to_dict(),
        }
        for part, module in parts.items():
            _write_json(new / part / "config.json", configs[part])
            weights = {name: value.to("cpu", dtype).contiguous() for name, value in module.state_dict().items()}
            write = partial(save_file, weights, metadata={"format": "pt"})
            save_atomically(write, new / part / f"{STEMS[part]}.safetensors")
        _write_json(new / "scheduler/scheduler_config.json", _scheduler(model.config.schedule, model.defaults.sampler))
        _write_tokenizer(new / "tokenizer", model.tokenizer)
        _write_json(new / "minisd.json", asdict(model.defaults))
        _write_json(new / "model_index.json", _index(model))


@contextmanager
def _moved_into(target: Path) -> Iterator[Path]:
    """A new folder beside the target; on success it takes the target's place, on failure it is removed."""
    target = target.resolve()
    existing = {path.relative_to(target) for path in target.rglob("*") if path.is_file()} if target.is_dir() else set()
    if target.exists() and (not target.is_dir() or (existing and Path("model_index.json") not in existing)):
        raise FileExistsError(f"{target} exists and is not a model; choose a new folder, or empty it first")
    checks.check_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    new.mkdir()
    try:
        yield new
        files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        stale = {path for path in existing - set(files) if str(path.parent) in STEMS and path.name != "config.json"}
        if stale:
            names = ", ".join(sorted(map(str, stale)))
            raise FileExistsError(
                f"{target} holds weights of another model ({names}); choose a new folder, or empty it"
            )
        with _alone(target.parent):
            _take_place(new, target, files)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within this block no other process that comes here as well moves anything in the folder."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network drives have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take_place(new: Path, target: Path, files: Iterable[Path]) -> None:
    """Give the folder `new` the name of the target, which is removed; what only the target holds goes along."""
    if not target.exists():
        new.rename(target)
    elif os.path.ismount(target):  # which cannot be renamed
        for path in files:
            (target / path.parent).mkdir(parents=True, exist_ok=True)
            os.replace(new / path, target / path)
    else:
        _carry(target, new)
        old = new.with_suffix(".old.tmp")
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        _carry(old, target)  # what came in between
        shutil.rmtree(old, ignore_errors=True)


def _carry(source: Path, target: Path) -> None:
    """Link into the target what is missing there."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            place.mkdir(parents=True, exist_ok=True)
        elif not os.path.lexists(place):
            try:
                os.link(path, place, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, place, follow_symlinks=False)


def _index(model: Model) -> dict[str, Any]:
    task = "Inpaint" if model.config.unet.in_channels == 9 else ""
    return {
        "_class_name": f"StableDiffusion{task}Pipeline",
        "_diffusers_version": "0.38.0",  # of the layout; its inpainting pipeline refuses a folder that names none
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", SCHEDULERS[model.defaults.sampler.name][0]],
        "text_encoder": ["transformers", CLASSES["text_encoder"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", CLASSES["unet"]],
        "vae": ["diffusers", CLASSES["vae"]],
    }


def _scheduler(schedule: ScheduleConfig, sampler: Sampler) -> dict[str, Any]:
    name, extra = SCHEDULERS[sampler.name]
    values = schedule.to_dict()
    told = {key: values.get(key, value) for key, value in extra.items()}
    if "use_karras_sigmas" in told:
        told["use_karras_sigmas"] = sampler.karras
    return (
        {"_class_name": name, "timestep_spacing": sampler.spacing or schedule.timestep_spacing}
        | {key: values[key] for key in SCHEDULE_KEYS}
        | told
    )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    def token(content: str) -> dict[str, Any]:
        # "normalized": looked for after lowering the case, so that <|ENDOFTEXT|> is one too
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    special = {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS)}
    pad = {"pad_token": tokenizer.pad_token}
    typed = {name: {"__type": "AddedToken"} | value for name, value in special.items()}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    _write_json(folder / "vocab.json", tokenizer.vocabulary, indent=None)
    _write_json(folder / "special_tokens_map.json", special | pad)
    _write_json(folder / "tokenizer_config.json", config | pad | typed)
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8", newline="\n")


def _write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=None if indent else (",", ":"))
    path.write_text(text + ("\n" if indent else ""), encoding="utf-8", newline="\n")
