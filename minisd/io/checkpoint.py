"""Loading of models from hub ids, diffusers folders and single files, with strict matching of all tensors."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisd.autoencoder import Autoencoder
from minisd.config import SD15, SD21, SD21_BASE, ModelConfig
from minisd.features.lcm_unet import LCMUNet, LCMUNetConfig
from minisd.features.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from minisd.features.validate import check_path
from minisd.io import key_names
from minisd.io.configs import check_config
from minisd.io.diffusers_folder import STEMS, Defaults, Loaded, read_configs, save
from minisd.io.key_names import Source
from minisd.io.tensors import (
    FLOAT_DTYPES,
    CheckpointError,
    TensorInfo,
    read_header,
    read_metadata,
    read_tensors,
    same_shape,
)
from minisd.io.tokenizer_files import read_tokenizer
from minisd.io.weight_files import WeightFile, listed, open_autoencoder, weight_files
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

__all__ = ["Checkpoint", "CheckpointError", "Defaults", "Loaded", "describe", "load", "open_checkpoint", "save"]
SHIPPED = Path(str(resources.files("minisd") / "assets/tiny"))
SINGLE_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
EMBEDDINGS = "text_encoder.text_model.embeddings.token_embedding.weight"
# The prediction types as named by CompVis' training configurations and in the metadata of single files.
PREDICTIONS = {name: name for name in ("epsilon", "v_prediction", "sample")} | {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
}
PARAMETERIZATION = re.compile(r"""(?:^|[{,])\s*parameterization:\s*["']?(\w*)""", re.MULTILINE)


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
                    value = value[: shapes[name][0]] if name == EMBEDDINGS else value
                    states[part][rest] = value.reshape(shapes[name])
        for part, module in modules.items():
            module.load_state_dict(states[part], strict=True, assign=True)
            module.eval().requires_grad_(False)
        text_encoder, vae, unet = modules.values()
        return Loaded(self.config, self.tokenizer, text_encoder, unet, vae, self.defaults)

    def summary(self) -> dict[str, Any]:
        """Return the facts of `minisd info --json`, without reading the weights."""
        infos = {prefix + key: (path, info) for path, prefix, header in self.files for key, info in header.items()}
        parts: dict[str, Any] = {}
        for part, module in _meta_modules(self.config).items():
            found = [infos[self.sources[f"{part}.{name}"].key] for name in module.state_dict()]
            parts[part] = {
                "parameters": sum(p.numel() for p in module.parameters()),
                "dtypes": sorted({info.dtype for _, info in found}),
                "files": sorted({path.name for path, _ in found}),
            }
        side, defaults = self.config.unet.sample_size * self.config.autoencoder.downscale, self.defaults
        facts = {"path": str(self.path), "layout": self.layout, "pixels": side, "parts": parts}
        facts |= {name: getattr(defaults, name) for name in ("num_inference_steps", "guidance_scale")}
        facts |= {"sampler": defaults.sampler.name, "prediction_type": self.config.schedule.prediction_type}
        return facts | {"bytes": sum(path.stat().st_size for path, _, _ in self.files)}

    def describe(self) -> str:
        """Return a summary for `minisd info`, without reading the weights."""
        facts = self.summary()
        size, steps = facts["bytes"], f"{facts['num_inference_steps']} steps"
        rows = {
            "layout": self.layout,
            "size on disk": f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
            "prediction": facts["prediction_type"],
            "picture": f"{facts['pixels']}×{facts['pixels']} pixels",
            "sampler": f"{facts['sampler']}, {steps}, guidance {facts['guidance_scale']:g}",
        }
        lines = [str(self.path), *(f"  {name:<13}{value}" for name, value in rows.items())]
        for part, row in facts["parts"].items():
            names = f"{', '.join(row['dtypes'])}  {', '.join(row['files'])}"
            lines.append(f"  {part:<13}{row['parameters']:>13,} parameters  {names}")
        total = sum(row["parameters"] for row in facts["parts"].values())
        return "\n".join([*lines, f"  {'in all':<13}{total:>13,} parameters"])


def open_checkpoint(
    source: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
    config: ModelConfig | None = None,
    vae: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint and match every key to a parameter, without reading the weights.

    Args:
        source: None or "tiny" for the bundled model, a diffusers folder, a single file in CompVis layout, or a hub id
            "owner/name", which is downloaded once.
        variant: The variant of the weight files, such as "fp16".
        prediction_type: The UNet's prediction type, to override the checkpoint or to supply it if missing.
        revision: The branch, tag or commit of a hub id.
        config: The model configuration of a single file. By default it is inferred.
        vae: An autoencoder to use instead of the model's own: a folder, a single file, or a hub id; also TAESD. See
            `weight_files.open_autoencoder`.

    Leftovers that belong to no part, such as EMA copies, are named in a warning and ignored.

    Raises:
        CheckpointError: If keys are missing or unexpected, or have the wrong shape.
        FileNotFoundError: If the source does not exist.
        OSError: See `minisd.io.hub.download`.
    """
    path = _locate(source, variant, revision)
    vae_path = None if vae is None else _locate(vae, variant, None, vae=True)
    if path.is_dir():
        checkpoint = _open_folder(path, variant, vae_path)
    else:
        checkpoint = _open_single_file(path, prediction_type, config, vae_path)
    if vae_path is not None:
        checkpoint = _replace_autoencoder(checkpoint, vae_path, variant)
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


def _locate(
    source: str | os.PathLike[str] | None, variant: str | None, revision: str | None, vae: bool = False
) -> Path:
    if source is None or source == "tiny":
        return SHIPPED
    path = check_path("vae" if vae else "source", source)
    if path.exists():
        return path
    hub_id = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII)
    if isinstance(source, str) and hub_id and path.suffix not in SINGLE_FILES:
        from minisd.io import hub  # deferred: imports huggingface_hub

        return hub.download(source, variant=variant, revision=revision, vae=vae)
    raise FileNotFoundError(
        f"no {'autoencoder' if vae else 'model'} at {source!r}; expected a diffusers folder, a .safetensors or .ckpt "
        "file, a hub id 'owner/name', or None for the bundled model"
    )


def _open_folder(folder: Path, variant: str | None, vae: Path | None) -> Checkpoint:
    config, defaults = read_configs(folder)
    parts = [part for part in STEMS if part != "vae" or vae is None]
    files = [file for part in parts for file in weight_files(folder / part, part, variant)]
    tokenizer = _read_tokenizer(folder / "tokenizer", config.text_encoder.vocab_size)
    config = replace(config, text_encoder=replace(config.text_encoder, vocab_size=len(tokenizer.vocabulary)))
    modules = {part: module for part, module in _meta_modules(config).items() if part in parts}
    sources = _match(modules, files, key_names.folder_sources, key_names.IGNORED_IN_FOLDER, folder)
    return Checkpoint(folder, "diffusers folder", config, tokenizer, defaults, tuple(files), sources)


def _replace_autoencoder(checkpoint: Checkpoint, path: Path, variant: str | None) -> Checkpoint:
    """Return a checkpoint with the autoencoder at `path`."""
    autoencoder, files = open_autoencoder(path, checkpoint.config.autoencoder, variant)
    config = replace(checkpoint.config, autoencoder=autoencoder)
    modules = {"vae": _meta_modules(config)["vae"]}
    candidates = partial(key_names.autoencoder_sources, config=autoencoder)
    sources = _match(modules, files, candidates, key_names.IGNORED_IN_AUTOENCODER, path)
    return replace(
        checkpoint, config=config, files=(*checkpoint.files, *files), sources={**checkpoint.sources, **sources}
    )


def _read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = read_tokenizer(folder) if folder.is_dir() else Tokenizer.from_pretrained()
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    count = len(tokenizer.vocabulary)
    if not min(vocab_size, SD15.text_encoder.vocab_size) <= count <= vocab_size:
        table = f"the text encoder has {vocab_size} embeddings"
        raise CheckpointError(f"{folder} has {count} tokens, but {table}; use the tokenizer of the same model")
    if count < vocab_size:
        warn(f"{folder} has {count} tokens, so the last {vocab_size - count} embeddings are ignored")
    return tokenizer


def _open_single_file(
    path: Path, prediction_type: str | None, config: ModelConfig | None, vae: Path | None
) -> Checkpoint:
    if path.suffix not in SINGLE_FILES:
        raise CheckpointError(f"{path} is not a checkpoint; expected a folder or one of {', '.join(SINGLE_FILES)}")
    header = read_header(path)
    prediction_type = prediction_type or _stored_prediction(path, header)
    config = config or _infer_config(path, header, prediction_type)
    if prediction_type:
        config = replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))
    if "ztsnr" in header:
        config = _with_zero_snr(config, path)
    for item in fields(config):
        check_config(getattr(config, item.name))
    tokenizer = Tokenizer.from_pretrained()
    if any(key.startswith("cond_stage_model.model.") for key in header):  # OpenCLIP's text encoder pads with "!"
        tokenizer = Tokenizer(tokenizer.vocabulary, list(tokenizer.ranks), pad_token="!")
    files = (WeightFile(path, "", header),)
    candidates, ignored = partial(key_names.single_file_sources, config=config), key_names.IGNORED_IN_SINGLE_FILE
    modules = _meta_modules(config)
    if vae is not None:
        del modules["vae"]
        ignored = re.compile(rf"{ignored.pattern}|first_stage_model\..*")
    elif not any(key.startswith("first_stage_model.") for key in header):
        raise CheckpointError(
            f"{path} has no autoencoder (first_stage_model.*); pass one with vae= (--vae), such as "
            "stabilityai/sd-vae-ft-mse, a folder or a file"
        )
    sources = _match(modules, files, candidates, ignored, path)
    return Checkpoint(path, "single file, CompVis layout", config, tokenizer, Defaults(), files, sources)


def _stored_prediction(path: Path, header: Mapping[str, TensorInfo]) -> str | None:
    """Return the prediction type that a single file or the .yaml beside it states, or None.

    A file with the key `v_pred` predicts v. Otherwise the training configuration beside it counts, where CompVis'
    default is epsilon, then `modelspec.prediction_type` in the metadata.
    """
    if "v_pred" in header:
        return "v_prediction"
    stated, beside = read_metadata(path).get("modelspec.prediction_type"), path.with_suffix(".yaml")
    if beside.is_file():
        text = re.sub("#.*", "", beside.read_text(encoding="utf-8-sig", errors="replace"))
        found = PARAMETERIZATION.search(text)
        stated, path = (found[1] if found else "eps" if "LatentDiffusion" in text else stated), beside
    if stated is None or stated.lower() in PREDICTIONS:
        return None if stated is None else PREDICTIONS[stated.lower()]
    raise CheckpointError(f"{path} states the prediction type {stated[:40]!r}; expected {', '.join(PREDICTIONS)}")


def _with_zero_snr(config: ModelConfig, path: Path) -> ModelConfig:
    """Return the configuration with a zero terminal SNR. Raises CheckpointError if schedules do not support it."""
    name = "rescale_betas_zero_snr"
    if all(item.name != name for item in fields(config.schedule)):
        raise CheckpointError(f"{path} was trained with zero terminal SNR (its key ztsnr), which is not supported")
    changes: dict[str, Any] = {name: True}
    return replace(config, schedule=replace(config.schedule, **changes))


def _infer_config(path: Path, header: Mapping[str, TensorInfo], prediction_type: str | None) -> ModelConfig:
    first = header.get("model.diffusion_model.input_blocks.0.0.weight")
    cross = header.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    width = cross.shape[-1] if cross else None
    if first is None or width not in (768, 1024) or first.shape[1:2] not in ((4,), (9,)):
        kind = key_names.looks_like(header)
        raise CheckpointError(
            f"{path} is not Stable Diffusion 1 or 2 in CompVis layout; expected model.diffusion_model.* with context "
            f"width 768 or 1024 and 4 or 9 input channels, found {listed(list(header))}. "
            + (f"It looks like {kind}, which cannot be loaded as a model" if kind else "Use another file")
        )
    if width == 1024 and prediction_type is None:
        raise CheckpointError(
            f"{path} is a Stable Diffusion 2 model, whose prediction type is neither in the file nor in a .yaml "
            "beside it; pass prediction_type='v_prediction' (2.x at 768 pixels) or 'epsilon' (2.x base, at 512)"
        )
    base = SD15 if width == 768 else SD21_BASE if prediction_type == "epsilon" else SD21
    return replace(base, unet=replace(base.unet, in_channels=first.shape[1]))


class NoInit(TorchFunctionMode):
    """Skips initialization of parameters, which takes seconds even on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return values["tensor"] if "tensor" in values else args[0]
        return func(*args, **values)


def _meta_modules(config: ModelConfig) -> dict[str, Any]:
    """Return the modules on the meta device, by their names in a diffusers folder."""
    autoencoder, unet = config.autoencoder, config.unet
    with torch.device("meta"), NoInit():
        return {
            "text_encoder": TextEncoder(config.text_encoder),
            "vae": TinyAutoencoder(autoencoder)
            if isinstance(autoencoder, TinyAutoencoderConfig)
            else Autoencoder(autoencoder),
            "unet": LCMUNet(unet) if isinstance(unet, LCMUNetConfig) else UNet(unet),
        }


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def _match(
    modules: Mapping[str, nn.Module],
    files: Sequence[WeightFile],
    candidates: Callable[[str, str], tuple[Source, ...]],
    ignored: re.Pattern[str],
    path: Path,
) -> dict[str, Source]:
    """Match every parameter to a key, and warn about leftovers.

    Raises CheckpointError for missing, misshaped and unexpected keys.
    """
    header = {prefix + key: info for _, prefix, infos in files for key, info in infos.items()}
    found: dict[str, Source] = {}
    missing, misshaped = [], []
    for name, value in _parameters(modules).items():
        options = candidates(*name.split(".", 1))
        source = next((option for option in options if option.key in header), None)
        if source is None:
            missing.append(options[0].key)
            continue
        found[name] = source
        expected, info = tuple(value.shape), header[source.key]
        if source.qkv_index is not None:
            expected = (3 * expected[0], *expected[1:])
        if name == EMBEDDINGS and info.shape[:1] > expected[:1]:  # rows without a token are ignored
            expected = (*info.shape[:1], *expected[1:])
        if not same_shape(info.shape, expected):
            misshaped.append(f"{source.key} {list(info.shape)}, expected {list(expected)}")
        elif info.dtype not in FLOAT_DTYPES:
            misshaped.append(f"{source.key} of dtype {info.dtype}, expected float16 to float64")
    used = {source.key for source in found.values()}
    unused = [key for key in header if key not in used and not ignored.fullmatch(key)]
    leftovers = [key for key in unused if key_names.is_leftover(key)]
    unexpected = [key for key in unused if not key_names.is_leftover(key)]
    lists = {"missing": missing, "misshaped": misshaped, "unexpected": unexpected}
    if any(lists.values()):
        problems = "\n".join(f"  {len(keys)} {kind}: {listed(keys)}" for kind, keys in lists.items() if keys)
        raise CheckpointError(
            f"{path} does not fit its configuration:\n{problems}\n"
            "It is incomplete, belongs to another model, or contains more than a model; "
            "fetch it again or use another one"
        )
    if leftovers:
        warn(f"{path} has {len(leftovers)} keys that belong to no part and are ignored: {listed(leftovers)}")
    return found


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
