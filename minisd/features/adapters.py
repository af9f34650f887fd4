"""The LoRAs of a model, by name: active beside its layers, with a weight each, or fused into their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minisd.features.validate import check_float
from minisd.lora import Layer, LoRA, LowRank


class Adapters:
    """The LoRAs of one model: beside its layers (computed in every call), or fused into their weights."""

    def __init__(self) -> None:
        self.loras: dict[str, LoRA] = {}
        self._layers: dict[str, dict[str, Layer]] = {}
        self._handles: list[RemovableHandle] = []
        self._originals: list[tuple[Layer, Tensor]] = []

    @property
    def fused(self) -> bool:
        """Whether the weights of the model contain the updates."""
        return bool(self._originals)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each LoRA."""
        return {name: lora.weight for name, lora in self.loras.items()}

    def add(self, name: str, lora: LoRA, layers: Mapping[str, Layer], weight: float = 1.0) -> None:
        """Attach a LoRA to layers, beside those already there.

        Args:
            name: must be new.
            lora: the updates.
            layers: by part and name, as from `layers_of`; may be more than those of the LoRA.
            weight: the factor of the updates.

        Raises:
            TypeError: the name is not a string or empty, or the weight is not a number.
            ValueError: the name is taken, the weight is not finite, or LoRAs are fused.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name={name!r:.80}; expected a non-empty string, by which to address the LoRA")
        if name in self.loras:
            raise ValueError(f"a LoRA named {name!r} is loaded already; give another name, or unload it first")
        self._check_not_fused()
        lora.weight = _check_weight(name, weight)
        self._layers[name] = {each: layers[each] for each in lora.names}
        self.loras[name] = lora
        self._handles += lora.attach(self._layers[name])

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Give the named LoRAs these weights, and all others 0.

        Raises:
            TypeError: not a mapping from names to numbers.
            ValueError: an unknown name, a weight that is not finite, or LoRAs are fused.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights={weights!r:.80}; expected a weight for each name, such as {{'style': 0.8}}")
        self._check_loaded(*weights)
        self._check_not_fused()
        weights = {name: _check_weight(name, weight) for name, weight in weights.items()}
        for name, lora in self.loras.items():
            lora.weight = weights.get(name, 0.0)

    def fuse(self) -> None:
        """Write W' = W + Σ wᵢ ΔWᵢ into the layers, which then cost nothing extra. Raises ValueError without LoRAs."""
        self._check_not_fused()
        if not self.loras:
            raise ValueError("no LoRA is loaded, so there is nothing to fuse; load one first")
        updates: dict[Layer, list[tuple[float, LowRank]]] = {}
        for adapter, lora in self.loras.items():
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
        """Put back the weights from before `fuse`, bit for bit. Raises ValueError when nothing is fused."""
        if not self.fused:
            raise ValueError("no LoRA is fused, so there is nothing to undo")
        for layer, parameter in self._originals:
            layer.weight = parameter
        self._originals = []
        self._attach()

    def unload(self, name: str | None = None) -> None:
        """Remove one LoRA, or all; the model is then exactly as without it. Raises ValueError for an unknown name."""
        self._check_loaded(*([] if name is None else [name]))
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

    def _check_not_fused(self) -> None:
        if self.fused:
            raise ValueError(f"{', '.join(self.loras)} is fused into the weights; call unfuse_lora() first")

    def _check_loaded(self, *names: str) -> None:
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


def _check_weight(name: str, weight: Any) -> float:
    return check_float(f"weight of {name!r:.80}", weight, hint=", such as 1.0")
