"""Loading of models from hub ids, diffusers folders and single files, with strict matching of all tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisd.autoencoder import Autoencoder
from minisd.config import SD15, SD21, SD21_BASE, ModelConfig
from minisd.features.validate import check_path
from minisd.io import key_names
from minisd.io.configs import check_config
from minisd.io.diffusers_folder import STEMS, Defaults, Loaded, pick_weights, read_configs, read_index, save
from minisd.io.key_names import Source
from minisd.io.tensors import (
    FLOAT_DTYPES,
    CheckpointError,
    TensorInfo,
    printable,
    read_header,
    read_tensors,
    same_shape,
)
from minisd.io.tokenizer_files import read_tokenizer
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

__all__ = ["Checkpoint", "CheckpointError", "Defaults", "Loaded", "describe", "load", "open_checkpoint", "save"]
SHIPPED = Path(str(resources.files("minisd") / "assets/tiny"))
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class WeightFile(NamedTuple):
    """A weight file, the prefix to add to its keys (such as "unet." in a folder), and its header."""

    path: Path
    prefix: str
    header: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint on disk whose weights have not been read.

    Attributes:
        sources: The location of each parameter, by names such as "unet.conv_in.weight".
    """

    path: Path
    layout: str
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: Defaults
    files: tuple[WeightFile, ...]
    sources: Mapping[str, Source]

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Loaded:
        """Load the weights directly to a device and dtype, without a second copy in memory."""
        modules = _meta_modules(self.config)
        shapes = {name: value.shape for name, value in _parameters(modules).items()}
        targets: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            targets.setdefault(source.key, []).append(name)
        states: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
        for path, prefix, header in self.files:
            needed = {key: info for key, info in header.items() if prefix + key in targets}
            for key, tensor in read_tensors(path, needed, device, dtype):
                for name in targets[prefix + key]:
                    index, (part, _, rest) = self.sources[name].qkv_index, name.partition(".")
                    value = tensor if index is None else tensor.chunk(3)[index]
                    states[part][rest] = value.reshape(shapes[name])
        for part, module in modules.items():
            module.load_state_dict(states[part], strict=True, assign=True)
            module.eval().requires_grad_(False)
        text_encoder, vae, unet = modules.values()
        return Loaded(self.config, self.tokenizer, text_encoder, unet, vae, self.defaults)

    def describe(self) -> str:
        """Return a summary for `minisd info`, without reading the weights."""
        infos = {prefix + key: (path, info) for path, prefix, header in self.files for key, info in header.items()}
        size = sum(path.stat().st_size for path, _, _ in self.files)
        pixels, defaults = self.config.unet.sample_size * self.config.autoencoder.downscale, self.defaults
        steps, guidance = f"{defaults.num_inference_steps} steps", f"guidance {defaults.guidance_scale:g}"
        rows = {
            "layout": self.layout,
            "size on disk": f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
            "prediction": self.config.schedule.prediction_type,
            "picture": f"{pixels}×{pixels} pixels",
            "sampler": f"{defaults.sampler.name}, {steps}, {guidance}",
        }
        lines = [str(self.path), *(f"  {name:<13}{value}" for name, value in rows.items())]
        total = 0
        for part, module in _meta_modules(self.config).items():
            count = sum(p.numel() for p in module.parameters())
            found = [infos[self.sources[f"{part}.{name}"].key] for name in module.state_dict()]
            dtypes = ", ".join(sorted({info.dtype for _, info in found}))
            names = ", ".join(sorted({path.name for path, _ in found}))
            lines.append(f"  {part:<13}{count:>13,} parameters  {dtypes}  {names}")
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
    """Open a checkpoint and match every key to a parameter, without reading the weights.

    Args:
        source: None or "tiny" for the bundled model, a diffusers folder, a single file in CompVis layout, or a hub id
            "owner/name", which is downloaded once.
        variant: The variant of the weight files, such as "fp16".
        prediction_type: The UNet's prediction type, to override the checkpoint or to supply it if missing.
        revision: The branch, tag or commit of a hub id.
        config: The model configuration of a single file. By default it is inferred.

    Raises:
        CheckpointError: If keys are missing or unexpected, or have the wrong shape.
        FileNotFoundError: If the source does not exist.
        OSError: See `minisd.io.hub.download`.
    """
    path = _locate(source, variant, revision)
    checkpoint = _open_folder(path, variant) if path.is_dir() else _open_single_file(path, prediction_type, config)
    if prediction_type is None:
        return checkpoint
    schedule = replace(checkpoint.config.schedule, prediction_type=prediction_type)
    check_config(schedule)
    return replace(checkpoint, config=replace(checkpoint.config, schedule=schedule))


def load(
    source: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loaded:
    """Load a model. Accepts the options of `open_checkpoint`, and raises the same errors."""
    return open_checkpoint(source, **options).load(device, dtype)


def describe(source: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Return a summary of a model without reading its weights. Accepts the options of `open_checkpoint`."""
    return open_checkpoint(source, **options).describe()


def _locate(source: str | os.PathLike[str] | None, variant: str | None, revision: str | None) -> Path:
    if source is None or source == "tiny":
        return SHIPPED
    path = check_path("source", source)
    if path.exists():
        return path
    hub_id = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII)
    if isinstance(source, str) and hub_id and path.suffix not in SINGLE_FILES:
        from minisd.io import hub  # deferred: imports huggingface_hub

        return hub.download(source, variant=variant, revision=revision)
    raise FileNotFoundError(
        f"no model at {source!r}; expected a diffusers folder, a .safetensors or .ckpt file, a hub id 'owner/name', "
        "or None for the bundled model"
    )


def _open_folder(folder: Path, variant: str | None) -> Checkpoint:
    config, defaults = read_configs(folder)
    files = [file for part in STEMS for file in _weight_files(folder / part, part, variant)]
    tokenizer = _read_tokenizer(folder / "tokenizer", config.text_encoder.vocab_size)
    sources = _match(config, files, key_names.folder_sources, key_names.IGNORED_IN_FOLDER, folder)
    return Checkpoint(folder, "diffusers folder", config, tokenizer, defaults, tuple(files), sources)


def _weight_files(folder: Path, part: str, variant: str | None) -> list[WeightFile]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    chosen = pick_weights(names, STEMS[part], variant)
    if not chosen:
        content = _list(sorted(names))
        raise CheckpointError(f"{folder} has no {STEMS[part]}.safetensors or .bin, only {content}; download all of it")
    first = folder / chosen[0]
    if first.suffix != ".json":
        return [WeightFile(first, f"{part}.", read_header(first))]
    index = read_index(first)
    files = [WeightFile(path, f"{part}.", read_header(path)) for path in sorted({folder / n for n in index.values()})]
    # each tensor must be in exactly one shard, the one listed in the index
    found = {(key, file.path.name) for file in files for key in file.header}
    if wrong := _list(sorted({key for key, _ in found ^ set(index.items())}), empty=""):
        raise CheckpointError(f"{first} and its shards disagree on {wrong}; download all of them again")
    return files


def _read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = read_tokenizer(folder) if folder.is_dir() else Tokenizer.from_pretrained()
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    count = len(tokenizer.vocabulary)
    if count > vocab_size or (count < vocab_size and not (folder / "added_tokens.json").is_file()):
        table = f"the text encoder has {vocab_size} embeddings"
        raise CheckpointError(f"{folder} has {count} tokens, but {table}; use the tokenizer of the same model")
    return tokenizer


def _open_single_file(path: Path, prediction_type: str | None, config: ModelConfig | None) -> Checkpoint:
    if path.suffix not in SINGLE_FILES:
        raise CheckpointError(f"{path} is not a checkpoint; expected a folder or one of {', '.join(SINGLE_FILES)}")
    header = read_header(path)
    config = config or _infer_config(path, header, prediction_type)
    for item in fields(config):
        check_config(getattr(config, item.name))
    tokenizer = Tokenizer.from_pretrained()
    if any(key.startswith("cond_stage_model.model.") for key in header):  # OpenCLIP's text encoder pads with "!"
        tokenizer = Tokenizer(tokenizer.vocabulary, list(tokenizer.ranks), pad_token="!")
    files = (WeightFile(path, "", header),)
    candidates = partial(key_names.single_file_sources, config=config)
    sources = _match(config, files, candidates, key_names.IGNORED_IN_SINGLE_FILE, path)
    return Checkpoint(path, "single file, CompVis layout", config, tokenizer, Defaults(), files, sources)


def _infer_config(path: Path, header: Mapping[str, TensorInfo], prediction_type: str | None) -> ModelConfig:
    first = header.get("model.diffusion_model.input_blocks.0.0.weight")
    cross = header.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    width = cross.shape[-1] if cross else None
    if first is None or width not in (768, 1024) or first.shape[1:2] not in ((4,), (9,)):
        kind = key_names.looks_like(header)
        raise CheckpointError(
            f"{path} is not Stable Diffusion 1 or 2 in CompVis layout; expected model.diffusion_model.* with context "
            f"width 768 or 1024 and 4 or 9 input channels, found {_list(list(header))}. "
            + (f"It looks like {kind}, which cannot be loaded as a model" if kind else "Use another file")
        )
    if width == 1024 and prediction_type is None:
        raise CheckpointError(
            f"{path} is a Stable Diffusion 2 model, whose prediction type is not stored in single files; pass "
            "prediction_type='v_prediction' (2.x at 768 pixels) or 'epsilon' (2.x base, at 512)"
        )
    base = SD15 if width == 768 else SD21_BASE if prediction_type == "epsilon" else SD21
    return replace(base, unet=replace(base.unet, in_channels=first.shape[1]))


class _NoInit(TorchFunctionMode):
    """Skips parameter initialization, which takes seconds even on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return values["tensor"] if "tensor" in values else args[0]
        return func(*args, **values)


def _meta_modules(config: ModelConfig) -> dict[str, Any]:
    """Return the modules on the meta device, by their names in a diffusers folder."""
    with torch.device("meta"), _NoInit():
        return {
            "text_encoder": TextEncoder(config.text_encoder),
            "vae": Autoencoder(config.autoencoder),
            "unet": UNet(config.unet),
        }


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def _match(
    config: ModelConfig,
    files: Sequence[WeightFile],
    candidates: Callable[[str, str], tuple[Source, ...]],
    ignored: re.Pattern[str],
    path: Path,
) -> dict[str, Source]:
    """Match every parameter to a key. Raises CheckpointError for missing, misshaped and unexpected keys."""
    header = {prefix + key: info for _, prefix, infos in files for key, info in infos.items()}
    found: dict[str, Source] = {}
    missing, misshaped = [], []
    for name, value in _parameters(_meta_modules(config)).items():
        options = candidates(*name.split(".", 1))
        source = next((option for option in options if option.key in header), None)
        if source is None:
            missing.append(options[0].key)
            continue
        found[name] = source
        expected, info = tuple(value.shape), header[source.key]
        if source.qkv_index is not None:
            expected = (3 * expected[0], *expected[1:])
        if not same_shape(info.shape, expected):
            misshaped.append(f"{source.key} {list(info.shape)}, expected {list(expected)}")
        elif info.dtype not in FLOAT_DTYPES:
            misshaped.append(f"{source.key} of dtype {info.dtype}, expected float16 to float64")
    used = {source.key for source in found.values()}
    unexpected = [key for key in header if key not in used and not ignored.fullmatch(key)]
    lists = {"missing": missing, "misshaped": misshaped, "unexpected": unexpected}
    if any(lists.values()):
        problems = "\n".join(f"  {len(keys)} {kind}: {_list(keys)}" for kind, keys in lists.items() if keys)
        raise CheckpointError(
            f"{path} does not fit its configuration:\n{problems}\n"
            "It is incomplete, of another model, or holds more than a model; fetch it again or use another one"
        )
    return found


def _list(names: list[str], limit: int = 4, empty: str = "nothing") -> str:
    listed = ", ".join(map(printable, names[:limit])) or empty
    return listed + (f" and {len(names) - limit} more" if len(names) > limit else "")
