"""Adapter files: LoRA in diffusers, peft and kohya formats; textual inversion in diffusers and web UI formats."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.features.adapters import layers_of
from minisd.features.validate import check_float, check_path
from minisd.io import tensors
from minisd.io.atomic import save_atomically
from minisd.io.configs import parse_json, read_json
from minisd.io.key_names import looks_like
from minisd.io.tensors import CheckpointError, TensorInfo, printable, same_shape
from minisd.lora import Layer, LoRA, LowRank

LORA_FILES = ("pytorch_lora_weights", "adapter_model")
INVERSION_FILES = ("learned_embeds",)
# A layer name, then the factor A (down) or B (up) in one of four spellings, or alpha.
KEY = re.compile(r"(?P<layer>.+?)(?:(?:\.lora_|[._]lora(?:_linear_layer)?\.)(?P<factor>A|B|down|up)\.weight|\.alpha)")
FACTORS = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}
PREFIXES = {"unet": ("unet_", "lora_unet_"), "text_encoder": ("text_encoder_", "lora_te_")}
OLD_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}

Keys = dict[str, str]  # maps "A", "B" and "alpha" to the keys of a file


def read_lora(path: str | PathLike[str], parts: Mapping[str, nn.Module]) -> LoRA:
    """Load a LoRA for a model, with the devices and dtypes of the model's layers.

    α is read from the file or from the peft configuration, and defaults to r.

    Args:
        path: A .safetensors, .bin or .pt file in diffusers, peft or kohya format, or a folder containing one.
        parts: The modules to adapt, by the names "unet" and "text_encoder".

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If keys match no layer, or tensors have the wrong shape or dtype.
    """
    path = _file_in(check_path("path", path), LORA_FILES)
    header, layers = tensors.read_header(path), layers_of(parts)
    keys = _keys_of_layers(path, header, layers)
    weights, settings = dict(tensors.read_tensors(path, header, "cpu", torch.float32)), _peft_settings(path)
    updates = {}
    for name, found in keys.items():
        a, b = weights[found["A"]], weights[found["B"]]
        try:
            alpha = float(weights[found["alpha"]]) if "alpha" in found else _peft_alpha(settings, name, len(a))
            check_float("alpha", alpha)
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise CheckpointError(f"{path} has no valid alpha for {name} ({error}); download it again") from error
        updates[name] = update = LowRank(layers[name], len(a), alpha)
        update.lora_A = nn.Parameter(a.reshape(update.lora_A.shape).to(layers[name].weight))
        update.lora_B = nn.Parameter(b.reshape(update.lora_B.shape).to(layers[name].weight))
    return LoRA(updates).eval().requires_grad_(False)


def save_lora(lora: LoRA, path: Path) -> None:
    """Save a LoRA to a safetensors file in diffusers format. B is scaled by α/r, since that format implies α = r."""
    weights = {}
    for name, update in lora.items():
        a, b = update.lora_A.detach().cpu(), update.scale * update.lora_B.detach().cpu()
        weights[f"{name}.lora_A.weight"] = a.contiguous()
        weights[f"{name}.lora_B.weight"] = b.reshape(*b.shape, *(1 for _ in a.shape[2:])).contiguous()
    save_atomically(lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}), path)


def read_textual_inversion(path: str | PathLike[str], token: str | None = None) -> tuple[str, Tensor]:
    """Load a textual inversion.

    Args:
        path: A diffusers file (.safetensors or .bin with {word: embeddings}), a web UI file (.pt or .safetensors), or
            a folder containing one.
        token: The word to use instead of the one in the file.

    Returns:
        The word and its embeddings, float32 (n, width).

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If the file is not a textual inversion.
    """
    path = _file_in(check_path("path", path), INVERSION_FILES)
    if path.suffix == ".safetensors":
        header = tensors.read_header(path)
        for key, (_, dtype) in header.items():
            if dtype not in tensors.FLOAT_DTYPES:
                raise CheckpointError(f"{path} has {printable(key)} of dtype {dtype}; expected float16 to float64")
        content: Any = dict(tensors.read_tensors(path, header, "cpu", torch.float32))
    else:
        content = tensors.read_pickle(path)
    name, vectors = None, content.get("string_to_param") if isinstance(content, dict) else None
    if isinstance(vectors, dict):
        name, vectors = content.get("name") or path.stem, next(iter(vectors.values()), None)
    elif isinstance(content, dict) and len(content) == 1:
        name, vectors = next(iter(content.items()))
        name = path.stem if name == "emb_params" else name  # the web UI's safetensors files omit the word
    vectors = tensors.plain_tensor(vectors, path) if isinstance(vectors, Tensor) else None
    if vectors is None or not vectors.is_floating_point() or vectors.ndim not in (1, 2) or not vectors.numel():
        keys = list(content)[:4] if isinstance(content, dict) else [type(content).__name__]
        raise CheckpointError(
            f"{path} contains {', '.join(printable(str(key)) for key in keys)}; expected one word with embeddings "
            "(width,) or (n, width), or the web UI's string_to_param; use a textual inversion for this architecture"
        )
    return str(name) if token is None else token, vectors.float().reshape(-1, vectors.shape[-1])


def _keys_of_layers(path: Path, header: Mapping[str, TensorInfo], layers: Mapping[str, Layer]) -> dict[str, Keys]:
    """Return the keys of each layer. Raises CheckpointError with a list of the keys that do not fit."""
    spellings = {spelling: name for name in layers for spelling in _spellings(name)}
    keys: dict[str, Keys] = {}
    problems = []
    for key in header:
        match = KEY.fullmatch(key)
        name = spellings.get(match["layer"].replace(".", "_")) if match else None
        if match is None or name is None:
            problems.append(f"{printable(key)} belongs to no layer of this model")
        elif keys.setdefault(name, {}).setdefault(FACTORS[match["factor"]], key) != key:
            problems.append(f"{key} is a duplicate of {keys[name][FACTORS[match['factor']]]}")
    for name, found in keys.items():
        problems += _misfits(found, header, layers[name])
    if problems or not keys:
        listed = "".join(f"\n  {problem}" for problem in problems[:4]) or "\n  it contains no LoRA"
        more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
        kind = looks_like(header)
        hint = f"It looks like {kind}. " if kind not in ("", "a LoRA") else ""
        raise CheckpointError(f"{path} does not fit:{listed}{more}\n{hint}Use a LoRA made for this kind of model")
    return keys


def _spellings(name: str) -> Iterator[str]:
    """Yield the names of a layer in LoRA files, with underscores for dots as in kohya's format."""
    part, _, rest = name.partition(".")
    layer = rest.replace(".", "_")
    names = {layer, layer.removeprefix("text_model_")}
    for new, old in OLD_NAMES.items():
        names |= {each.removesuffix(new) + old for each in names if each.endswith("_" + new)}
    # old versions of diffusers use the names of attention processors: attn1.processor.to_q_lora
    names |= {re.sub(r"_(to_(?:q|k|v|out))$", r"_processor_\1", each) for each in names}
    for prefix in (*PREFIXES[part], "base_model_model_", ""):
        yield from (prefix + each for each in names)


def _misfits(keys: Keys, header: Mapping[str, TensorInfo], layer: Layer) -> Iterator[str]:
    """Yield the problems with the tensors found for one layer."""
    if missing := [factor for factor in "AB" if factor not in keys]:
        present = keys.get("A") or keys.get("B") or keys["alpha"]
        yield f"{present} has no matching lora_{missing[0]} ({'down' if missing[0] == 'A' else 'up'})"
        return
    out, *rest = layer.weight.shape
    rank = (*header[keys["A"]].shape, 0)[0]
    for factor, expected in (("A", (rank, *rest)), ("B", (out, rank, *(1 for _ in rest[1:])))):
        shape, dtype = header[keys[factor]]
        if rank < 1 or not same_shape(shape, expected):
            wanted = f"[rank, {', '.join(map(str, rest))}]" if factor == "A" else str([*expected])
            yield f"{keys[factor]} has shape {list(shape)}; expected {wanted}"
        elif dtype not in tensors.FLOAT_DTYPES:
            yield f"{keys[factor]} has dtype {dtype}; expected float16 to float64"
    if "alpha" in keys and math.prod(header[keys["alpha"]].shape) != 1:
        yield f"{keys['alpha']} has shape {list(header[keys['alpha']].shape)}; expected a scalar"


def _peft_settings(path: Path) -> Mapping[str, Any]:
    """Read the peft configuration from the file's metadata (diffusers) or from adapter_config.json in its folder."""
    if path.stem == "adapter_model":
        return read_json(path.with_name("adapter_config.json"))
    try:
        settings = parse_json(tensors.read_metadata(path).get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path} has invalid lora_adapter_metadata ({error}); download it again") from error
    return settings if isinstance(settings, dict) else {}


def _peft_alpha(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Return a layer's α by peft's rules: the first matching `alpha_pattern`, else `lora_alpha`, else r."""
    part, _, layer = name.partition(".")

    def setting(key: str, default: Any) -> Any:
        return settings.get(f"{part}.{key}", settings.get(key, default))

    alpha = setting("lora_alpha", rank)
    for pattern, other in (setting("alpha_pattern", None) or {}).items():
        # nested repeats can take exponential time
        if not re.fullmatch(r"[\w.\\^$|*+-]{1,500}", pattern) or len(re.findall(r"[*+]", pattern)) > 2:
            raise ValueError(f"invalid alpha_pattern {printable(pattern)!r}; expected names with at most two repeats")
        if any(re.fullmatch(rf"(.*\.)?({pattern})", each) for each in (layer, layer.removeprefix("text_model."))):
            alpha = other
            break
    return float(alpha) * (math.sqrt(rank) if setting("use_rslora", False) else 1.0)


def _file_in(path: Path, stems: tuple[str, ...]) -> Path:
    """Return the path of a file, or of the adapter file in a folder. Raises FileNotFoundError."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin")]
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"no adapter at {path}; expected a file, or a folder with {' or '.join(names)}")
    return found[0]
