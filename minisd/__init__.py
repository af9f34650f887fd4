"""Stable Diffusion from scratch, written to be read, with a tiny trained model included.

prompt → tokenizer → text_encoder → unet, called repeatedly by a sampler → latents → autoencoder → image

Reading order: config, tokenizer, attention, text_encoder, blocks, autoencoder, unet, schedule, samplers, guidance,
generate (the complete pipeline); then editing, lora, images and preview.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisd.autoencoder import Autoencoder
    from minisd.config import SD15, SD15_INPAINT, SD21, SD21_BASE, TINY
    from minisd.features.attention_maps import record_attention
    from minisd.features.more_samplers import Sampler
    from minisd.pipeline.stable_diffusion import StableDiffusion
    from minisd.schedule import Schedule
    from minisd.text_encoder import TextEncoder
    from minisd.tokenizer import Tokenizer
    from minisd.unet import UNet

__version__ = "0.1.0"
__all__ = [
    "SD15", "SD15_INPAINT", "SD21", "SD21_BASE", "TINY", "Autoencoder", "Sampler", "Schedule", "StableDiffusion",
    "TextEncoder", "Tokenizer", "UNet", "__version__", "record_attention",
]  # fmt: skip

_MODULES = MappingProxyType(
    {
        "StableDiffusion": "pipeline.stable_diffusion",
        "Tokenizer": "tokenizer",
        "TextEncoder": "text_encoder",
        "Autoencoder": "autoencoder",
        "UNet": "unet",
        "Schedule": "schedule",
        "Sampler": "features.more_samplers",
        "record_attention": "features.attention_maps",
    }
    | dict.fromkeys(("SD15", "SD15_INPAINT", "SD21_BASE", "SD21", "TINY"), "config")
)


def __getattr__(name: str) -> Any:
    """Import public names on first access, so that `import minisd` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'minisd' has no attribute {name!r}")
    return getattr(import_module(f"minisd.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
