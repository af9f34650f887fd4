"""Checkpoints: reading a model from a hub id, a diffusers folder or a single file, strictly, and writing a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisd.autoencoder import Autoencoder
from minisd.config import SD15, SD21, SD21_BASE, ModelConfig
from minisd.features import validate as checks
from minisd.io.diffusers_folder import STEMS, Defaults, read_configs, save
from minisd.io.key_names import (
    IGNORED_IN_FOLDER,
    IGNORED_IN_SINGLE_FILE,
    Source,
    folder_sources,
    looks_like,
    single_file_sources,
)
from minisd.io.tensors import (
    CheckpointError,
    TensorInfo,
    pick_weights,
    read_header,
    read_json,
    read_tensors,
    shards,
    shown,
)
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Defaults",
    "Loaded",
    "describe",
    "load",
    "open_checkpoint",
    "save",
]
SHIPPED = Path(str(resources.files("minisd") / "assets/tiny"))
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Loaded:
    """A model in memory: its configuration and its parts, in evaluation mode and without gradients."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    unet: UNet
    defaults: Defaults


class WeightFile(NamedTuple):
    """A file of weights and what it holds; in a folder, the part's name and a dot go before the keys."""

    path: Path
    prefix: str
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, every key accounted for, its weights not yet read.

    `sources` tells for each parameter, such as `unet.conv_in.weight`, under which key the files keep it.
    """

    path: Path
    layout: str
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: Defaults
    files: tuple[WeightFile, ...]
    sources: Mapping[str, Source]

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Loaded:
        """Read the weights straight to the device and dtype, with no second copy of them in memory."""
        modules, wanted = _meta_modules(self.config), _by_key(self.sources)
        shapes = {name: value.shape for name, value in _targets(modules).items()}
        states: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
        for path, prefix, tensors in self.files:
            needed = {key: info for key, info in tensors.items() if prefix + key in wanted}
            for key, tensor in read_tensors(path, needed, device, dtype):
                for target, third in wanted[prefix + key]:
                    part, _, name = target.partition(".")
                    piece = tensor if third is None else tensor.chunk(3)[third]
                    states[part][name] = piece.reshape(shapes[target])
        for part, module in modules.items():
            module.load_state_dict(states[part], strict=True, assign=True)
            module.eval().requires_grad_(False)
        return Loaded(
            self.config,
            self.tokenizer,
            modules["text_encoder"],  # type: ignore[arg-type]
            modules["vae"],  # type: ignore[arg-type]
            modules["unet"],  # type: ignore[arg-type]
            self.defaults,
        )

    def describe(self) -> str:
        """Parts, parameters, layout, dtype and size, for `minisd info`; the weights stay on disk."""
        infos = {prefix + key: (path, info) for path, prefix, infos in self.files for key, info in infos.items()}
        size = sum(path.stat().st_size for path, _, _ in self.files)
        sampler, pixels = (
            self.defaults.sampler,
            self.config.unet.sample_size * self.config.autoencoder.downscale,
        )
        rows = {
            "layout": self.layout,
            "size on disk": f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
            "prediction": self.config.schedule.prediction_type,
            "picture": f"{pixels}×{pixels} pixels",
            "sampler": f"{sampler.name}, {self.defaults.num_inference_steps} steps, "
            f"guidance {self.defaults.guidance_scale:g}",
        }
        lines = [str(self.path), *(f"  {name:<13}{value}" for name, value in rows.items())]
        total = 0
        for part, module in _meta_modules(self.config).items():
            count = sum(p.numel() for p in module.parameters())
            found = [infos[self.sources[f"{part}.{name}"].key] for name in module.state_dict()]
            kinds = ", ".join(sorted({info.dtype for _, info in found}))
            names = ", ".join(sorted({path.name for path, _ in found}))
            lines.append(f"  {part:<13}{count:>13,} parameters  {kinds}  {names}")
            total += count
        return "\n".join([*lines, f"  {'in all':<13}{total:>13,} parameters"])


def open_checkpoint(
    source: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
    config: ModelConfig | None = None,
) -> Checkpoint:
    """Find a checkpoint and account for every key, without reading the weights.

    source: None or "tiny" for the shipped model, a diffusers folder, a single file in CompVis layout, or a hub id
    "owner/name", which is downloaded once (`revision` picks a version of it). variant: such as "fp16", for folders
    that hold several. prediction_type: what the UNet was trained to predict, where the checkpoint does not say or says
    it wrongly. config: the sizes of a single file that is no published model. Raises CheckpointError, which names what
    is missing, unexpected or misshaped, FileNotFoundError, and for hub ids what `minisd.io.hub.download` raises.
    """
    path = _locate(source, variant, revision)
    checkpoint = _open_folder(path, variant) if path.is_dir() else _open_single_file(path, prediction_type, config)
    if prediction_type is None:
        return checkpoint
    schedule = replace(checkpoint.config.schedule, prediction_type=prediction_type)
    return replace(checkpoint, config=replace(checkpoint.config, schedule=schedule))


def load(
    source: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **choices: Any,
) -> Loaded:
    """Load a model; the choices and errors are those of `open_checkpoint`."""
    return open_checkpoint(source, **choices).load(device, dtype)


def describe(source: str | os.PathLike[str] | None = None, **choices: Any) -> str:
    """Describe a model without reading its weights; the choices and errors are those of `open_checkpoint`."""
    return open_checkpoint(source, **choices).describe()


def _locate(source: str | os.PathLike[str] | None, variant: str | None, revision: str | None) -> Path:
    if source is None or source == "tiny":
        return SHIPPED
    path = checks.check_path("source", source)
    if path.exists():
        return path
    hub_id = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII)
    if isinstance(source, str) and hub_id and path.suffix not in SINGLE_FILES:
        from minisd.io import hub  # imports huggingface_hub, which nothing else needs

        return hub.download(source, variant=variant, revision=revision)
    raise FileNotFoundError(
        f"no model at {source!r}; expected a diffusers folder, a .safetensors or .ckpt file, a hub id 'owner/name', "
        "or nothing for the shipped model"
    )


def _open_folder(folder: Path, variant: str | None) -> Checkpoint:
    files: list[WeightFile] = []
    config, defaults = read_configs(folder)
    for part in STEMS:
        names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
        chosen = pick_weights(names, STEMS[part], variant)
        if not chosen:
            raise CheckpointError(
                f"{folder / part} holds no {STEMS[part]}.safetensors or .bin; there is: {_some(sorted(names))}. "
                "Fetch the whole folder"
            )
        first = folder / part / chosen[0]
        paths = shards(first) if first.suffix == ".json" else [first]
        headers = [read_header(path) for path in paths]
        if first.suffix == ".json":
            _check_index(first, {path.name: header for path, header in zip(paths, headers, strict=True)})
        files += [WeightFile(path, f"{part}.", header) for path, header in zip(paths, headers, strict=True)]
    tokenizer = _read_tokenizer(folder / "tokenizer", config.text_encoder.vocab_size)
    sources = _match(config, files, folder_sources, IGNORED_IN_FOLDER, folder)
    return Checkpoint(folder, "diffusers folder", config, tokenizer, defaults, tuple(files), sources)


def _check_index(index: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Each tensor is in the one shard that the index says, so that none comes twice or from another version."""
    told = read_json(index)["weight_map"]
    held = {(key, name) for name, header in headers.items() for key in header}
    if wrong := [key for key, name in held ^ set(told.items())]:
        raise CheckpointError(
            f"{index} and its shards disagree on {_some(sorted(set(wrong)))}; they are of different versions. Fetch "
            "all of them again"
        )


def _read_tokenizer(folder: Path, rows: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_pretrained(folder if folder.is_dir() else None)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    count = len(tokenizer.vocabulary)
    if count > rows or (count < rows and not (folder / "added_tokens.json").is_file()):
        raise CheckpointError(
            f"{folder} has {count} tokens and the text encoder a table of {rows}; they are of different models"
        )
    return tokenizer


def _open_single_file(path: Path, prediction_type: str | None, config: ModelConfig | None) -> Checkpoint:
    if path.suffix not in SINGLE_FILES:
        raise CheckpointError(f"{path} is no checkpoint; expected a folder or a {', '.join(SINGLE_FILES)} file")
    header = read_header(path)
    config = config or _infer_config(path, header, prediction_type)
    tokenizer = Tokenizer.from_pretrained()
    if any(key.startswith("cond_stage_model.model.") for key in header):  # OpenCLIP's text encoder pads with "!"
        tokenizer = Tokenizer(tokenizer.vocabulary, list(tokenizer.ranks), pad_token="!")

    def sources(part: str, name: str) -> tuple[Source, ...]:
        return single_file_sources(part, name, config)

    files = (WeightFile(path, "", header),)
    found = _match(config, files, sources, IGNORED_IN_SINGLE_FILE, path)
    return Checkpoint(path, "single file, CompVis layout", config, tokenizer, Defaults(), files, found)


def _infer_config(path: Path, header: Mapping[str, TensorInfo], prediction_type: str | None) -> ModelConfig:
    first = header.get("model.diffusion_model.input_blocks.0.0.weight")
    cross = header.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    width = cross.shape[-1] if cross else None
    if first is None or width not in (768, 1024) or first.shape[1:2] not in ((4,), (9,)):
        kind = looks_like(header)
        raise CheckpointError(
            f"{path} is not Stable Diffusion 1 or 2 in CompVis layout; expected model.diffusion_model.* of context "
            f"width 768 or 1024 and 4 or 9 input channels, found {_some(list(header))}. "
            + (f"It looks like {kind}, which cannot be loaded as a model" if kind else "Use another file")
        )
    if width == 1024 and prediction_type is None:
        raise CheckpointError(
            f"{path} is Stable Diffusion 2, and a single file does not say what the UNet predicts; give "
            "prediction_type='v_prediction' (2.x at 768 pixels) or 'epsilon' (2.x base, at 512)"
        )
    base = SD15 if width == 768 else SD21_BASE if prediction_type == "epsilon" else SD21
    return replace(base, unet=replace(base.unet, in_channels=first.shape[1]))


class _NoInit(TorchFunctionMode):
    """Skips the initialisation of parameters, which costs seconds even where they have no memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return values["tensor"] if "tensor" in values else args[0]
        return func(*args, **values)


def _meta_modules(config: ModelConfig) -> dict[str, nn.Module]:
    """The parts without memory for their weights, under the names of a diffusers folder."""
    with torch.device("meta"), _NoInit():
        return {
            "text_encoder": TextEncoder(config.text_encoder),
            "vae": Autoencoder(config.autoencoder),
            "unet": UNet(config.unet),
        }


def _targets(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def _by_key(sources: Mapping[str, Source]) -> dict[str, list[tuple[str, int | None]]]:
    wanted: dict[str, list[tuple[str, int | None]]] = {}
    for target, source in sources.items():
        wanted.setdefault(source.key, []).append((target, source.third))
    return wanted


def _match(
    config: ModelConfig,
    files: Sequence[WeightFile],
    candidates: Callable[[str, str], tuple[Source, ...]],
    ignored: re.Pattern[str],
    path: Path,
) -> dict[str, Source]:
    """Find a source for every parameter, and a use for every key; CheckpointError lists all that do not fit."""
    header = {prefix + key: info for _, prefix, infos in files for key, info in infos.items()}
    found: dict[str, Source] = {}
    missing, misshaped = [], []
    for target, value in _targets(_meta_modules(config)).items():
        options = candidates(*target.split(".", 1))
        source = next((each for each in options if each.key in header), None)
        if source is None:
            missing.append(options[0].key)
            continue
        found[target] = source
        expected, info = tuple(value.shape), header[source.key]
        if source.third is not None:
            expected = (3 * expected[0], *expected[1:])
        # a 1×1 convolution and a linear layer are the same: (c, d, 1, 1) and (c, d)
        if info.shape not in (expected, (*expected, 1, 1)) and (*info.shape, 1, 1) != expected:
            misshaped.append(f"{source.key} {list(info.shape)}, expected {list(expected)}")
        elif info.dtype not in ("float16", "bfloat16", "float32", "float64"):
            misshaped.append(f"{source.key} of dtype {info.dtype}, expected floating point of 16 to 64 bits")
    used = {source.key for source in found.values()}
    unexpected = [key for key in header if key not in used and not ignored.fullmatch(key)]
    lists = {"missing": missing, "misshaped": misshaped, "unexpected": unexpected}
    if any(lists.values()):
        problems = "\n".join(f"  {len(keys)} {kind}: {_some(keys)}" for kind, keys in lists.items() if keys)
        raise CheckpointError(
            f"{path} does not fit its configuration:\n{problems}\n"
            "It is incomplete, of another model, or holds more than a model; fetch it again or use another one"
        )
    return found


def _some(names: list[str], limit: int = 4) -> str:
    some = ", ".join(map(shown, names[:limit])) or "nothing"
    return some + (f" and {len(names) - limit} more" if len(names) > limit else "")
