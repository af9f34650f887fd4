"""Files of adapters in diffusers, peft, kohya and LyCORIS formats, and of textual inversions."""

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

from minisd.features import adapter_kinds
from minisd.features.adapter_kinds import FactoredUpdate
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
# A layer name, then a factor: A (down) or B (up) of a LoRA in one of four spellings, those of LoHa and LoKr, or alpha.
KEY = re.compile(
    r"(?P<layer>.+?)(?:(?:\.lora_|[._]lora(?:_linear_layer)?\.)(?P<lora>A|B|down|up|mid)\.weight"
    r"|\.(?P<other>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|dora_scale|alpha)"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
FACTORS = {"down": "A", "up": "B"}
WORD_KEY = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_param\..*|emb_params)")
# Other kinds of adapters, by the ends of their keys.
OTHER_ADAPTERS = (
    (r"\.oft_.*|\.boft_.*|\.oft_diag", "OFT"),
    (r"\.ia3_l(\..*)?|\.on_input", "(IA)³"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight", "GLoRA"),
    (r"\.diff(_b)?|\.(w|b)_norm|\.set_weight", "a full difference of weights"),
    (r"\.vera_lambda_[bd].*", "VeRA"),
    (r"hypernetwork\..*|\.?linear\.\d+\.weight", "a hypernetwork"),
)
PREFIXES = {"unet": ("unet_", "lora_unet_"), "text_encoder": ("text_encoder_", "lora_te_")}
OLD_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}

Keys = dict[str, str]  # maps factors, "alpha" and "magnitude" (or "dora_scale") to the keys of a file


def read_lora(path: str | PathLike[str], parts: Mapping[str, nn.Module]) -> LoRA:
    """Load a LoRA, LoHa, LoKr or DoRA for a model, with the devices and dtypes of the model's layers.

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
    header = {key: info for key, info in header.items() if not WORD_KEY.fullmatch(key)}
    keys = _keys_of_layers(path, header, layers)
    weights, settings = dict(tensors.read_tensors(path, header, "cpu", torch.float32)), _peft_settings(path)
    updates = {}
    for name, found in keys.items():
        factors = {factor: weights[key] for factor, key in found.items()}
        try:
            updates[name] = _update(layers[name], factors, settings, name)
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise CheckpointError(f"{path} has no valid alpha for {name} ({error}); download it again") from error
    return LoRA(updates).eval().requires_grad_(False)


def _update(layer: Layer, factors: dict[str, Tensor], settings: Mapping[str, Any], name: str) -> LowRank:
    """Build the update of one layer, with its dtype. Raises ValueError and others for an invalid α."""
    alpha, magnitude = factors.pop("alpha", None), factors.pop("magnitude", None)
    norms, r = factors.pop("dora_scale", magnitude), adapter_kinds.rank(factors)
    if r is None and settings.get("peft_type") is None:  # LoKr of full matrices has no rank, and ignores α
        alpha = torch.tensor(1.0)
    r = r or _peft_setting(settings, name, "rank_pattern", _setting(settings, name, "r", 1))
    value = check_float("alpha", _peft_alpha(settings, name, r) if alpha is None else float(alpha))
    if factors.keys() == {"A", "B"} and norms is None:
        update = LowRank(layer, r, value)
        update.lora_A = nn.Parameter(factors["A"].reshape(update.lora_A.shape).to(layer.weight))
        update.lora_B = nn.Parameter(factors["B"].reshape(update.lora_B.shape).to(layer.weight))
        return update
    # a magnitude is that of the rows; a dora_scale is that of the columns if it is (1, in)
    on_input = magnitude is None and norms is not None and norms.shape[:2] == (1, layer.weight.shape[1])
    factors = {factor: each.to(layer.weight) for factor, each in factors.items()}
    norms = None if norms is None else norms.flatten().to(layer.weight)
    return FactoredUpdate(layer, factors, value / r, norms, on_input)


def read_bundled_words(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the textual inversions bundled with a LoRA, float32 (n, width) by their words."""
    path = _file_in(check_path("path", path), LORA_FILES)
    header = {key: info for key, info in tensors.read_header(path).items() if WORD_KEY.fullmatch(key)}
    words = {}
    for key, vectors in tensors.read_tensors(path, header, "cpu", torch.float32) if header else ():
        words[WORD_KEY.sub(r"\1", key)] = vectors.reshape(-1, vectors.shape[-1] if vectors.dim() else 1)
    return words


def lora_weights(lora: LoRA) -> dict[str, Tensor]:
    """Return the tensors of a LoRA in diffusers format. B is scaled by α/r, since that format implies α = r."""
    weights = {}
    for name, update in lora.items():
        a, b = factors(update)
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = a, update.scale * b
    return weights


def factors(update: LowRank) -> tuple[Tensor, Tensor]:
    """Return A and B of an update on the CPU, as layers: B has as many dimensions as A."""
    a, b = update.lora_A.detach().cpu(), update.lora_B.detach().cpu()
    return a.contiguous(), b.reshape(*b.shape, *(1 for _ in a.shape[2:])).contiguous()


def save_lora(lora: LoRA, path: Path) -> None:
    """Save a LoRA to a safetensors file in diffusers format."""
    weights = lora_weights(lora)
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
    if tensors.is_safetensors(path):
        header = tensors.read_header(path)
        for key, (_, dtype) in header.items():
            if dtype not in tensors.FLOAT_DTYPES:
                raise CheckpointError(f"{path} has {printable(key)} of dtype {dtype}; expected float16 to float64")
        content: Any = dict(tensors.read_tensors(path, header, "cpu", torch.float32))
    else:
        content = tensors.read_pickle(path)
    name, vectors = None, content.get("string_to_param") if isinstance(content, dict) else None
    if isinstance(vectors, tensors.ParameterDict):
        vectors = vectors.parameters
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
            continue
        factor = match["lora"] or match["other"] or "magnitude"
        factor = FACTORS.get(factor, factor)
        if keys.setdefault(name, {}).setdefault(factor, key) != key:
            problems.append(f"{key} is a duplicate of {keys[name][factor]}")
    for name, found in keys.items():
        problems += _misfits(found, header, layers[name])
    if problems or not keys:
        listed = "".join(f"\n  {problem}" for problem in problems[:4]) or "\n  it contains no LoRA"
        more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
        other = [kind for end, kind in OTHER_ADAPTERS if any(re.search(f"({end})$", key) for key in header)]
        kind = f"{other[0]}, which is not supported" if other else looks_like(header)
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
    infos = {factor: header[key] for factor, key in keys.items()}
    scalars = ("alpha", "magnitude", "dora_scale")
    factors = {name: torch.empty(i.shape, device="meta") for name, i in infos.items() if name not in scalars}
    if len({name[:4] if name.startswith(("hada", "lokr")) else "lora" for name in factors}) > 1:
        yield f"{keys[max(factors)]} is beside factors of another kind of adapter"
        return
    if absent := adapter_kinds.missing(factors):
        present = keys[max(factors)] if factors else keys[max(keys)]
        wanted = {"A": "lora_A (down)", "B": "lora_B (up)"}.get(absent, absent)
        yield f"{present} has no matching {wanted}"
        return
    for factor, (_, dtype) in infos.items():
        if dtype not in tensors.FLOAT_DTYPES:
            yield f"{keys[factor]} has dtype {dtype}; expected float16 to float64"
    out, *rest = layer.weight.shape
    yield from _shape_misfits(keys, factors, layer)
    for factor, sizes in (("alpha", (1,)), ("magnitude", (out,)), ("dora_scale", (out, rest[0]))):
        if factor in infos and math.prod(infos[factor].shape) not in sizes:
            wanted = "a scalar" if factor == "alpha" else f"{' or '.join(map(str, sizes))} values"
            yield f"{keys[factor]} has shape {list(infos[factor].shape)}; expected {wanted}"


def _shape_misfits(keys: Keys, factors: Mapping[str, Tensor], layer: Layer) -> Iterator[str]:
    """Yield the problems with the shapes of factors, given as tensors on the meta device."""
    out, *rest = layer.weight.shape
    if factors.keys() == {"A", "B"}:
        rank = (*factors["A"].shape, 0)[0]
        for factor, expected in (("A", (rank, *rest)), ("B", (out, rank, *(1 for _ in rest[1:])))):
            shape = factors[factor].shape
            if rank < 1 or not same_shape(shape, expected):
                wanted = f"[rank, {', '.join(map(str, rest))}]" if factor == "A" else str([*expected])
                yield f"{keys[factor]} has shape {list(shape)}; expected {wanted}"
    else:
        try:
            adapter_kinds.product(factors, layer.weight.shape)
        except (RuntimeError, IndexError):
            shapes = ", ".join(f"{factor} {list(factors[factor].shape)}" for factor in factors)
            yield f"{keys[min(factors)]} does not fit a layer of shape {[out, *rest]}: {shapes}"


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
    usual = _setting(settings, name, "lora_alpha", _setting(settings, name, "alpha", rank))
    alpha = float(_peft_setting(settings, name, "alpha_pattern", usual))
    return alpha * (math.sqrt(rank) if _setting(settings, name, "use_rslora", False) else 1.0)


def _setting(settings: Mapping[str, Any], name: str, key: str, default: Any) -> Any:
    part = name.partition(".")[0]
    return settings.get(f"{part}.{key}", settings.get(key, default))


def _peft_setting(settings: Mapping[str, Any], name: str, key: str, default: Any) -> Any:
    """Return a layer's value from peft's `alpha_pattern` or `rank_pattern`: the first one that matches."""
    layer = name.partition(".")[2]
    for pattern, value in (_setting(settings, name, key, None) or {}).items():
        # nested repeats can take exponential time
        if not re.fullmatch(r"[\w.\\^$|*+-]{1,500}", pattern) or len(re.findall(r"[*+]", pattern)) > 2:
            raise ValueError(f"invalid {key} {printable(pattern)!r}; expected names with at most two repeats")
        if any(re.fullmatch(rf"(.*\.)?({pattern})", each) for each in (layer, layer.removeprefix("text_model."))):
            return value
    return default


def _file_in(path: Path, stems: tuple[str, ...]) -> Path:
    """Return the path of a file, or of the adapter file in a folder. Raises FileNotFoundError."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin")]
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"no adapter at {path}; expected a file, or a folder with {' or '.join(names)}")
    return found[0]
