"""Named LoRA adapters, applied next to a model's layers or fused into their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minisd.features.validate import check_float
from minisd.lora import Layer, LoRA, LowRank


class Adapters:
    """The LoRAs loaded into one model, either attached (computed in every call) or fused into the weights."""

    def __init__(self) -> None:
        self.loras: dict[str, LoRA] = {}
        self._layers: dict[str, dict[str, Layer]] = {}
        self._handles: list[RemovableHandle] = []
        self._originals: list[tuple[Layer, Tensor]] = []

    @property
    def fused(self) -> bool:
        """Whether the LoRAs are fused into the model's weights."""
        return bool(self._originals)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each LoRA, by name."""
        return {name: lora.weight for name, lora in self.loras.items()}

    def add(self, name: str, lora: LoRA, layers: Mapping[str, Layer], weight: float = 1.0) -> None:
        """Attach a LoRA, in addition to those already loaded.

        Args:
            name: A unique name for the LoRA.
            lora: The low-rank updates.
            layers: The model's layers by name, as returned by `layers_of`. May include layers without an update.
            weight: The factor to scale the updates by.

        Raises:
            TypeError: If the name is not a non-empty string or the weight is not a number.
            ValueError: If the name is already in use, the weight is not finite, or LoRAs are fused.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name={name!r:.80}; expected a non-empty string")
        if name in self.loras:
            raise ValueError(f"a LoRA named {name!r} is already loaded; choose another name, or unload it first")
        self._check_not_fused()
        lora.weight = _check_weight(name, weight)
        self._layers[name] = {each: layers[each] for each in lora.names}
        self.loras[name] = lora
        self._handles += lora.attach(self._layers[name])

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weights of the named LoRAs, and those of all others to 0.

        Raises:
            TypeError: If `weights` is not a mapping from names to numbers.
            ValueError: If a name is unknown, a weight is not finite, or LoRAs are fused.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights={weights!r:.80}; expected a mapping of names to weights, such as {{'style': 1}}")
        self._check_loaded(*weights)
        self._check_not_fused()
        weights = {name: _check_weight(name, weight) for name, weight in weights.items()}
        for name, lora in self.loras.items():
            lora.weight = weights.get(name, 0.0)

    def fuse(self) -> None:
        """Replace each layer's weight by W' = W + Σ wᵢ ΔWᵢ. Raises ValueError if no LoRA is loaded."""
        self._check_not_fused()
        if not self.loras:
            raise ValueError("no LoRA is loaded; load one before fusing")
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
        """Restore the exact weights from before `fuse`. Raises ValueError if no LoRA is fused."""
        if not self.fused:
            raise ValueError("no LoRA is fused; call fuse_lora() first")
        for layer, parameter in self._originals:
            layer.weight = parameter
        self._originals = []
        self._attach()

    def unload(self, name: str | None = None) -> None:
        """Remove one LoRA, or all of them, fused or not. Raises ValueError for an unknown name."""
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
            raise ValueError(f"no LoRA named {unknown[0]!r}; loaded LoRAs: {', '.join(self.loras) or 'none'}")


def layers_of(parts: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Return the linear and convolutional layers of several modules, by names such as "unet.conv_in"."""
    return {
        f"{part}.{name}": module
        for part, root in parts.items()
        for name, module in root.named_modules()
        if isinstance(module, Layer)
    }


def _check_weight(name: str, weight: Any) -> float:
    return check_float(f"weight of {name!r:.80}", weight, hint=", such as 1.0")
