"""Where the time goes: torch's profile of a computation, summed over kinds of operators."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# The beginning of an operator's name, and what it is of; the first that fits counts.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "convolution": ("conv", "_conv", "cudnn_conv", "mkldnn_conv", "slow_conv", "_slow_conv", "thnn_conv"),
        "matrix product": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
        "attention": ("_scaled_dot", "scaled_dot", "_flash_attention", "_efficient_attention", "_cudnn_attention"),
        "normalisation": ("native_group_norm", "group_norm", "native_layer_norm", "layer_norm"),
        "optimiser, clipping, averages": ("_fused_adam", "_foreach", "lerp", "linalg_vector_norm"),
        "copies and memory": ("copy_", "clone", "cat", "stack", "index", "flip", "embedding", "empty", "fill_"),
        "random numbers": ("rand", "normal_", "uniform_", "random_"),
    }
)
PYTHON = "Python, data and the rest"


def kind(operator: str) -> str:
    """What an operator does, by its name in torch, such as aten::mm."""
    if not operator.startswith("aten::"):
        return PYTHON
    name = operator.removeprefix("aten::")
    return next((found for found, beginnings in KINDS.items() if name.startswith(beginnings)), "element by element")


def shares(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """The share of the total that each kind of operator took, the largest first; what no operator took is Python's.

    seconds: of each operator by its name, without what it calls.
    """
    found: dict[str, float] = {}
    for operator, own in seconds.items():
        found[kind(operator)] = found.get(kind(operator), 0) + own / total
    found[PYTHON] = max(0.0, 1 - sum(share for name, share in found.items() if name != PYTHON))
    return {name: round(share, 4) for name, share in sorted(found.items(), key=lambda item: -item[1])}
