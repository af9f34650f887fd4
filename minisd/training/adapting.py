"""Adapting a finished model to a few pictures: LoRA and textual inversion, which train nothing of the model itself.

`folder_data` says how the pictures and their captions lie in a folder.
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
from minisd.features.distributed import log, rank_zero_first
from minisd.features.prompts import TOKENS_PER_CHUNK, read
from minisd.features.textual_inversion import TABLE, add_token, add_word
from minisd.features.validate import check_float, check_int, check_strings
from minisd.images import grid
from minisd.io.adapter_files import INVERSION_FILES, LORA_FILES, lora_weights
from minisd.io.atomic import save_atomically
from minisd.lora import LoRA, LowRank
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.training.checkpointing import checkpoint_blocks
from minisd.training.folder_data import Example, Pictures, list_examples
from minisd.training.latents import Latents, draw_class_pictures
from minisd.training.loop import channels_last, generator
from minisd.training.lora_files import kohya_weights, save_with_facts, training_facts
from minisd.training.objectives import Batch, tuning_loss, with_offset
from minisd.training.tuning_options import LoRAOptions, Tuning

EXAMPLES = Path(__file__).parent.parent / "assets" / "examples"
TEXT_LAYERS = r"text_encoder\..*\."
LAYERS = {
    "attention": rf"unet\..*\.to_(q|k|v|out\.0)|{TEXT_LAYERS}(q|k|v|out)_proj",
    "all": rf"unet\..*|{TEXT_LAYERS}((q|k|v|out)_proj|fc[12])",
}


def read_examples(folder: Path, side: int) -> tuple[Tensor, list[str]]:
    """The pictures of a folder, scaled and cropped to squares (n, 3, side, side) in [-1, 1], and their captions.

    Raises FileNotFoundError and ValueError, which name what is missing or wrong.
    """
    pictures = Pictures(list_examples(folder), side, 1)
    return torch.cat([pictures.image(index) for index in range(len(pictures.sizes))]), pictures.texts


class Adapting:
    """What all ways of tuning a model share: it predicts the noise in the pictures, under their captions.

    model: what is trained. prompts: for the sheet, by default some of the captions. idle: parts of the model that are
    not needed between sheets, and may rest on the CPU.
    """

    model: nn.Module

    def __init__(
        self,
        sd: StableDiffusion,
        folder: Path,
        seed: int = 0,
        prompts: Sequence[str] = (),
        tuning: Tuning | None = None,
    ) -> None:
        self.sd, self.seed, self.tuning = sd, seed, tuning or Tuning()
        self.checkpointing = bool(self.tuning.checkpointing)
        self.side = self.tuning.side or sd.unet.config.sample_size * sd.downscale
        self.data = self._latents(list_examples(folder, self.tuning.caption), seed)
        self.captions, self.order = self.data.pictures.texts, self.data.order
        self.prior: Latents | None = None
        if self.tuning.class_pictures is not None and self.tuning.class_prompt is not None:
            place, prompt = self.tuning.class_pictures, self.tuning.class_prompt
            rank_zero_first(lambda: draw_class_pictures(sd, place, prompt, self.tuning.class_count, self.side))
            self.prior = self._latents(list_examples(place, prompt), seed + 1)
        self._warn_of_long_captions()
        for prompt in prompts:  # a sheet that cannot be drawn would end the training with an error
            check_strings("prompt", prompt)
            read(prompt, sd.tokenizer)
        self.prompts = list(prompts) or self.captions[:: max(len(self.captions) // 4, 1)][:4]
        self.contexts: dict[str, Tensor] = {}
        self.idle: list[nn.Module] = [sd.autoencoder] if self.data.cached else []
        for part in (sd.unet, sd.text_encoder, sd.autoencoder):
            part.requires_grad_(False)
        channels_last(sd.unet)
        if self.checkpointing:
            checkpoint_blocks(sd.unet)
        torch.manual_seed(seed)

    def _latents(self, examples: list[Example], seed: int) -> Latents:
        tuning = self.tuning
        pictures = Pictures(examples, self.side, self.sd.downscale, tuning.buckets, tuning.crop)
        return Latents(self.sd, pictures, tuning.flip, seed)

    def _warn_of_long_captions(self) -> None:
        cut = [text for text in self.captions if self.sd.tokenizer.truncated(text)]
        if cut:
            log(
                f"{len(cut)} captions have more than 75 tokens; the rest of them is not seen, such as in {cut[0]!r:.80}"
            )

    @property
    def latents(self) -> Tensor:
        """The cached latents (n, 4, h, w) of pictures of one size."""
        return torch.cat([sides[0] for sides in self.data.cached])

    def context(self, captions: list[str]) -> Tensor:
        """What the text encoder says of n captions, (n, 77, width), with gradients to what is trained."""
        if self.contexts:
            return torch.cat([self.contexts[caption] for caption in captions]).to(self.sd.device)
        return self.sd.text_encoder(self.sd.tokenizer(captions).to(self.sd.device))  # type: ignore[no-any-return]

    def _prepare_text_encoder(self, trained: bool) -> None:
        """Checkpoint a text encoder that is trained; of one that is not, keep what it says of the captions."""
        sd = self.sd
        if trained:
            if self.checkpointing:
                checkpoint_blocks(sd.text_encoder)
            return
        texts = {*self.captions, "", *(self.prior.pictures.texts if self.prior else ())}
        with torch.no_grad():
            self.contexts = {text: sd.text_encoder(sd.tokenizer([text]).to(sd.device)).cpu() for text in sorted(texts)}
        self.idle.append(sd.text_encoder)

    def adapted(self) -> tuple[StableDiffusion, list[str]]:
        """The model as it is adapted by now, and the prompts as it takes them."""
        return self.sd, self.prompts

    def batch(self, step: int, positions: range, local: slice) -> Batch:
        """Draw this process's share of a batch: a function of the seed and the step alone."""
        count, tuning = len(positions), self.tuning
        indices = self.order(positions)
        latents = self.data(indices, local, generator(self.seed, step, 1))
        captions = [self.captions[index] for index in indices[local]]
        noise, timesteps = self._noise(generator(self.seed, step), count, latents, local)
        dropped = torch.rand(count, generator=generator(self.seed, step, 2)) < tuning.caption_dropout
        captions = ["" if drop else text for text, drop in zip(captions, dropped[local].tolist(), strict=True)]
        if self.prior is None:
            return Batch(latents, noise, timesteps, captions)
        indices = self.prior.order(positions)
        known = self.prior(indices, local, generator(self.seed, step, 3))
        if known.shape != latents.shape:
            raise ValueError("prior preservation takes pictures of one size; leave out buckets")
        more_noise, more_timesteps = self._noise(generator(self.seed, step, 4), count, known, local)
        return Batch(
            torch.cat([latents, known]),
            torch.cat([noise, more_noise]),
            torch.cat([timesteps, more_timesteps]),
            captions + [self.prior.pictures.texts[index] for index in indices[local]],
            prior=len(known),
        )

    def _noise(self, rng: torch.Generator, count: int, latents: Tensor, local: slice) -> tuple[Tensor, Tensor]:
        # one timestep from each of `count` equal slices of the schedule: every step sees all noise levels
        slices = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count
        timesteps = (slices * self.sd.config.schedule.num_train_timesteps).long()[local]
        noise = torch.randn(count, *latents.shape[1:], generator=rng)
        noise = with_offset(noise, self.tuning.noise_offset, rng)[local]
        return noise.to(latents.device), timesteps.to(latents.device)

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        return self.loss_of(self.batch(step, positions, local))

    def loss_of(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch and, with class pictures, both parts of it."""
        noisy = self.sd.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        prediction = self.sd.unet(noisy, batch.timesteps, self.context(batch.captions))
        loss, prior = tuning_loss(prediction, batch, self.sd.schedule, self.tuning)
        if self.prior is None:
            return loss, {}
        details = {"pictures": float(loss.detach()), "prior": float(prior.detach())}
        return loss + self.tuning.prior_weight * prior, details

    def rest(self, dtype: torch.dtype = torch.float32) -> None:
        """Keep a frozen model in a dtype, and move what is idle to the CPU, so that both take less memory.

        If the UNet is trained, all stays in float32: the parts of a model that draws have one dtype.
        """
        parts: list[nn.Module] = [self.sd.unet, self.sd.text_encoder, self.sd.autoencoder]
        if not any(parameter.requires_grad for parameter in self.sd.unet.parameters()):
            for part in parts:
                part.to(dtype)
        for part in self.idle:
            part.to("cpu")

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """The prompts drawn with the same seed without the adapter, above, and with it, below."""
        device = self.sd.device
        choices: dict[str, Any] = {"seed": [0] * len(self.prompts), "progress": False}
        choices |= {"width": self.side, "height": self.side}
        for part in self.idle:
            part.to(device)
        # an adapter in float32 beside a frozen model in half precision
        with torch.autocast(device.type, self.sd.dtype, enabled=self.sd.dtype != torch.float32):
            sd, prompts = self.adapted()
            before, after = self.before(choices), sd(prompts, **choices)
        for part in self.idle:
            part.to("cpu")
        captions = [*self.prompts, *prompts] if before else prompts
        return grid([*before, *after], columns=len(prompts), captions=captions)

    def before(self, choices: dict[str, Any]) -> list[Image.Image]:
        """The prompts, drawn by the model as it was."""
        return self.sd(self.prompts, **choices)  # type: ignore[no-any-return]


class LoRATask(Adapting):
    """Trains low-rank updates of the UNet's layers, and of the text encoder's if wanted.

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
        options: LoRAOptions | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__(sd, folder, seed, prompts, tuning)
        self.options, self.facts = options or LoRAOptions(), dict[str, object]()  # facts: more for the file's metadata
        alpha, text = self.options.alpha, self.options.text_encoder
        if alpha is not None and not check_float("alpha", alpha, 0) > 0:
            raise ValueError("alpha=0 would leave the model as it is; expected a positive number, such as the rank")
        parts = {"unet": sd.unet, "text_encoder": sd.text_encoder} if text else {"unet": sd.unet}
        found = {name: layer for name, layer in layers_of(parts).items() if re.fullmatch(LAYERS[layers], name)}
        check_int("rank", rank, 1, max(min(len(layer.weight), layer.weight[0].numel()) for layer in found.values()))
        self.model: LoRA = LoRA({name: LowRank(layer, rank, alpha) for name, layer in found.items()}).to(sd.device)
        self.model.attach(found)
        self.rate_factors = {
            parameter: self.options.text_factor
            for name, update in self.model.items()
            for parameter in update.parameters()
            if name.startswith("text_encoder.")
        }
        self._prepare_text_encoder(text)

    def before(self, choices: dict[str, Any]) -> list[Image.Image]:
        self.model.weight = 0.0
        try:
            return super().before(choices)
        finally:
            self.model.weight = 1.0

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors, which diffusers loads as well, or a file in kohya's layout."""
        facts = {**self.facts, **training_facts(self)}
        if self.options.layout == "kohya":
            name = folder.resolve().parent.name or "lora"
            save_with_facts(kohya_weights(self.model), folder / f"{name}.safetensors", facts)
        else:
            save_with_facts(lora_weights(self.model), folder / f"{LORA_FILES[0]}.safetensors", facts)


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
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__(sd, folder, seed, prompts, tuning)
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
        self._prepare_text_encoder(True)
        ids = sd.tokenizer.encode(initial)
        self.table = sd.text_encoder.token_embedding.weight.detach()
        self.model: Word = Word(self.table[[ids[i % len(ids)] for i in range(vectors)]].clone())

    def renamed(self, caption: str) -> str:
        """The caption with the new word in the place of the old one; class pictures keep theirs."""
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
