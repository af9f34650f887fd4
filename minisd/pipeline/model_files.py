"""Model and adapter files, as methods of `StableDiffusion`: loading, saving, LoRAs, learned words, compiling."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import torch

from minisd.features.adapters import layers_of
from minisd.features.textual_inversion import add_word
from minisd.features.validate import check_dtype, check_path
from minisd.io import checkpoint
from minisd.io.adapter_files import read_lora, read_textual_inversion
from minisd.pipeline import memory

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion


class ModelFiles:
    """The methods of `StableDiffusion` that read and write files, and what changes its weights."""

    _compile_options: dict[str, Any] | None = None

    if TYPE_CHECKING:

        def __init__(self, *parts: Any, **options: Any) -> None: ...

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        tile: bool = False,
        **options: Any,
    ) -> Self:
        """Load a model.

        Args:
            source: a hub id, a diffusers folder, a .safetensors or .ckpt file; by default the tiny model inside.
            device: by default the first there is of cuda, mps and cpu.
            dtype: by default float16 on cuda, else float32.
            offload: keep the parts in main memory, each on the device only while it computes. In float16 the largest,
                the UNet, takes 1.7 GB there in place of 2.1 GB for all three. Slower, and threads may not share it.
            tile: encode and decode one picture at a time, and those of more than 1½ times the model's own size in
                tiles.
            options: variant, prediction_type, revision …, see `io.checkpoint.load`, which says what it raises.

        Raises:
            ValueError: this machine lacks the device, or weights cannot have the dtype.
        """
        place = memory.usable_device(device) if device is not None else memory.best_device()
        default_dtype = torch.float16 if place.type == "cuda" else torch.float32
        dtype = check_dtype(default_dtype if dtype is None else dtype)
        loaded = checkpoint.load(source, device="cpu" if offload else place, dtype=dtype, **options)
        parts = loaded.tokenizer, loaded.text_encoder, loaded.unet, loaded.autoencoder
        if place.type == "cuda" and not offload:
            memory.move(loaded.unet, place)
        return cls(loaded.config, *parts, loaded.defaults, offload=place if offload else None, tile=tile)

    def save_pretrained(self: StableDiffusion, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a folder that diffusers, transformers and minisd load. dtype: by default the weights' own.

        Fused LoRAs are saved in the weights. Raises ValueError if there are others, or textual inversions, which such a
        folder cannot hold.
        """
        if self.adapters.loras and not self.adapters.fused:
            raise ValueError(f"{', '.join(self.adapters.loras)} is not fused; call fuse_lora() or unload_lora() first")
        if self.tokenizer.added:
            raise ValueError(f"a model folder cannot hold {', '.join(self.tokenizer.added)}; keep their own files")
        loaded = checkpoint.Loaded(**vars(self.model), defaults=self.defaults)
        checkpoint.save(loaded, folder, None if dtype is None else check_dtype(dtype))

    def load_lora(
        self: StableDiffusion, path: str | PathLike[str], name: str | None = None, weight: float = 1.0
    ) -> str:
        """Load a LoRA beside those already there, acting with `weight`; return its name, by default the file's.

        path: a .safetensors, .bin or .pt file in the layouts of diffusers, peft or kohya, or a folder with one. Raises
        CheckpointError, naming keys and shapes, if it does not fit, and ValueError if the name is taken.
        """
        name = check_path("path", path).stem if name is None else name
        parts = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.adapters.add(name, read_lora(path, parts), layers_of(parts), weight)
        return name

    def set_adapters(self: StableDiffusion, weights: Mapping[str, float]) -> None:
        """Let the named LoRAs act with these weights, and the others not at all. ValueError for an unknown name."""
        self.adapters.set_weights(weights)

    def fuse_lora(self: StableDiffusion) -> None:
        """Add the loaded LoRAs to the weights, so that drawing costs nothing extra; `unfuse_lora` undoes it exactly."""
        self.adapters.fuse()

    def unfuse_lora(self: StableDiffusion) -> None:
        """Put back the weights as they were before `fuse_lora`, bit for bit; the LoRAs act beside them again."""
        self.adapters.unfuse()

    def unload_lora(self: StableDiffusion, name: str | None = None) -> None:
        """Remove one LoRA, or all of them, exactly, fused or not."""
        self.adapters.unload(name)

    def load_textual_inversion(self: StableDiffusion, path: str | PathLike[str], token: str | None = None) -> str:
        """Teach the text encoder a word, and return it.

        Raises CheckpointError for other files, ValueError for a word that is known already or vectors that do not fit.
        """
        word, vectors = read_textual_inversion(path, token)
        self.tokenizer = add_word(self.tokenizer, self.text_encoder, word, vectors)
        return word

    def compile(self: StableDiffusion, **options: Any) -> None:
        """Compile the UNet and the decoder with torch.compile, one graph each.

        Each new size and number of pictures is compiled when it first comes, which takes a minute or more; from then on
        it is faster, most of all on a GPU. On a CPU a C++ compiler is needed. Where attention is recorded, the plain
        code runs.

        Args:
            options: of torch.compile, such as mode="reduce-overhead".
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        for part in (self.unet, self.autoencoder.decoder):
            part.compile(**options)
        self._compile_options = options
