"""Training the tiny CLIP: a text tower and an image tower learn to agree on which caption belongs to which picture.

The text tower, frozen afterwards, is the text encoder of the tiny Stable Diffusion, as CLIP's is of the large one. The
image tower stays useful as a judge: how well does a drawn picture fit its prompt?
Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.distributed.nn.functional as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minisd.blocks import Downsample, ResBlock
from minisd.config import TextEncoderConfig
from minisd.features.distributed import world_size
from minisd.features.textual_inversion import TABLE
from minisd.io.atomic import save_atomically
from minisd.io.checkpoint import NoInit
from minisd.io.configs import read_config, to_dict
from minisd.io.diffusers_folder import load_text_encoder
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.training.captions import colors_exchanged, mirrored
from minisd.training.data import Scenes
from minisd.training.loop import Shuffled, channels_last, generator


@dataclass(frozen=True)
class ImageEncoderConfig:
    """The image tower: a strided first convolution, then residual levels, then one vector for the whole picture."""

    widths: tuple[int, ...] = (64, 128, 192)
    patch: int = 12
    groups: int = 16
    pooled: int = 4
    projection_dim: int = 128


class ImageEncoder(nn.Module):
    """Images (n, 3, 192, 192) in [-1, 1] to vectors (n, projection_dim), not normalised.

    The last feature map is averaged to `pooled` × `pooled` cells which are all read by one linear layer, so that left
    and right stay apart.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.widths, config.groups
        self.patch = nn.Conv2d(3, widths[0], config.patch, stride=config.patch)
        blocks: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                blocks.append(Downsample(widths[level - 1], padding=1))
            blocks.append(ResBlock(widths[max(level - 1, 0)], width, groups, 1e-5))
            blocks.append(ResBlock(width, width, groups, 1e-5))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(groups, widths[-1])
        self.projection = nn.Linear(widths[-1] * config.pooled**2, config.projection_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = F.silu(self.norm(self.blocks(self.patch(images))))
        return self.projection(F.adaptive_avg_pool2d(x, self.config.pooled).flatten(1))


class CLIP(nn.Module):
    """A text tower and an image tower that map captions and pictures to unit vectors in one space."""

    def __init__(self, text: TextEncoderConfig, image: ImageEncoderConfig, eos: int) -> None:
        super().__init__()
        self.eos = eos
        self.text_encoder = TextEncoder(text)
        self.text_projection = nn.Linear(text.hidden_size, image.projection_dim, bias=False)
        self.image_encoder = ImageEncoder(image)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids (n, tokens) to unit vectors (n, d): the state at the end-of-text token, projected."""
        states = self.text_encoder(ids)
        end = (ids == self.eos).int().argmax(dim=1)
        return F.normalize(self.text_projection(states[torch.arange(len(ids)), end]), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (n, 3, 192, 192) in [-1, 1] to unit vectors (n, d)."""
        return F.normalize(self.image_encoder(images), dim=-1)

    def save(self, folder: Path) -> None:
        """Write the image tower, the text projection and the temperature; the text tower is saved as text_encoder/."""
        keep = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("text_encoder.")}
        config = {
            "text": to_dict(self.text_encoder.config),
            "image": asdict(self.image_encoder.config),
            "eos": self.eos,
        }
        save_atomically(lambda path: save_file(keep, path), folder / "model.safetensors")
        save_atomically(
            lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"), folder / "config.json"
        )

    @classmethod
    def load(cls, folder: Path, text_encoder: TextEncoder) -> Self:
        """Read what `save` wrote, around the text encoder that was trained with it."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        image = ImageEncoderConfig(**config["image"] | {"widths": tuple(config["image"]["widths"])})
        with torch.device("meta"), NoInit():
            model = cls(read_config(TextEncoderConfig, config["text"]), image, config["eos"])
        model.text_encoder = text_encoder
        weights = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        missing = [key for key in missing if not key.startswith("text_encoder.")]
        if missing or unexpected:
            raise ValueError(f"{folder} is not this CLIP: missing {missing}, unexpected {unexpected}")
        return model.eval()


def contrastive_loss(
    text: Tensor, image: Tensor, scale: Tensor, rows: Tensor, lies: Tensor | None = None, lie_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding the picture for each caption and the caption for each picture; and the accuracy.

    text and image (n, d) unit vectors, rows (n, tokens) the captions: equal ones do not compete. `lies` (m, d) are
    captions that no picture has, and that differ from one only in left and right, or in which object has which colour:
    a batch rarely holds such a pair by chance, and without one nothing would teach the towers these things.
    """
    with torch.autocast(text.device.type, enabled=False):
        return _contrastive_loss(text.float(), image.float(), scale, rows, lies, lie_rows)


def _contrastive_loss(
    text: Tensor, image: Tensor, scale: Tensor, rows: Tensor, lies: Tensor | None, lie_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    # L = ½ (H(softmax(s · I Tᵀ)) + H(softmax(s · T Iᵀ)))
    lies = None if lies is None else lies.float()
    choices, choice_rows = text, rows
    if lies is not None and lie_rows is not None:
        choices, choice_rows = torch.cat([text, lies]), torch.cat([rows, lie_rows])
    target = torch.arange(len(text), device=text.device)
    rivals = (rows[:, None] == choice_rows[None]).all(-1)
    rivals[target, target] = False
    logits = (scale * image @ choices.T).masked_fill(rivals, -torch.inf)
    pictures = logits[:, : len(text)]
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(pictures.T, target)) / 2
    return loss, (pictures.argmax(1) == target).float().mean()


class CLIPTask:
    """What `loop.train` needs to train the tiny CLIP.

    Only tokens that occur in captions have a row during training; `export` puts those rows into the full table of
    49,408 and leaves all others zero, which marks the words that the model has never met. start: a folder that `export`
    wrote, to train further.
    """

    def __init__(
        self,
        scenes: Scenes,
        words: Iterable[str],
        text: TextEncoderConfig,
        image: ImageEncoderConfig | None = None,
        seed: int = 0,
        start: Path | None = None,
    ) -> None:
        self.scenes, self.full, self.seed = scenes, text, seed
        tokenizer = Tokenizer.from_pretrained()
        captions = scenes.captions + [mirrored(caption) for caption in scenes.captions]
        captions += [colors_exchanged(caption) for caption in captions]
        encoded = [[tokenizer.bos_token_id, *tokenizer.encode(c), tokenizer.eos_token_id] for c in captions]
        spoken = {i for ids in encoded for i in ids} | {i for word in words for i in tokenizer.encode(word)}
        before = None if start is None else CLIP.load(start / "clip", load_text_encoder(start / "text_encoder"))
        if before is not None:
            spoken |= set(before.text_encoder.token_embedding.weight.any(1).nonzero().flatten().tolist())
        self.known = torch.tensor(sorted(spoken))
        length = max(map(len, encoded))
        padded = torch.tensor([ids + [tokenizer.eos_token_id] * (length - len(ids)) for ids in encoded])
        # (2, 2, count, tokens): the captions as they are and with colours exchanged, each with the sides so and so
        self.rows = torch.searchsorted(self.known, padded).view(2, 2, len(scenes), length)
        torch.manual_seed(seed)
        small = replace(text, vocab_size=len(self.known))
        eos = int(torch.searchsorted(self.known, torch.tensor(tokenizer.eos_token_id)))
        self.eos = tokenizer.eos_token_id
        model = CLIP(small, image or ImageEncoderConfig(), eos)
        if before is not None:
            weights = before.state_dict()
            weights["text_encoder." + TABLE] = weights["text_encoder." + TABLE][self.known]
            model.load_state_dict(weights)
        self.model: nn.Module = channels_last(model)
        self.order = Shuffled(len(scenes), seed)

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(self.model, CLIP)
        indices = torch.tensor(self.order(positions))
        flip = (torch.rand(len(positions), generator=generator(self.seed, step)) < 0.5).long()
        rows = self.rows[0, flip, indices]
        sides, tints = self.rows[0, 1 - flip, indices], self.rows[1, flip, indices]
        lie_rows = torch.cat([sides, tints])
        device = self.model.logit_scale.device
        rows, sides, tints, lie_rows = (each.to(device) for each in (rows, sides, tints, lie_rows))
        images = self.scenes.images(indices[local].tolist()).to(device)
        images = torch.where(flip[local].bool().to(device)[:, None, None, None], images.flip(-1), images)
        image = self.model.encode_image(images.contiguous(memory_format=torch.channels_last))
        texts = self.model.encode_text(torch.cat([rows[local], sides[local], tints[local]]))
        text, *others = texts.chunk(3)
        if world_size() > 1:
            image, text, *others = (torch.cat(dist.all_gather(x.contiguous())) for x in (image, text, *others))
        lies = torch.cat(others)
        scale = self.model.logit_scale.clamp(max=4.6052).exp()
        loss, accuracy = contrastive_loss(text, image, scale, rows, lies, lie_rows)
        return loss, {"accuracy": float(accuracy)}

    def sheet(self, model: nn.Module) -> Image.Image | None:
        return None

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `text_encoder/` as transformers does, with the full table, and `clip/` with the rest."""
        assert isinstance(model, CLIP)
        weights = {key: value.contiguous() for key, value in model.text_encoder.state_dict().items()}
        table = torch.zeros(self.full.vocab_size, self.full.hidden_size)
        table[self.known] = weights[TABLE].float().cpu()
        weights[TABLE] = table
        config = {"architectures": ["CLIPTextModel"], **to_dict(self.full)}
        target = folder / "text_encoder"
        save_atomically(lambda path: save_file(weights, path), target / "model.safetensors")
        save_atomically(
            lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"), target / "config.json"
        )
        whole = CLIP(replace(self.full, vocab_size=1), model.image_encoder.config, self.eos)
        whole.load_state_dict(model.state_dict() | {"text_encoder." + TABLE: torch.zeros(1, self.full.hidden_size)})
        whole.text_encoder.config = self.full
        whole.save(folder / "clip")
