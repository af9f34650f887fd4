"""Named LoRA adapters, applied next to a model's layers or fused into their weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minisd.features.validate import check_float
from minisd.lora import Layer, LoRA, LowRank

Weight = float | Mapping[str, float]  # one weight for all layers, or one per part


class Adapters:
    """The LoRAs loaded into one model, either attached (computed in every call) or fused into the weights."""

    def __init__(self) -> None:
        self.loras: dict[str, LoRA] = {}
        self._parts: dict[str, dict[str, LoRA]] = {}  # the layers of each part, with the weight there
        self._layers: dict[str, dict[str, Layer]] = {}
        self._handles: list[RemovableHandle] = []
        self._originals: list[tuple[Layer, Tensor]] = []

    @property
    def fused(self) -> bool:
        """Whether the LoRAs are fused into the model's weights."""
        return bool(self._originals)

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight of each LoRA, by name: one number or, where they differ, one per part."""
        weights = {name: {part: each.weight for part, each in parts.items()} for name, parts in self._parts.items()}
        return {name: each if len({*each.values()}) > 1 else [*each.values()][0] for name, each in weights.items()}

    @property
    def active(self) -> list[str]:
        """The names of the LoRAs that are not turned off."""
        return [name for name, parts in self._parts.items() if any(each.weight for each in parts.values())]

    def add(self, name: str, lora: LoRA, layers: Mapping[str, Layer], weight: Weight = 1.0) -> None:
        """Attach a LoRA, in addition to those already loaded.

        Args:
            name: A unique name for the LoRA.
            lora: The low-rank updates.
            layers: The model's layers by name, as returned by `layers_of`. May include layers without an update.
            weight: The factor to scale the updates by, or one per part, such as {"unet": 0.8, "text_encoder": 0.5},
                where a part that is left out has 1.

        Raises:
            TypeError: If the name is not a non-empty string or the weight is not a number.
            ValueError: If the name is already in use, the weight is not finite, or LoRAs are fused.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name={name!r:.80}; expected a non-empty string")
        if name in self.loras:
            raise ValueError(f"a LoRA named {name!r} is already loaded; choose another name, or unload it first")
        self._check_not_fused()
        weights = part_weights(name, weight, sorted({each.partition(".")[0] for each in layers}))
        self._layers[name] = {each: layers[each] for each in lora.names}
        self.loras[name] = lora
        self._parts[name] = split_parts(lora, weights)
        self._attach(name)

    def set_weights(self, weights: Mapping[str, Weight]) -> None:
        """Set the weights of the named LoRAs, each a number or one per part, and those of all others to 0.

        Raises:
            TypeError: If `weights` is not a mapping from names to numbers.
            ValueError: If a name is unknown, a weight is not finite, or LoRAs are fused.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights={weights!r:.80}; expected a mapping of names to weights, such as {{'style': 1}}")
        self._check_loaded(*weights)
        self._check_not_fused()
        new = {name: part_weights(name, weights.get(name, 0.0), parts) for name, parts in self._parts.items()}
        for name, parts in self._parts.items():
            for part, lora in parts.items():
                lora.weight = new[name][part]

    @contextmanager
    def weighted(self, weights: Mapping[str, Weight]) -> Iterator[None]:
        """Give the named LoRAs, which are loaded, other weights while in the context; all others keep theirs."""
        new = {name: part_weights(name, weight, self._parts[name]) for name, weight in weights.items()}
        old = [(lora, lora.weight) for name in new for lora in self._parts[name].values()]
        try:
            for name, parts in new.items():
                for part, weight in parts.items():
                    self._parts[name][part].weight = weight
            yield
        finally:
            for lora, weight in old:
                lora.weight = weight

    def fuse(self) -> None:
        """Replace each layer's weight by W' = W + Σ wᵢ ΔWᵢ. Raises ValueError if no LoRA is loaded."""
        self._check_not_fused()
        if not self.loras:
            raise ValueError("no LoRA is loaded; load one before fusing")
        updates: dict[Layer, list[tuple[float, LowRank]]] = {}
        for adapter, parts in self._parts.items():
            for lora in parts.values():
                for name, update in lora.items():
                    updates.setdefault(self._layers[adapter][name], []).append((lora.weight, update))
        fused = []
        for layer, weighted in updates.items():
            # W' = W + Σ wᵢ (αᵢ/rᵢ) Bᵢ Aᵢ
            total = sum(weight * update.delta() for weight, update in weighted)
            fused.append((layer, nn.Parameter((layer.weight + total).to(layer.weight.dtype), requires_grad=False)))
        self._detach()
        self._originals = [(layer, layer.weight) for layer in updates]
        for layer, parameter in fused:
            layer.weight = parameter

    def unfuse(self) -> None:
        """Restore the exact weights from before `fuse`. Raises ValueError if no LoRA is fused."""
        if not self.fused:
            raise ValueError("no LoRA is fused; call fuse_lora() first")
        for layer, parameter in self._originals:
            layer.weight = parameter
        self._originals = []
        self._attach(*self.loras)

    def unload(self, name: str | None = None) -> None:
        """Remove one LoRA, or all of them, fused or not. Raises ValueError for an unknown name."""
        self._check_loaded(*([] if name is None else [name]))
        if fused := self.fused:
            self.unfuse()
        self._detach()
        for each in [name] if name is not None else list(self.loras):
            del self.loras[each], self._layers[each], self._parts[each]
        self._attach(*self.loras)
        if fused and self.loras:
            self.fuse()

    def _attach(self, *names: str) -> None:
        for name in names:
            for lora in self._parts[name].values():
                self._handles += lora.attach(self._layers[name])

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_not_fused(self) -> None:
        if self.fused:
            raise ValueError(f"{', '.join(self.loras)} is fused into the weights; call unfuse_lora() first")

    def _check_loaded(self, *names: str) -> None:
        if unknown := [name for name in names if name not in list(self.loras)]:
            raise ValueError(f"no LoRA named {unknown[0]!r}; loaded LoRAs: {', '.join(self.loras) or 'none'}")


def layers_of(parts: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Return the linear and convolutional layers of several modules, by names such as "unet.conv_in"."""
    return {
        f"{part}.{name}": module
        for part, root in parts.items()
        for name, module in root.named_modules()
        if isinstance(module, Layer)
    }


def split_parts(lora: LoRA, weights: Mapping[str, float]) -> dict[str, LoRA]:
    """Return the updates of each part as a LoRA of its own, with the weight of that part."""
    return {
        part: LoRA({name: update for name, update in lora.items() if name.startswith(f"{part}.")}, weight)
        for part, weight in weights.items()
    }


def default_name(path: Path, taken: Collection[str]) -> str:
    """Return the name of a LoRA: the file's stem or, while that is taken, one with another folder before it."""
    name = path.stem
    for folder in path.resolve().parents:
        if name not in taken:
            break
        name = f"{folder.name}/{name}"
    return name


def part_weights(name: str, weight: Any, parts: Collection[str]) -> dict[str, float]:
    """Return the weight of each part."""
    weights = weight if isinstance(weight, Mapping) else dict.fromkeys(parts, weight)
    if unknown := [part for part in weights if part not in parts]:
        raise ValueError(f"weight of {name!r:.80} for {unknown[0]!r:.80}; expected parts of {', '.join(parts)}")
    checked = {
        part: check_float(f"weight of {name!r:.80}", each, hint=", such as 1.0") for part, each in weights.items()
    }
    return {part: checked.get(part, 1.0) for part in parts}
