"""Adapting a finished model to a few pictures on a CPU, in minutes: LoRA and textual inversion.

Nothing of the model itself is trained. The pictures lie in a folder as Hugging Face's `imagefolder` has it: beside them
`metadata.jsonl`, where each line names a picture and its caption, {"file_name": "00.webp", "text": "a unicorn"}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from minisd.features.adapters import layers_of
from minisd.features.prompts import TOKENS_PER_CHUNK, check_length, read
from minisd.features.textual_inversion import TABLE, add_token, add_word
from minisd.features.validate import check_inside, check_int, check_strings
from minisd.images import from_pil, grid
from minisd.io.adapter_files import INVERSION_FILES, LORA_FILES, save_lora
from minisd.io.atomic import save_atomically
from minisd.io.configs import parse_json
from minisd.io.pictures import read_picture
from minisd.lora import LoRA, LowRank
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.training.loop import Shuffled, channels_last, generator

EXAMPLES = Path(__file__).parent.parent / "assets" / "examples"
LAYERS = {"attention": r"unet\..*\.to_(q|k|v|out\.0)", "all": r"unet\..*"}


def read_examples(folder: Path, side: int) -> tuple[Tensor, list[str]]:
    """The pictures of a folder, scaled and cropped to squares (n, 3, side, side) in [-1, 1], and their captions.

    Raises FileNotFoundError and ValueError, which name what is missing or wrong.
    """
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(f'{listing} is missing; write a line {{"file_name": …, "text": …}} for each picture')
    images, captions = [], []
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            item = parse_json(line)
            path, (text,) = check_inside(folder, item["file_name"]), check_strings("text", item["text"])
            check_length(text)
            picture = read_picture(path, side, side)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{listing}, line {number}: expected a picture and its text ({type(error).__name__}: {error})"
            ) from error
        images.append(from_pil(picture))
        captions.append(text)
    if not images:
        raise ValueError(f"{listing} names no picture; one is enough to begin with, twenty are good")
    return torch.cat(images), captions


class Adapting:
    """What both ways of adapting share: the frozen model predicts the noise in the pictures, under their captions.

    model: what is trained. prompts: for the sheet, by default some of the captions.
    """

    model: nn.Module

    def __init__(self, sd: StableDiffusion, folder: Path, seed: int = 0, prompts: Sequence[str] = ()) -> None:
        side = sd.unet.config.sample_size * sd.autoencoder.config.downscale
        images, self.captions = read_examples(folder, side)
        self.latents = torch.cat([sd.encode_image(image) for image in images.split(8)]).clone()
        self.sd, self.seed = sd, seed
        for prompt in prompts:  # a sheet that cannot be drawn would end the training with an error
            check_strings("prompt", prompt)
            read(prompt, sd.tokenizer)
        self.prompts = list(prompts) or self.captions[:: max(len(self.captions) // 4, 1)][:4]
        self.order = Shuffled(len(self.captions), seed)
        channels_last(sd.unet)
        torch.manual_seed(seed)

    def context(self, captions: list[str]) -> Tensor:
        """What the text encoder says of n captions, (n, 77, width), with gradients to what is trained."""
        raise NotImplementedError

    def adapted(self) -> tuple[StableDiffusion, list[str]]:
        """The model as it is adapted by now, and the prompts as it takes them."""
        raise NotImplementedError

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng, count, schedule = generator(self.seed, step), len(positions), self.sd.schedule
        # one timestep from each of `count` equal slices of the schedule: every step sees all noise levels
        slices = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count
        timesteps = (slices * self.sd.config.schedule.num_train_timesteps).long()[local].to(self.sd.device)
        noise = torch.randn(count, *self.latents.shape[1:], generator=rng)[local].to(self.sd.device)
        indices = self.order(positions)[local]
        latents = self.latents[indices]
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = self.sd.unet(noisy, timesteps, self.context([self.captions[index] for index in indices]))
        # L = ‖prediction − target‖², the target being ε or v, as the model was trained
        return (prediction - schedule.target(latents, noise, timesteps)).square().mean(), {}

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """The prompts drawn with the same seed without the adapter, above, and with it, below."""
        choices: dict[str, Any] = {"seed": [0] * len(self.prompts), "progress": False}
        sd, prompts = self.adapted()
        after = sd(prompts, **choices)
        return grid([*self.before(choices), *after], columns=len(self.prompts), captions=[*self.prompts, *prompts])

    def before(self, choices: dict[str, Any]) -> list[Image.Image]:
        """The prompts, drawn by the model as it was."""
        return self.sd(self.prompts, **choices)  # type: ignore[no-any-return]


class LoRATask(Adapting):
    """Trains low-rank updates of the UNet's layers.

    layers: "attention" for the projections of attention, "all" for the other linear layers and convolutions as well.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        folder: Path,
        rank: int = 8,
        layers: str = "all",
        seed: int = 0,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__(sd, folder, seed, prompts)
        found = {
            name: layer for name, layer in layers_of({"unet": sd.unet}).items() if re.fullmatch(LAYERS[layers], name)
        }
        check_int("rank", rank, 1, max(min(len(layer.weight), layer.weight[0].numel()) for layer in found.values()))
        self.model: LoRA = LoRA({name: LowRank(layer, rank) for name, layer in found.items()}).to(sd.device)
        self.model.attach(found)
        with torch.no_grad():
            self.contexts = {text: sd.text_encoder(sd.tokenizer([text]).to(sd.device)) for text in set(self.captions)}

    def context(self, captions: list[str]) -> Tensor:
        return torch.cat([self.contexts[caption] for caption in captions])

    def adapted(self) -> tuple[StableDiffusion, list[str]]:
        return self.sd, self.prompts

    def before(self, choices: dict[str, Any]) -> list[Image.Image]:
        self.model.weight = 0.0
        try:
            return super().before(choices)
        finally:
            self.model.weight = 1.0

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors, which diffusers loads as well."""
        save_lora(self.model, folder / f"{LORA_FILES[0]}.safetensors")


class Word(nn.Module):
    """The vectors (n, width) of a new word."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)


class InversionTask(Adapting):
    """Trains the vectors of a new word, and nothing else: what is drawn, the model could draw before.

    token: the new word, which takes the place of `word` in the captions. initial: a word the model knows, from whose
    vector the new ones begin. vectors: how many there are. Raises ValueError when the captions lack the word, or the
    model does not know the initial one.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        folder: Path,
        token: str,
        word: str,
        initial: str,
        vectors: int = 1,
        seed: int = 0,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__(sd, folder, seed, prompts)
        self.token, self.word = token, word
        check_int("vectors", vectors, 1, TOKENS_PER_CHUNK)
        if not word.strip():
            raise ValueError(f"word={word!r}; expected a word of the captions, for which {token!r} is to stand")
        if lacking := [caption for caption in self.captions if self.renamed(caption) == caption]:
            raise ValueError(f"the caption {lacking[0]!r} lacks the word {word!r}, for which {token!r} is to stand")
        if sd.unknown_words(initial) or not sd.tokenizer.encode(initial):
            raise ValueError(f"the model does not know {initial!r}; begin with a word that it has learned")
        self.tokenizer = add_token(sd.tokenizer, token, vectors)
        for prompt in self.prompts:
            read(self.renamed(prompt), self.tokenizer)
        ids = sd.tokenizer.encode(initial)
        self.table = sd.text_encoder.token_embedding.weight.detach()
        self.model: Word = Word(self.table[[ids[i % len(ids)] for i in range(vectors)]].clone())

    def renamed(self, caption: str) -> str:
        """The caption with the new word in the place of the old one."""
        return re.sub(rf"\b{re.escape(self.word)}\b", lambda _: self.token, caption, flags=re.IGNORECASE)

    def context(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer([self.renamed(caption) for caption in captions]).to(self.table.device)
        # the frozen rows and the trained ones as one table, for this call
        weights = {TABLE: torch.cat([self.table, self.model.vectors])}
        return functional_call(self.sd.text_encoder, weights, (ids,))  # type: ignore[no-any-return]

    def adapted(self) -> tuple[StableDiffusion, list[str]]:
        sd, text_encoder = self.sd, deepcopy(self.sd.text_encoder)
        tokenizer = add_word(sd.tokenizer, text_encoder, self.token, self.model.vectors.detach())
        grown = StableDiffusion(sd.config, tokenizer, text_encoder, sd.unet, sd.autoencoder, sd.defaults)
        return grown, [self.renamed(prompt) for prompt in self.prompts]

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write learned_embeds.safetensors, which diffusers loads as well."""
        weights = {self.token: self.model.vectors.detach().cpu().contiguous()}
        save_atomically(lambda path: save_file(weights, path), folder / f"{INVERSION_FILES[0]}.safetensors")
