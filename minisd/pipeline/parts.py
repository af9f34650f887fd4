"""The parts of a model: loaded, on a device, and called one at a time; `pipeline.py` puts them together."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from os import PathLike
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.autoencoder import Autoencoder
from minisd.config import ModelConfig
from minisd.features import prompts as prompting
from minisd.features.adapters import Adapters
from minisd.features.textual_inversion import add_word
from minisd.features.tiling import tiled
from minisd.features.validate import check_path
from minisd.guidance import Guidance
from minisd.images import from_pil, to_pil
from minisd.io import checkpoint
from minisd.io.adapter_files import read_lora, read_textual_inversion
from minisd.io.diffusers_folder import Defaults
from minisd.lora import layers_of
from minisd.pipeline.checks import (
    about_unit,
    finite_input,
    floats,
    free_memory,
    is_out_of_memory,
    precision,
    real,
    shaped,
    texts,
    whole,
)
from minisd.preview import linear_preview
from minisd.schedule import Schedule
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

SAVING_MEMORY = (
    "draw smaller pictures or fewer at a time, or load the model with tile=True, dtype=torch.float16 or offload=True"
)


class Parts:
    """Tokenizer, text encoder, UNet, autoencoder and noise schedule of one model, and what each of them does.

    offload: the device on which a part is only while it computes. tile: encode and decode large pictures in tiles.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        unet: UNet,
        autoencoder: Autoencoder,
        defaults: Defaults | None = None,
        offload: torch.device | None = None,
        tile: bool = False,
    ) -> None:
        self.config, self.defaults = config, defaults or Defaults()
        self.tokenizer, self.text_encoder, self.unet, self.autoencoder = tokenizer, text_encoder, unet, autoencoder
        self.schedule = Schedule(config.schedule)
        self.adapters = Adapters()
        self.offload, self.tile = offload, unet.config.sample_size * 3 // 2 if tile else None

    @property
    def device(self) -> torch.device:
        """Where the parts compute; with `offload` each of them is there only while it does."""
        return self.offload or self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.unet.conv_in.weight.dtype

    @contextmanager
    def _using(self, part: nn.Module) -> Iterator[None]:
        """Within this block a part is on the device. With `offload` it was not, and is not afterwards.

        Where memory runs out, whatever torch calls it becomes a MemoryError that says what to do.
        """
        home = None
        try:
            if self.offload is not None and next(part.parameters()).device != self.offload:
                home = part.state_dict()
                move(part, self.offload)
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or not is_out_of_memory(error):
                raise
            raise MemoryError(f"out of memory in the {type(part).__name__}; {SAVING_MEMORY} ({error})") from error
        finally:
            if home is not None:
                part.load_state_dict(home, assign=True)

    def _check_memory(self, count: int, height: int, width: int, encoding: bool = False) -> None:
        """Raise ValueError where count pictures of so many pixels cannot fit into what the device has left.

        What is counted is the least that is needed, so that nothing is refused which would have fitted.
        """
        widths, cell = self.autoencoder.config.block_out_channels, self.autoencoder.config.downscale**2
        # the UNet keeps two maps or more at the size of latents; the autoencoder three at full size: what a residual
        # block was given, its norm and its activation
        numbers = 2 * self.config.unet.block_out_channels[0] / cell
        if self.tile is None:
            numbers = max(numbers, 3 * widths[0 if encoding else min(1, len(widths) - 1)])
        needed, free = count * height * width * numbers * self.dtype.itemsize, free_memory(self.device)
        if free is not None and needed > free:
            what = f"a picture of {width}×{height}" if count == 1 else f"{count} pictures of {width}×{height} at a time"
            raise ValueError(f"{what} would take {needed / 1e9:,.1f} GB, {free / 1e9:.1f} GB are free; {SAVING_MEMORY}")

    def _checked(self, x: Tensor, part: str) -> Tensor:
        """What UNet or text encoder returned; FloatingPointError for NaN, which may be a LoRA's fault."""
        acting = [name for name, weight in self.adapters.weights.items() if weight]
        return finite(x, f"{part} with LoRA {', '.join(acting)}" if acting else part)

    @torch.inference_mode()
    def encode_text(self, prompts: str | Sequence[str], clip_skip: int = 1) -> Tensor:
        """Prompts, with weights in brackets, to context (n, 77·k, width); see `prompts.py`.

        A prompt of more than 75 tokens is read in k chunks, each by itself, and a warning says so. Prompts of different
        k are brought to one length. Raises ValueError for weights that are none and for prompts that are too long.
        """
        prompts = texts("prompts", prompts)
        whole("clip_skip", clip_skip, 1, self.config.text_encoder.num_hidden_layers)
        read = [prompting.read(prompt, self.tokenizer) for prompt in prompts]
        for chunks in read:
            if len(chunks) > 1:
                notice = f"it is read in {len(chunks)} chunks of at most {prompting.ROOM}"
                warnings.warn(f"the prompt has {sum(map(len, chunks))} tokens: {notice}", stacklevel=2)
        ids, weights = prompting.rows([*chain(*read), []], self.tokenizer)
        weighted = any(weight != 1 for chunk in chain(*read) for _, weight in chunk)
        with self._using(self.text_encoder):
            # the last row is the empty prompt, which only weights need
            context = self.text_encoder(ids[: len(ids) if weighted else -1].to(self.device), clip_skip)
        if weighted:
            context = prompting.weigh(context, context[-1], weights)[:-1]
        self._checked(context, "text encoder")
        if len(context) == len(read):
            return context
        long = [some.flatten(0, 1)[None] for some in context.split([len(chunks) for chunks in read])]
        return torch.cat(prompting.common_length(*long))

    @torch.inference_mode()
    def encode_image(self, image: Image.Image | Tensor) -> Tensor:
        """A PIL picture, or images (n, 3, h, w) in [-1, 1], to latents (n, 4, h/8, w/8): the scaled mean.

        Images may leave the range a little; beyond [-2, 2] they are taken for something else (pixels from 0 to 255,
        perhaps), which is a ValueError, as are sides that are not multiples of 8.
        """
        images = self._read_image(image)
        self._check_memory(len(images), images.shape[-2], images.shape[-1], encoding=True)
        with self._using(self.autoencoder):
            mean = self._one_by_one(lambda x: self.autoencoder.encode(x).mean, images.to(self.device, self.dtype))
        return finite(mean * self.autoencoder.config.scaling_factor, "autoencoder's encoder")

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (n, 4, h/8, w/8), scaled, to PIL pictures.

        Scaled ones have a spread of about 1, as those of `encode_image` and `denoise` do. Any finite numbers are
        decoded, but what is far from that spread gives no sensible picture. Errors as for `decode_to_tensor`.
        """
        return to_pil(self.decode_to_tensor(latents))

    @torch.inference_mode()
    def decode_to_tensor(self, latents: Tensor) -> Tensor:
        """Latents (n, 4, h/8, w/8), scaled, to images (n, 3, h, w), about [-1, 1] and not clipped.

        In float16 some decoders overflow; then a float32 copy decodes, and a warning says so. Raises TypeError or
        ValueError for what is no such tensor, and FloatingPointError for NaN, in the latents or in what comes of them.
        """
        shaped("latents", latents, "n", self.autoencoder.config.latent_channels, "h", "w")
        factor = self.autoencoder.config.downscale
        self._check_memory(len(latents), factor * latents.shape[-2], factor * latents.shape[-1])
        finite_input("latents", latents)
        unscaled = latents.to(self.device, self.dtype) / self.autoencoder.config.scaling_factor
        with self._using(self.autoencoder):
            try:
                return finite(self._one_by_one(self.autoencoder.decode, unscaled), "autoencoder's decoder")
            except FloatingPointError:
                if self.dtype != torch.float16 or not bool(torch.isfinite(latents).all()):
                    raise
            warnings.warn("the autoencoder overflows in float16; decoding again in float32", stacklevel=2)
            again = self._one_by_one(deepcopy(self.autoencoder).float().decode, unscaled.float())
        return finite(again, "autoencoder's decoder")

    def _read_image(self, image: Image.Image | Tensor) -> Tensor:
        """A PIL picture, or images as they are, as images (n, 3, h, w); see `encode_image` for what is refused."""
        if not isinstance(image, Tensor):
            return from_pil(image)
        shaped("image", image, "n", self.autoencoder.config.in_channels, "h", "w")
        self._check_memory(len(image), image.shape[-2], image.shape[-1], encoding=True)
        return about_unit("image", finite_input("image", image))

    def _one_by_one(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the encoder or the decoder on the whole batch; with `tile` one picture, and one tile, at a time."""
        if self.tile is None:
            return function(x)
        factor = self.autoencoder.config.downscale
        tile, zoom = (self.tile, factor) if x.shape[1] != 3 else (self.tile * factor, 1 / factor)
        return torch.cat([tiled(function, one, tile, tile // 2, zoom) for one in x.split(1)]).to(x.dtype)

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Latents (n, 4, h/8, w/8), scaled, to PIL pictures of their own small size, in no time: see `preview.py`."""
        floats("latents", latents, "n", self.autoencoder.config.latent_channels, "h", "w")
        return to_pil(linear_preview(latents, self.defaults.preview))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of the prompt with a token that the text encoder never learned: its embedding is all zeros."""
        (prompt,) = texts("prompt", prompt)
        prompt = " ".join(text for text, _ in prompting.parse(prompt))
        for word in self.tokenizer.added:
            prompt = re.sub(re.escape(word), " ", prompt, flags=re.IGNORECASE)
        table = self.text_encoder.token_embedding.weight
        words = []
        for word in dict.fromkeys(re.findall(r"[\w'-]+", prompt)):
            ids = self.tokenizer.encode(word)
            if ids and not bool(table[torch.tensor(ids, device=table.device)].any(dim=1).all()):
                words.append(word)
        return words

    def predict(self, latents: Tensor, t: float, context: Tensor, guidance: Guidance | float = 1.0) -> Tensor:
        """The UNet's prediction, guided when the context (2n, 77, d) holds negative and positive prompts.

        latents (n, 4, h/8, w/8), or with 9 channels for an inpainting UNet -> prediction (n, 4, h/8, w/8), float32.
        guidance: a scale, or more that `Guidance` can say. Raises FloatingPointError, naming the UNet, for NaN.
        """
        shaped("latents", latents, "n", self.unet.config.in_channels, "h", "w")
        shaped("context", context, "n", "tokens", self.unet.config.cross_attention_dim)
        if len(context) not in (len(latents), 2 * len(latents)):
            raise ValueError(f"{len(context)} rows of context for {len(latents)} latents; expected as many, or twice")
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        timestep = torch.tensor(real("t", t), device=self.device, dtype=torch.float32)
        both = len(context) == 2 * len(latents)
        with self._using(self.unet):
            return self._predict(latents, timestep, context.to(self.dtype), guidance if both else None)[0]

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: Guidance | None,
        *reuse: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The same, with what was checked, and (prediction, feature) returned.

        context: for twice the latents where there is guidance. reuse: layers and feature, as `UNet.forward` takes them;
        without, there is no feature.
        """
        x = torch.cat([latents, latents]) if guidance else latents
        output = self.unet(x.to(self.dtype), timestep, context, *reuse)
        prediction, feature = output if reuse else (output, None)
        try:
            # a copy, since a compiled UNet may use the memory of its answer for the next one
            prediction = self._checked(prediction, "UNet").to(torch.float32, copy=True)
        except FloatingPointError:  # whose fault is it?
            finite_input("latents", latents)
            finite_input("context", context)
            raise
        return guidance.combine(*prediction.chunk(2)) if guidance else prediction, feature

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        tile: bool = False,
        **choices: Any,
    ) -> Self:
        """Load a model: nothing for the shipped tiny one, a hub id, a diffusers folder, a .safetensors or .ckpt file.

        device: by default cuda, mps or cpu, the first that is there. dtype: by default float16 on cuda, else float32.
        offload: keep the parts in main memory, each on the device only while it computes. In float16 the largest, the
        UNet, takes 1.7 GB there in place of 2.1 GB for all three. Slower, and threads may not share the result.
        tile: encode and decode one picture at a time, and those of more than 1½ times the model's own size in tiles.
        Other choices (variant, prediction_type, revision …) go to `checkpoint.load`, which says what it raises. Raises
        ValueError for a device that this machine lacks or a dtype that weights cannot have, TypeError for what is none.
        """
        place = usable_device(device) if device is not None else best_device()
        usual = torch.float16 if place.type == "cuda" else torch.float32
        kind = precision(usual if dtype is None else dtype)
        loaded = checkpoint.load(source, device="cpu" if offload else place, dtype=kind, **choices)
        parts = loaded.tokenizer, loaded.text_encoder, loaded.unet, loaded.autoencoder
        if place.type == "cuda" and not offload:
            move(loaded.unet, place)
        return cls(loaded.config, *parts, loaded.defaults, offload=place if offload else None, tile=tile)

    def compile(self, **options: Any) -> None:
        """Let torch.compile translate the UNet and the decoder for this device, a graph each without a break.

        Every new size, and number of pictures, is translated when it first comes, which takes a minute or more; from
        then on it is faster, most of all on a GPU. options: of torch.compile, such as mode="reduce-overhead". On a CPU
        a C++ compiler is needed. While attention is recorded the plain code runs.
        """
        for part in (self.unet, self.autoencoder.decoder):
            part.compile(**{"fullgraph": True, "dynamic": False, **options})

    def save_pretrained(self, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a folder that diffusers, transformers and minisd load. dtype: by default the weights' own.

        Fused LoRAs are saved in the weights. Raises ValueError while there are others, or textual inversions, which
        such a folder cannot hold.
        """
        if self.adapters.loras and not self.adapters.fused:
            raise ValueError(f"{', '.join(self.adapters.loras)} is not fused; call fuse_lora() or unload_lora() first")
        if self.tokenizer.added:
            raise ValueError(f"a model folder cannot hold {', '.join(self.tokenizer.added)}; keep their own files")
        checkpoint.save(self, folder, None if dtype is None else precision(dtype))

    def load_lora(self, path: str | PathLike[str], name: str | None = None, weight: float = 1.0) -> str:
        """Load a LoRA beside those already there, acting with `weight`; return its name, by default the file's.

        path: a .safetensors, .bin or .pt file in the layouts of diffusers, peft or kohya, or a folder with one. Raises
        CheckpointError, naming keys and shapes, where it does not fit, and ValueError for a name that is taken.
        """
        name = check_path("path", path).stem if name is None else name
        parts = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.adapters.add(name, read_lora(path, parts), layers_of(parts), weight)
        return name

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Let the named LoRAs act with these weights, and the others not at all. ValueError for an unknown name."""
        self.adapters.set_weights(weights)

    def fuse_lora(self) -> None:
        """Add the loaded LoRAs to the weights, so that drawing costs nothing extra; `unfuse_lora` undoes it exactly."""
        self.adapters.fuse()

    def unfuse_lora(self) -> None:
        """Put back the weights as they were before `fuse_lora`, bit for bit; the LoRAs act beside them again."""
        self.adapters.unfuse()

    def unload_lora(self, name: str | None = None) -> None:
        """Remove one LoRA, or all of them, exactly, fused or not."""
        self.adapters.unload(name)

    def load_textual_inversion(self, path: str | PathLike[str], token: str | None = None) -> str:
        """Teach the text encoder a word, and return it. path: a file of diffusers or the web UI. token: another word.

        Raises CheckpointError for other files, ValueError for a word that is known already or vectors that do not fit.
        """
        word, vectors = read_textual_inversion(path, token)
        self.tokenizer = add_word(self.tokenizer, self.text_encoder, word, vectors)
        return word


def best_device() -> torch.device:
    """The fastest device of this machine: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name: str | torch.device) -> torch.device:
    """A device that computes on this machine. Raises ValueError for another, TypeError for what is no device."""
    if not isinstance(name, (str, torch.device)):
        raise TypeError(f'device={name!r}; expected a name, such as "cpu", or a torch.device')
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        best = best_device()
        raise ValueError(f"device {name} cannot be used on this machine; leave it out to take {best}") from error
    return device


def move(part: nn.Module, device: torch.device) -> None:
    """Put a part's weights on a GPU, those of the UNet's convolutions channels last, as tensor cores read them.

    The autoencoder stays as it is, see `blocks.in_order`.
    """
    formats = {4: torch.channels_last} if isinstance(part, UNet) else {}
    weights = {
        key: value.to(device, memory_format=formats.get(value.dim(), torch.preserve_format))
        for key, value in part.state_dict().items()
    }
    part.load_state_dict(weights, assign=True)


def finite(x: Tensor, part: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        advice = "load the model in float32" if x.dtype == torch.float16 else "check the checkpoint"
        raise FloatingPointError(f"the {part} returned NaN or infinity in {x.dtype}; {advice}")
    return x
