"""Adapters: small files that teach a model something. LoRA changes its layers a little, textual inversion adds words.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Gal et al. 2022, "An Image
is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", section 4.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minisd.features import validate as checks
from minisd.io.key_names import looks_like
from minisd.io.tensors import (
    CheckpointError,
    TensorInfo,
    plain_tensor,
    read_header,
    read_json,
    read_metadata,
    read_pickle,
    read_tensors,
    save_atomically,
    shown,
)
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer

Layer = nn.Linear | nn.Conv2d

LORA_FILES = ("pytorch_lora_weights", "adapter_model")
INVERSION_FILES = ("learned_embeds",)
# The layer, then its factor A (down) or B (up) in one of four spellings, or its alpha.
KEY = re.compile(r"(?P<layer>.+?)(?:(?:\.lora_|[._]lora(?:_linear_layer)?\.)(?P<factor>A|B|down|up)\.weight|\.alpha)")
FLOATS = ("float16", "bfloat16", "float32", "float64")
FACTORS = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}
PREFIXES = {"unet": ("unet_", "lora_unet_"), "text_encoder": ("text_encoder_", "lora_te_")}
OLD_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}


class LowRank(nn.Module):
    """The update of one layer, ΔW = (α/r) B A, kept as its two thin factors: A goes down to r channels, B up again.

    x, as the layer takes it -> what is to be added to the layer's output. A new one has B = 0 and changes nothing.
    `lora_A` is (r, in), or (r, in, k, k) for a convolution; `lora_B` is (out, r).
    Source: Hu et al. 2021, section 4.1.
    """

    def __init__(self, layer: Layer, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.scale = 1.0 if alpha is None else alpha / rank
        self.steps: Any = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        self.lora_A = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.lora_B = nn.Parameter(torch.zeros(layer.weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as torch begins its own layers

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.to(x.device), self.lora_B.to(x.device)
        if self.steps is None:
            return self.scale * F.linear(F.linear(x, a), b)
        return self.scale * F.conv2d(F.conv2d(x, a, None, *self.steps), b[:, :, None, None])

    def delta(self) -> Tensor:
        """ΔW, shaped as the weight of the layer, in float32 or wider."""
        a, b = (w if w.dtype == torch.float64 else w.float() for w in (self.lora_A.detach(), self.lora_B.detach()))
        # ΔW = (α/r) B A
        return self.scale * torch.einsum("or,r...->o...", b, a)


class LoRA(nn.Module):
    """One adapter: low-rank updates of some layers, and the weight with which all of them are added.

    updates: by the part and the name of the layer, such as "unet.mid_block.attentions.0.proj_in".
    """

    def __init__(self, updates: Mapping[str, LowRank], weight: float = 1.0) -> None:
        super().__init__()
        self.names, self.weight = tuple(updates), weight
        self.updates = nn.ModuleList(updates.values())

    def items(self) -> Iterator[tuple[str, LowRank]]:
        """The names of the layers, each with its update."""
        return zip(self.names, self.updates, strict=True)  # type: ignore[arg-type]

    def attach(self, layers: Mapping[str, Layer]) -> list[RemovableHandle]:
        """Let every layer add its update to what it returns, until the handles are removed; its weights stay."""
        return [layers[name].register_forward_hook(partial(self._add, update)) for name, update in self.items()]

    def _add(self, update: LowRank, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        # y = W x + w · (α/r) B A x
        return output + self.weight * update(*inputs) if self.weight else output

    def save(self, path: Path) -> None:
        """Write a safetensors file in the layout of diffusers. B is multiplied by α/r, so that α = r is right."""
        weights = {}
        for name, update in self.items():
            a, b = update.lora_A.detach().cpu(), update.scale * update.lora_B.detach().cpu()
            weights[f"{name}.lora_A.weight"] = a.contiguous()
            weights[f"{name}.lora_B.weight"] = b.reshape(*b.shape, *(1 for _ in a.shape[2:])).contiguous()
        save_atomically(lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}), path)


class Adapters:
    """The LoRAs of one model, by name: beside its layers (added in every call) or fused into their weights."""

    def __init__(self) -> None:
        self.loras: dict[str, LoRA] = {}
        self._layers: dict[str, dict[str, Layer]] = {}
        self._handles: list[RemovableHandle] = []
        self._originals: list[tuple[Layer, Tensor]] = []

    @property
    def fused(self) -> bool:
        """Whether the model's weights contain the updates now."""
        return bool(self._originals)

    @property
    def weights(self) -> dict[str, float]:
        """How strongly each LoRA acts."""
        return {name: lora.weight for name, lora in self.loras.items()}

    def load(
        self, path: str | PathLike[str], parts: Mapping[str, nn.Module], name: str | None = None, weight: float = 1.0
    ) -> str:
        """Read a LoRA and attach it to the parts, beside those already there; return its name, by default the file's.

        Raises what `read_lora` does, and ValueError for a name that is taken or while LoRAs are fused.
        """
        file = checks.check_path("path", path)
        name = file.stem if name is None else name
        if not isinstance(name, str) or not name:
            raise TypeError(f"name={name!r:.80}; expected a string that is not empty, to call the LoRA by")
        if name in self.loras:
            raise ValueError(f"a LoRA named {name!r} is loaded already; give another name, or unload it first")
        self._must_not_be_fused()
        weight = _weight(name, weight)
        lora = read_lora(file, parts)
        lora.weight = weight
        layers = layers_of(parts)
        self._layers[name] = {each: layers[each] for each in lora.names}
        self.loras[name] = lora
        self._handles += lora.attach(self._layers[name])
        return name

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Let the named LoRAs act with these weights, and the others not at all (0).

        Raises ValueError for a name that is not loaded, a weight that is not finite, or while LoRAs are fused.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights={weights!r:.80}; expected a weight for each name, such as {{'style': 0.8}}")
        self._must_be_loaded(*weights)
        self._must_not_be_fused()
        weights = {name: _weight(name, weight) for name, weight in weights.items()}
        for name, lora in self.loras.items():
            lora.weight = weights.get(name, 0.0)

    def fuse(self) -> None:
        """Write W' = W + Σ wᵢ ΔWᵢ into the layers, which then cost nothing extra. Raises ValueError without LoRAs."""
        self._must_not_be_fused()
        if not self.loras:
            raise ValueError("no LoRA is loaded, so there is nothing to fuse; load one first")
        updates: dict[Layer, list[tuple[float, LowRank]]] = {}
        for adapter, lora in self.loras.items():
            for name, update in lora.items():
                updates.setdefault(self._layers[adapter][name], []).append((lora.weight, update))
        fused = []
        for layer, some in updates.items():
            # W' = W + Σ wᵢ (αᵢ/rᵢ) Bᵢ Aᵢ
            total = sum(weight * update.delta() for weight, update in some)
            fused.append((layer, nn.Parameter((layer.weight + total).to(layer.weight.dtype), requires_grad=False)))
        self._detach()
        self._originals = [(layer, layer.weight) for layer in updates]
        for layer, weight in fused:
            layer.weight = weight

    def unfuse(self) -> None:
        """Put back the very weights that were there before `fuse`. Raises ValueError when nothing is fused."""
        if not self.fused:
            raise ValueError("no LoRA is fused, so there is nothing to undo")
        for layer, weight in self._originals:
            layer.weight = weight
        self._originals = []
        self._attach()

    def unload(self, name: str | None = None) -> None:
        """Remove one LoRA, or all; the model is then exactly as if it had never been there."""
        self._must_be_loaded(*([] if name is None else [name]))
        if fused := self.fused:
            self.unfuse()
        self._detach()
        for each in [name] if name is not None else list(self.loras):
            del self.loras[each], self._layers[each]
        self._attach()
        if fused and self.loras:
            self.fuse()

    def _attach(self) -> None:
        for name, lora in self.loras.items():
            self._handles += lora.attach(self._layers[name])

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _must_not_be_fused(self) -> None:
        if self.fused:
            raise ValueError(f"{', '.join(self.loras)} is fused into the weights; call unfuse_lora() first")

    def _must_be_loaded(self, *names: str) -> None:
        if unknown := [name for name in names if name not in list(self.loras)]:
            raise ValueError(f"no LoRA named {unknown[0]!r}; loaded are: {', '.join(self.loras) or 'none'}")


def layers_of(parts: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The linear layers and convolutions of the parts, by part and name: "unet.conv_in" and so on."""
    return {
        f"{part}.{name}": module
        for part, root in parts.items()
        for name, module in root.named_modules()
        if isinstance(module, Layer)
    }


def read_lora(path: str | PathLike[str], parts: Mapping[str, nn.Module]) -> LoRA:
    """Read a LoRA for a model with these parts ("unet", "text_encoder"), on their devices and in their dtypes.

    path: .safetensors, .bin or .pt in the layouts of diffusers, peft or kohya, or a folder with such a file. α comes
    from the file or from peft's configuration; where neither says, α = r. Raises CheckpointError, which names every
    key that no layer wants and every tensor of the wrong shape.
    """
    path = _file_in(checks.check_path("path", path), LORA_FILES)
    header, layers = read_header(path), layers_of(parts)
    spelled = {spelling: name for name in layers for spelling in _spellings(name)}
    keys: dict[str, dict[str, str]] = {}
    problems = []
    for key in header:
        match = KEY.fullmatch(key)
        name = spelled.get(match["layer"].replace(".", "_")) if match else None
        if match is None or name is None:
            problems.append(f"{shown(key)} belongs to no layer of this model")
        elif keys.setdefault(name, {}).setdefault(FACTORS[match["factor"]], key) != key:
            problems.append(f"{key} comes twice, the other as {keys[name][FACTORS[match['factor']]]}")
    for name, found in keys.items():
        problems += _misfits(found, header, layers[name])
    if problems or not keys:
        some = "".join(f"\n  {problem}" for problem in problems[:4]) or "\n  it holds no LoRA"
        more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
        kind = looks_like(header)
        known = f"It looks like {kind}. " if kind not in ("", "a LoRA") else ""
        raise CheckpointError(f"{path} does not fit:{some}{more}\n{known}Use a LoRA made for this kind of model")
    tensors = dict(read_tensors(path, header, "cpu", torch.float32))
    settings = _settings(path)
    updates = {}
    for name, found in keys.items():
        a, b = tensors[found["A"]], tensors[found["B"]]
        rank = len(a)
        try:
            alpha = float(tensors[found["alpha"]]) if "alpha" in found else _told_alpha(settings, name, rank)
            checks.check_float("alpha", alpha)
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise CheckpointError(f"{path} has no valid alpha for {name} ({error}); fetch it again") from error
        updates[name] = update = LowRank(layers[name], rank, alpha)
        update.lora_A = nn.Parameter(a.reshape(update.lora_A.shape).to(layers[name].weight))
        update.lora_B = nn.Parameter(b.reshape(update.lora_B.shape).to(layers[name].weight))
    return LoRA(updates).eval().requires_grad_(False)


def _spellings(name: str) -> Iterator[str]:
    """What files may call a layer, with underscores for dots, which kohya writes in any case."""
    part, _, rest = name.partition(".")
    layer = rest.replace(".", "_")
    names = {layer, layer.removeprefix("text_model_")}
    for new, old in OLD_NAMES.items():
        names |= {each.removesuffix(new) + old for each in names if each.endswith("_" + new)}
    # old diffusers names the layers of its attention processors: attn1.processor.to_q_lora
    names |= {re.sub(r"_(to_(?:q|k|v|out))$", r"_processor_\1", each) for each in names}
    for prefix in (*PREFIXES[part], "base_model_model_", ""):
        yield from (prefix + each for each in names)


def _misfits(keys: Mapping[str, str], header: Mapping[str, TensorInfo], layer: Layer) -> Iterator[str]:
    """What is wrong with the tensors found for one layer; a 1×1 convolution may be written as a linear layer."""
    if missing := [factor for factor in "AB" if factor not in keys]:
        there = keys.get("A") or keys.get("B") or keys["alpha"]
        yield f"{there} has no partner: lora_{missing[0]} ({'down' if missing[0] == 'A' else 'up'}) is missing"
        return
    out, *rest = layer.weight.shape
    rank = (*header[keys["A"]].shape, 0)[0]
    for factor, expected in (("A", (rank, *rest)), ("B", (out, rank, *(1 for _ in rest[1:])))):
        shape, dtype = header[keys[factor]]
        if rank < 1 or (shape not in (expected, (*expected, 1, 1)) and (*shape, 1, 1) != expected):
            wanted = f"[rank, {', '.join(map(str, rest))}]" if factor == "A" else str([*expected])
            yield f"{keys[factor]} is {list(shape)}; expected {wanted}"
        elif dtype not in FLOATS:
            yield f"{keys[factor]} is of dtype {dtype}; expected {', '.join(FLOATS)}"
    if "alpha" in keys and math.prod(header[keys["alpha"]].shape) != 1:
        yield f"{keys['alpha']} is {list(header[keys['alpha']].shape)}; expected one number"


def _settings(path: Path) -> Mapping[str, Any]:
    """peft's configuration: in the file's own metadata, as diffusers writes it, or in adapter_config.json beside it."""
    if path.stem == "adapter_model":
        return read_json(path.with_name("adapter_config.json"))
    try:
        settings = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the lora_adapter_metadata of {path} is not JSON ({error}); fetch it again") from error
    return settings if isinstance(settings, dict) else {}


def _told_alpha(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """The α of a layer by peft's rules: the first pattern that ends its name, else the general one, else r."""
    part, _, layer = name.partition(".")

    def told(key: str, default: Any) -> Any:
        return settings.get(f"{part}.{key}", settings.get(key, default))

    alpha = told("lora_alpha", rank)
    for pattern, other in (told("alpha_pattern", None) or {}).items():
        # a pattern with repeats in repeats could be tried for years
        if not re.fullmatch(r"[\w.\\^$|*+-]{1,500}", pattern) or len(re.findall(r"[*+]", pattern)) > 2:
            raise ValueError(f"the alpha_pattern {shown(pattern)!r} is none of names, dots and at most two repeats")
        if any(re.fullmatch(rf"(.*\.)?({pattern})", each) for each in (layer, layer.removeprefix("text_model."))):
            alpha = other
            break
    return float(alpha) * (math.sqrt(rank) if told("use_rslora", False) else 1.0)


def read_textual_inversion(path: str | PathLike[str], token: str | None = None) -> tuple[str, Tensor]:
    """Read a textual inversion: the word it is for (or `token` instead), and its vectors (n, width), float32.

    path: .safetensors or .bin of diffusers ({word: vectors}), .pt or .safetensors of the web UI, or a folder with such
    a file. Raises CheckpointError when it is none of these.
    """
    path = _file_in(checks.check_path("path", path), INVERSION_FILES)
    if path.suffix == ".safetensors":
        header = read_header(path)
        if wrong := [f"{shown(key)} of dtype {info.dtype}" for key, info in header.items() if info.dtype not in FLOATS]:
            raise CheckpointError(f"{path} holds {wrong[0]}; expected {', '.join(FLOATS)}")
        content: Any = dict(read_tensors(path, header, "cpu", torch.float32))
    else:
        content = read_pickle(path)
    name, vectors = None, content.get("string_to_param") if isinstance(content, dict) else None
    if isinstance(vectors, dict):
        name, vectors = content.get("name") or path.stem, next(iter(vectors.values()), None)
    elif isinstance(content, dict) and len(content) == 1:
        name, vectors = next(iter(content.items()))
        name = path.stem if name == "emb_params" else name  # the web UI's safetensors do not say the word
    vectors = plain_tensor(vectors, path) if isinstance(vectors, Tensor) else None
    if vectors is None or not vectors.is_floating_point() or vectors.ndim not in (1, 2) or not vectors.numel():
        keys = list(content)[:4] if isinstance(content, dict) else [type(content).__name__]
        found = ", ".join(shown(str(key)) for key in keys)
        raise CheckpointError(
            f"{path} holds {found}; expected one word with its vectors, (width,) or (n, width), or the web UI's "
            "string_to_param. Use a textual inversion made for this kind of model"
        )
    return str(name) if token is None else token, vectors.float().reshape(-1, vectors.shape[-1])


def add_word(tokenizer: Tokenizer, text_encoder: TextEncoder, token: str, vectors: Tensor) -> Tokenizer:
    """Give a word its vectors (n, width): the text encoder gets a longer table, and a new tokenizer is returned.

    The old table and tokenizer stay as they are. Raises ValueError when the word is known already, the vectors have
    another width, or table and tokenizer do not have the same length.
    """
    table = text_encoder.token_embedding.weight
    if vectors.shape[-1] != table.shape[1]:
        raise ValueError(
            f"the vectors of {token!r} have {vectors.shape[-1]} numbers; this text encoder takes {table.shape[1]}. "
            "Use a textual inversion made for this kind of model"
        )
    if len(table) != len(tokenizer.vocabulary):
        raise ValueError(
            f"the text encoder has {len(table)} token vectors and the tokenizer {len(tokenizer.vocabulary)} tokens; "
            "load the model again, and give each model its own text encoder"
        )
    grown = tokenizer.with_token(token, len(vectors))
    embedding = nn.Embedding.from_pretrained(torch.cat([table.detach(), vectors.to(table)]))
    text_encoder.text_model["embeddings"].token_embedding = embedding
    return grown


def _file_in(path: Path, stems: tuple[str, ...]) -> Path:
    """The path itself, or the file of a known name in that folder. Raises FileNotFoundError."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin")]
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"no adapter at {path}; expected a file, or a folder with {' or '.join(names)}")
    return found[0]


def _weight(name: str, weight: Any) -> float:
    return checks.check_float(f"weight of {name!r:.80}", weight, hint=", such as 1.0")
