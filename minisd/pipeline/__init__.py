"""The public `StableDiffusion` class and its supporting modules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

__all__ = ["StableDiffusion"]


def __getattr__(name: str) -> Any:
    if name != "StableDiffusion":
        raise AttributeError(f"module 'minisd.pipeline' has no attribute {name!r}")
    from minisd.pipeline.stable_diffusion import StableDiffusion

    return StableDiffusion
