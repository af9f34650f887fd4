"""Updates of one layer other than plain LoRA: LoHa, LoKr, LoRA with a core tensor, and DoRA on top of any of them.

Sources: LoHa: Hyeon-Woo et al. 2022, "FedPara", arXiv 2108.06098, section 2.2; LoKr: Yeh et al. 2024, "Navigating
Text-To-Image Customization", arXiv 2309.14859, section 3; DoRA: Liu et al. 2024, arXiv 2402.09353, equation 5.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.lora import Layer, LowRank

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class FactoredUpdate(LowRank):
    """An update whose ΔW is computed from its factors in every call; `Adapters.fuse` removes that cost.

    Args:
        layer: The layer to update; DoRA reads its current weight.
        factors: The factors by their names in files: `product` lists them.
        scale: The factor of ΔW, α/r.
        magnitude: DoRA's norms, (out,) or, if `on_input`, (in,): the norm of each row or column of the new weight.
    """

    def __init__(
        self,
        layer: Layer,
        factors: Mapping[str, Tensor],
        scale: float,
        magnitude: Tensor | None = None,
        on_input: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.scale, self.on_input = scale, on_input
        self.conv = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        self.factors = nn.ParameterDict({name: nn.Parameter(factor) for name, factor in factors.items()})
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self._layer = (layer,)  # in a tuple, so that it is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """Return the update to the layer's output, given the layer's input."""
        delta = self.delta().to(x)
        return F.linear(x, delta) if self.conv is None else F.conv2d(x, delta, None, *self.conv)

    def delta(self) -> Tensor:
        """Return ΔW in the shape of the layer's weight, at least float32."""
        weight = self._layer[0].weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        update = self.scale * product({name: f.detach().to(weight) for name, f in self.factors.items()}, weight.shape)
        if self.magnitude is None:
            return update
        # W' = m (W + ΔW) / ‖W + ΔW‖
        merged = weight + update
        axes = [axis for axis in range(merged.dim()) if axis != self.on_input]
        shape = [1] * merged.dim()
        shape[self.on_input] = -1
        magnitude = self.magnitude.detach().to(merged).reshape(shape)
        return magnitude * merged / torch.linalg.vector_norm(merged, dim=axes, keepdim=True) - weight


def product(factors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """Return the unscaled ΔW of a shape (out, in) or (out, in, k, k). Raises RuntimeError if the factors do not fit.

    - LoRA, A (r, in, …), B (out, r), optionally mid (r, r, k, k): B A
    - LoHa, hada_w1_a … hada_w2_b, optionally hada_t1, hada_t2: (B₁ A₁) ⊙ (B₂ A₂)
    - LoKr, lokr_w1 and lokr_w2, each a matrix or a product of _a and _b: C ⊗ D
    """
    if "A" in factors:
        update = _matrix(factors["B"].flatten(1), factors["A"], factors.get("mid"), transposed=False)
    elif "hada_w1_a" in factors:
        update = _matrix(*(factors.get(f"hada_{name}") for name in ("w1_a", "w1_b", "t1")))
        update = update * _matrix(*(factors.get(f"hada_{name}") for name in ("w2_a", "w2_b", "t2")))
    else:
        c, d = (
            _matrix(*(factors.get(f"lokr_{name}") for name in (f"{w}_a", f"{w}_b", f"t{w[1]}")))
            if f"lokr_{w}_a" in factors
            else factors[f"lokr_{w}"]
            for w in ("w1", "w2")
        )
        update = torch.kron(c, d.flatten(1))
    return update.reshape(shape)


def rank(factors: Mapping[str, Tensor]) -> int | None:
    """Return the rank r that α is divided by, or None for LoKr with full matrices, which has none."""
    for name in ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in factors:
            return len(factors[name])
    return None


def missing(names: Mapping[str, object]) -> str:
    """Return the name of a factor that is missing beside the given ones, or ""."""
    if any(name.startswith("hada_") for name in names):
        wanted = [*LOHA, *(["hada_t1", "hada_t2"] if {"hada_t1", "hada_t2"} & names.keys() else [])]
    elif any(name.startswith("lokr_") for name in names):
        parted = {w: {f"lokr_{w}_a", f"lokr_{w}_b"} for w in ("w1", "w2")}
        wanted = [f for w, pair in parted.items() for f in (sorted(pair) if pair & names.keys() else [f"lokr_{w}"])]
    else:
        wanted = ["A", "B"]
    return next((name for name in wanted if name not in names), "")


def _matrix(left: Tensor | None, right: Tensor | None, core: Tensor | None, *, transposed: bool = True) -> Tensor:
    """Return left · right or, with the core tensor (r, r, k, k) of a convolution, its products with both.

    With a core, the left factor is (r, out) if `transposed`, else (out, r).
    """
    assert left is not None and right is not None
    if core is None:
        return left @ right.flatten(1)
    return torch.einsum("nmkl,no,mi->oikl", core, left if transposed else left.T, right.flatten(1))
