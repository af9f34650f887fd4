"""Where the time goes: a profile by torch, summed over kinds of operators."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Prefixes of operator names, by kind; the first match counts.
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
    """The kind of an operator, by its name in torch, such as aten::mm."""
    if not operator.startswith("aten::"):
        return PYTHON
    name = operator.removeprefix("aten::")
    return next((kind for kind, prefixes in KINDS.items() if name.startswith(prefixes)), "element by element")


def shares(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """The share of the time per kind of operator, the largest first. Time outside of operators counts as Python's.

    Args:
        seconds: the time of each operator by its name, without the operators it calls.
        total: the total time, in seconds.
    """
    result: dict[str, float] = {}
    for operator, own in seconds.items():
        result[kind(operator)] = result.get(kind(operator), 0) + own / total
    result[PYTHON] = max(0.0, 1 - sum(share for name, share in result.items() if name != PYTHON))
    return {name: round(share, 4) for name, share in sorted(result.items(), key=lambda item: -item[1])}
