"""Methods of `StableDiffusion` for loading and saving models, LoRAs, textual inversions, and compiling."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from minisd.features.adapters import Weight, default_name, layers_of
from minisd.features.textual_inversion import add_word
from minisd.features.validate import check_dtype, check_float, check_path
from minisd.io import checkpoint
from minisd.io.adapter_files import read_bundled_words, read_lora, read_textual_inversion
from minisd.io.single_file import save_single_file
from minisd.lora import LoRA
from minisd.pipeline import memory
from minisd.pipeline.merging import merge
from minisd.pipeline.provenance import display_name

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion


class ModelFiles:
    """Mixin with the methods of `StableDiffusion` that load, save or modify weights.

    Those that modify them raise RuntimeError while another thread draws.
    """

    usage: memory.Usage

    _compile_options: dict[str, Any] | None = None
    lora_folder: str | PathLike[str] | None = None  # where LoRAs named in prompts are, as in <lora:name:0.8>
    _lora_files: Mapping[str, Path] = {}

    if TYPE_CHECKING:
        name: str
        vae_name: str

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
        lora_folder: str | PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Load a model.

        Args:
            source: A hub id, a diffusers folder, or a .safetensors or .ckpt file. Defaults to the bundled tiny model.
            device: The device to run on. Defaults to the first available of cuda, mps and cpu.
            dtype: The dtype of the weights. Defaults to float16 on cuda and float32 elsewhere.
            offload: Whether to keep the modules in CPU memory and move each to the device only while it runs. In
                float16 this takes 1.7 GB of device memory instead of 2.1 GB, but is slower and not thread-safe.
            tile: Whether to encode and decode images one at a time, and in tiles above 1.5 times the native size.
            lora_folder: The folder with the LoRAs that prompts name, as in <lora:name:0.8>.
            options: Further arguments for `io.checkpoint.load`: `vae` (another autoencoder: a hub id, a folder or a
                file, also TAESD), `variant`, `prediction_type`, `revision` or `config`.

        Raises:
            ValueError: If the device is not available or the dtype is not supported.
            CheckpointError, OSError: See `io.checkpoint.load`.
        """
        place = memory.usable_device(device) if device is not None else memory.best_device()
        default_dtype = torch.float16 if place.type == "cuda" else torch.float32
        dtype = check_dtype(default_dtype if dtype is None else dtype)
        loaded = checkpoint.load(source, device="cpu" if offload else place, dtype=dtype, **options)
        parts = loaded.tokenizer, loaded.text_encoder, loaded.unet, loaded.autoencoder
        if place.type == "cuda" and not offload:
            memory.move(loaded.unet, place)
        sd = cls(loaded.config, *parts, loaded.defaults, offload=place if offload else None, tile=tile)
        sd.name, vae = display_name(None if source is None else str(source)), options.get("vae")
        sd.vae_name = "" if vae is None else display_name(str(vae))
        sd.lora_folder = None if lora_folder is None else check_path("lora_folder", lora_folder)
        return sd

    def save_pretrained(self: StableDiffusion, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Save the model to a folder that minisd, diffusers and transformers can load.

        `dtype` defaults to that of the weights. Fused LoRAs are saved as part of the weights, and the words of textual
        inversions as part of tokenizer and text encoder. Raises ValueError if unfused LoRAs are loaded.
        """
        target = check_path("folder", folder)
        if target.suffix in checkpoint.SINGLE_FILES and not target.is_dir():
            raise ValueError(f"{target.name} names a file; expected a folder, or use save_single_file(…) for one file")
        self.check_fused()
        loaded = checkpoint.Loaded(**vars(self.model), defaults=self.defaults)
        checkpoint.save(loaded, folder, None if dtype is None else check_dtype(dtype))

    def save_single_file(self: StableDiffusion, path: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Save the model as one .safetensors file in CompVis layout, which the web UI, ComfyUI and diffusers load.

        Like `save_pretrained`, but the words of textual inversions have no place there, nor the sizes of a model other
        than Stable Diffusion 1 or 2: those are needed to load it again, as `from_pretrained(path, config=sd.config)`.
        """
        self.check_fused()
        save_single_file(self.model, path, None if dtype is None else check_dtype(dtype))

    def check_fused(self: StableDiffusion) -> None:
        """Raise ValueError if LoRAs lie beside the weights, where what is written would lack them."""
        if self.adapters.loras and not self.adapters.fused:
            raise ValueError(f"{', '.join(self.adapters.loras)} is not fused; call fuse_lora() or unload_lora() first")

    def to(
        self: StableDiffusion, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StableDiffusion:
        """Move the model, with its LoRAs, to another device or dtype, and return it.

        Raises ValueError if the device is not available, a LoRA is fused, or the model was loaded with `offload`.
        """
        if self.offload is not None:
            raise ValueError("the model was loaded with offload=True, which moves its modules; load it again instead")
        if self.adapters.fused:
            raise ValueError(f"{', '.join(self.adapters.loras)} is fused; call unfuse_lora() first")
        place = self.device if device is None else memory.usable_device(device)
        target = self.dtype if dtype is None else check_dtype(dtype)
        with self.usage.changing():
            for part in (self.text_encoder, self.unet, self.autoencoder, *self.adapters.loras.values()):
                part.to(place, target)
            if place.type == "cuda":
                memory.move(self.unet, place)
            self._folder_loras.clear()
        return self

    def merge(
        self: StableDiffusion, other: StableDiffusion, weight: float = 0.5, base: StableDiffusion | None = None
    ) -> None:
        """Mix the text encoder and the UNet with those of another model of the same architecture, in place.

        Args:
            other: The other model.
            weight: Its share w: the result is (1 − w) · own + w · other or, with `base`, own + w · (other − base),
                which adds what the other model has learned since it was `base`.
            base: The model that the other one was fine-tuned from.

        Raises:
            ValueError: If the models differ in architecture, prediction type or vocabulary, or have LoRAs.
        """
        with self.usage.changing():
            merge(self, other, check_float("weight", weight, hint=", such as 0.5"), base)

    def load_lora(
        self: StableDiffusion, path: str | PathLike[str], name: str | None = None, weight: Weight = 1.0
    ) -> str:
        """Load a LoRA, LoHa, LoKr or DoRA in addition to those already loaded, and return its name.

        Words that are bundled with it can be used in prompts, also after it is unloaded.

        Args:
            path: A .safetensors, .bin or .pt file in diffusers, peft or kohya format, or a folder containing one.
            name: A unique name, by default the file's stem or, if that is taken, folder/stem, and so on.
            weight: The factor to scale the updates by, or one per part: {"unet": 0.8, "text_encoder": 0.5}. The update
                of a DoRA is scaled as a whole, as in the web UI.

        Raises:
            CheckpointError: If the file does not fit the model, or is of another kind.
            ValueError: If the name is already in use, or the file is loaded already and has no name of its own.
        """
        file = check_path("path", path)
        loaded = self.adapters.loras
        if name is None:
            again = file.resolve() in [self._lora_files.get(each) for each in loaded]
            name = file.stem if again else default_name(file, loaded)
        parts = {"unet": self.unet, "text_encoder": self.text_encoder}
        lora, words = read_lora(path, parts), read_bundled_words(path)
        with self.usage.changing():
            self.adapters.add(name, lora, layers_of(parts), weight)
            self._lora_files = {**self._lora_files, name: file.resolve()}
            for word, vectors in words.items():
                try:
                    self.tokenizer = add_word(self.tokenizer, self.text_encoder, word, vectors)
                except ValueError as error:
                    warnings.warn(f"the word {word!r} bundled with {path} is not used: {error}", stacklevel=2)
        return name

    def lora_path(self: StableDiffusion, name: str) -> Path | None:
        """Return the file of a LoRA that is loaded, or that a prompt has named; None if it is unknown."""
        named = [path for path in self._folder_loras if path.stem == name.rpartition("/")[2]]
        return self._lora_files.get(name, named[-1] if named else None)

    def find_loras(self: StableDiffusion, names: Iterable[str]) -> dict[str, LoRA]:
        """Return the LoRAs that a prompt names: loaded ones, or those in `lora_folder` and its subfolders.

        Raises ValueError if there is no such LoRA or the model is compiled, and CheckpointError if it does not fit.
        """
        found = {name: self.adapters.loras[name] for name in names if name in self.adapters.loras}
        if (found and self.adapters.fused) or (names and self._compile_options is not None):
            raise ValueError("a prompt can name LoRAs only if the model is not compiled and none of them is fused")
        for name in names:
            if name in found:
                continue
            if self.lora_folder is None:
                raise ValueError(
                    f"the prompt names the LoRA {name!r}; load it, or pass its folder as lora_folder or --lora-folder"
                )
            path = self._find_file(check_path("lora_folder", self.lora_folder), name)
            if path not in self._folder_loras:
                parts = {"unet": self.unet, "text_encoder": self.text_encoder}
                self._folder_loras[path] = read_lora(path, parts)
            found[name] = self._folder_loras[path]
        return found

    @staticmethod
    def _find_file(folder: Path, name: str) -> Path:
        """Return the only LoRA of this name, or folder/name, in a folder and its subfolders."""
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".pt", ".bin")]
        names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in files if path.is_file()}
        fitting = [path for path, each in names.items() if f"/{each}".endswith(f"/{name}")]
        fitting = [path for path in fitting if names[path] == name] or fitting
        if not fitting:
            known = ", ".join(dict.fromkeys(path.stem for path in names)) or "none"
            raise ValueError(f"the prompt names the LoRA {name!r}, which is not in {folder}: {known}")
        if len(fitting) > 1:
            several = ", ".join(path.relative_to(folder).as_posix() for path in fitting)
            raise ValueError(
                f"the prompt names the LoRA {name!r}, and {folder} has several: {several}; name its folder, as in "
                "<lora:folder/name:1>, or rename a file"
            )
        return fitting[0]

    def set_adapters(self: StableDiffusion, weights: Mapping[str, Weight]) -> None:
        """Set the weights of the named LoRAs, each a number or one per part, and disable all others.

        Raises ValueError for an unknown name or part.
        """
        with self.usage.changing():
            self.adapters.set_weights(weights)

    def fuse_lora(self: StableDiffusion) -> None:
        """Merge the loaded LoRAs into the weights, so that inference has no overhead; `unfuse_lora` reverts this."""
        with self.usage.changing():
            self.adapters.fuse()

    def unfuse_lora(self: StableDiffusion) -> None:
        """Restore the exact weights from before `fuse_lora`; the LoRAs stay loaded."""
        with self.usage.changing():
            self.adapters.unfuse()

    def unload_lora(self: StableDiffusion, name: str | None = None) -> None:
        """Remove one LoRA, or all of them, fused or not, and restore the original weights."""
        with self.usage.changing():
            self.adapters.unload(name)

    def load_textual_inversion(self: StableDiffusion, path: str | PathLike[str], token: str | None = None) -> str:
        """Load a textual inversion and return its token, which prompts may then contain.

        Raises CheckpointError for an invalid file, and ValueError if the token exists or the embedding does not fit.
        """
        word, vectors = read_textual_inversion(path, token)
        with self.usage.changing():
            self.tokenizer = add_word(self.tokenizer, self.text_encoder, word, vectors)
        return word

    def compile(self: StableDiffusion, **options: Any) -> None:
        """Compile the UNet and the decoder with `torch.compile`, one graph each.

        Compilation runs again for every new image size and batch size, and takes a minute or more; the CPU backend
        needs a C++ compiler. Calls whose attention is recorded run in eager mode.

        Args:
            options: Arguments for `torch.compile`, such as `mode="reduce-overhead"`.
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        with self.usage.changing():
            for part in (self.unet, self.autoencoder.decoder):
                part.compile(**options)
            self._compile_options = options
