"""LoRA: low-rank updates to the weights of a network (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Layer = nn.Linear | nn.Conv2d


class LowRank(nn.Module):
    """Low-rank update to one layer, ΔW = (α/r) B A: A projects down to r channels, B back up.

    `lora_A` is (r, in), or (r, in, k, k) for a convolution. `lora_B` is (out, r) and initialized to zero, so that
    training starts from the unmodified layer. By default α = r.
    """

    def __init__(self, layer: Layer, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.scale = 1.0 if alpha is None else alpha / rank
        self.conv: Any = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        self.lora_A = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.lora_B = nn.Parameter(torch.zeros(layer.weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # default initialization in PyTorch

    def forward(self, x: Tensor) -> Tensor:
        """Return the update to the layer's output, given the layer's input."""
        a, b = self.lora_A.to(x.device), self.lora_B.to(x.device)
        if self.conv is None:
            return self.scale * F.linear(F.linear(x, a), b)
        return self.scale * F.conv2d(F.conv2d(x, a, None, *self.conv), b[:, :, None, None])

    def delta(self) -> Tensor:
        """Return ΔW in the shape of the layer's weight, at least float32."""
        a, b = (w.detach().to(torch.promote_types(w.dtype, torch.float32)) for w in (self.lora_A, self.lora_B))
        # ΔW = (α/r) B A
        return self.scale * torch.einsum("or,r...->o...", b, a)


class LoRA(nn.Module):
    """Low-rank updates and their weight; layers are named like "unet.mid_block.attentions.0.proj_in"."""

    def __init__(self, updates: Mapping[str, LowRank], weight: float = 1.0) -> None:
        super().__init__()
        self.names, self.weight = tuple(updates), weight
        self.updates = nn.ModuleList(updates.values())

    def items(self) -> Iterator[tuple[str, LowRank]]:
        """Iterate over (layer name, update) pairs."""
        return zip(self.names, self.updates, strict=True)  # type: ignore[arg-type]

    def attach(self, layers: Mapping[str, Layer]) -> list[RemovableHandle]:
        """Register forward hooks that add the updates to layer outputs; remove the returned handles to detach."""
        return [layers[name].register_forward_hook(partial(self._add, update)) for name, update in self.items()]

    def _add(self, update: LowRank, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        # y = W x + w · (α/r) B A x
        return output + self.weight * update(*inputs) if self.weight else output
