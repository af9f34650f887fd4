"""`minisd evaluate`: draw held-out prompts, and score the pictures with the attribute classifier and CLIP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minisd.evaluation import memory, report
from minisd.evaluation.attributes import ATTRIBUTES, GOALS, tally
from minisd.evaluation.metrics import Share, edge_energy, frechet_distance, psnr, retrieval, ssim
from minisd.features.validate import check_float, check_int
from minisd.images import to_images, to_pixels
from minisd.io.atomic import save_atomically
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.training.clip import CLIP
from minisd.training.judge import Judge, Verdict
from minisd.training.scenes import Mixture, Scene, render, scene

EVALUATION_SEED = 3_000_017
QUOTED_FROM = 0.97  # an attribute is quoted if the classifier is right about at least this share of real scenes


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Args:
        count: how many scenes; picture i has seed i.
        seed: of the stream of scenes.
        held_out: only prompts with a combination that training never had.
        steps: sampling steps.
        guidance: the guidance scale; None for the model's default.
        mixture: of the kinds of scenes.
    """

    count: int = 1000
    seed: int = EVALUATION_SEED
    held_out: bool = True
    steps: int = 20
    guidance: float | None = None
    mixture: Mixture = field(default_factory=lambda: Mixture(single=0.5, relation=0.3, count=0.2))

    def __post_init__(self) -> None:
        check_int("count", self.count, 1, 1_000_000)
        check_int("steps", self.steps, 1, 1000)
        if self.guidance is not None:
            check_float("guidance", self.guidance)

    def scenes(self) -> list[Scene]:
        """The scenes whose captions are the prompts."""
        return [scene(self.seed, i, held_out=self.held_out, mixture=self.mixture) for i in range(self.count)]


def evaluate_model(
    source: Path | None, output: Path, settings: Settings | None = None, batch: int = 16
) -> dict[str, Any]:
    """Load a model, evaluate it, and write evaluation.json and evaluation.png.

    Pictures are stored in `output`: after an interruption, the same call continues.

    Args:
        source: the model's folder; None for the shipped model. If it has clip/, CLIP scores are computed too.
        output: the folder to write to.
        settings: what is drawn.
        batch: how many pictures are drawn at a time.

    Raises:
        FileNotFoundError: the attribute classifier is missing.
    """
    sd = StableDiffusion.from_pretrained(source)
    folder = Path(__file__).parent.parent / "assets" / "tiny" if source is None else Path(source)
    clip = CLIP.load(folder / "clip", sd.text_encoder) if (folder / "clip").is_dir() else None
    return evaluate(sd, output, settings, clip=clip, batch=batch)


def evaluate(
    sd: StableDiffusion,
    output: Path,
    settings: Settings | None = None,
    *,
    judge: Judge | None = None,
    clip: CLIP | None = None,
    batch: int = 16,
) -> dict[str, Any]:
    """Judge pictures drawn from held-out prompts, beside real scenes, and return what is written to evaluation.json.

    Every attribute has three shares with their 95% intervals: of drawn pictures, of real scenes of the same captions
    (how good the judge is) and of these after the autoencoder (the most that the denoiser can reach). Attributes that
    the judge gets right in less than 97% of real scenes have "quoted": false. Beside them stand the edge energy of
    drawn and reconstructed pictures, 1 where it is that of real scenes, and their Fréchet distance from real scenes.
    """
    settings, judge = settings or Settings(), judge or Judge.load()
    scenes = settings.scenes()
    captions = [one.caption for one in scenes]
    real = np.stack([render(one) for one in scenes])
    drawn = draw(sd, captions, settings, output / "drawn", batch)
    decoded, fidelity = reconstruct(sd, real, batch)
    pictures = {"drawn": drawn, "real": real, "reconstructed": decoded}
    verdicts = {name: verdicts_of(judge, pixels, batch) for name, pixels in pictures.items()}
    result = {
        "settings": asdict(settings) | {"sampler": sd.defaults.sampler.name, "guidance": guidance(sd, settings)},
        "attributes": attributes(scenes, verdicts),
        "autoencoder": fidelity,
        "edge_energy": edges(pictures, batch),
        "frechet_distance": frechet(judge, pictures, batch),
        "clip": None if clip is None else clip_figures(sd, clip, drawn, real, captions, batch),
        "nearest_sprites": nearest(scenes, drawn),
    }
    text = json.dumps(result, indent=2) + "\n"
    save_atomically(lambda path: path.write_text(text, encoding="utf-8"), output / "evaluation.json")
    figure = report.picture(result, scenes, drawn, verdicts["drawn"])
    save_atomically(lambda path: figure.save(path, format="PNG"), output / "evaluation.png")
    return result


def draw(sd: StableDiffusion, prompts: list[str], settings: Settings, folder: Path, batch: int) -> np.ndarray:
    """Draw every prompt, (n, h, w, 3) uint8. Batches that an earlier call left in `folder` are not drawn again.

    Raises ValueError if these are of other settings or another model.
    """
    choices = {"guidance": guidance(sd, settings), "batch": batch, "model": fingerprint(sd)}
    described = {"settings": asdict(settings), **choices}
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != described:
        raise ValueError(f"{folder} holds pictures of another model or other settings; remove it, or write elsewhere")
    text = json.dumps(described, indent=2) + "\n"
    save_atomically(lambda path: path.write_text(text, encoding="utf-8"), note)
    parts = []
    for start in tqdm(range(0, len(prompts), batch), unit="batch", desc="drawing"):
        path = folder / f"{start:06d}.npy"
        if not path.exists():
            pixels = _drawn(sd, prompts[start : start + batch], start, settings)
            save_atomically(lambda target, pixels=pixels: _write(target, pixels), path)
        parts.append(np.load(path))
    return np.concatenate(parts)


def guidance(sd: StableDiffusion, settings: Settings) -> float:
    """The guidance scale that is used."""
    return sd.defaults.guidance_scale if settings.guidance is None else settings.guidance


def fingerprint(sd: StableDiffusion) -> str:
    """A digest of the weights."""
    digest = hashlib.sha256()
    for part in (sd.text_encoder, sd.unet, sd.autoencoder):
        for value in part.state_dict().values():
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def reconstruct(sd: StableDiffusion, real: np.ndarray, batch: int) -> tuple[np.ndarray, dict[str, float]]:
    """Encode and decode scenes; return the result, with its PSNR and SSIM."""
    again = [sd.decode_to_tensor(sd.encode_image(images)) for images in batches(real, batch)]
    decoded = np.concatenate([to_pixels(images) for images in again])
    pairs = [((a + 1) / 2, (b + 1) / 2) for a, b in zip(batches(real, batch), batches(decoded, batch), strict=True)]
    mean_psnr = torch.cat([psnr(a, b) for a, b in pairs]).mean()
    mean_ssim = torch.cat([ssim(a, b) for a, b in pairs]).mean()
    return decoded, {"psnr": round(float(mean_psnr), 2), "ssim": round(float(mean_ssim), 4)}


def verdicts_of(judge: Judge, pixels: np.ndarray, batch: int) -> list[Verdict]:
    """Classify pictures (n, h, h, 3)."""
    return [verdict for images in batches(pixels, batch) for verdict in judge.verdicts(images)]


def edges(pictures: dict[str, np.ndarray], batch: int) -> dict[str, float]:
    """Edge energy of each kind of picture (n, h, w, 3), as a multiple of that of the real ones."""
    energy = {
        kind: float(torch.cat([edge_energy(images) for images in batches(pixels, batch)]).mean())
        for kind, pixels in pictures.items()
    }
    return {kind: round(value / energy["real"], 4) for kind, value in energy.items() if kind != "real"}


def frechet(judge: Judge, pictures: dict[str, np.ndarray], batch: int) -> dict[str, float]:
    """Fréchet distance of each kind of picture (n, h, w, 3) from the real ones, on the judge's features."""
    features = {
        kind: torch.cat([judge.features(images) for images in batches(pixels, batch)])
        for kind, pixels in pictures.items()
    }
    real = features.pop("real")
    return {kind: round(frechet_distance(vectors, real), 4) for kind, vectors in features.items()}


def attributes(scenes: list[Scene], verdicts: dict[str, list[Verdict]]) -> dict[str, Any]:
    """For every attribute: its meaning, its goal, the shares for each kind of picture, and whether they are quoted."""
    tallies = {kind: tally(scenes, seen) for kind, seen in verdicts.items()}
    result = {}
    for name, meaning in ATTRIBUTES.items():
        shares: dict[str, Share] = {kind: counts[name] for kind, counts in tallies.items()}
        real = shares["real"]
        quoted = real.of > 0 and real.right / real.of >= QUOTED_FROM
        figures = {kind: share.to_dict() for kind, share in shares.items()}
        result[name] = {"meaning": meaning, "goal": GOALS.get(name), "quoted": quoted, **figures}
    return result


@torch.inference_mode()
def clip_figures(
    sd: StableDiffusion, clip: CLIP, drawn: np.ndarray, real: np.ndarray, captions: list[str], batch: int
) -> dict[str, Any]:
    """CLIP score (mean cosine of picture and caption) of drawn, real and shuffled pictures; retrieval among 64."""
    groups = [captions[start : start + batch] for start in range(0, len(captions), batch)]
    texts = torch.cat([clip.encode_text(sd.tokenizer(group)) for group in groups])
    seen = {
        name: torch.cat([clip.encode_image(images) for images in batches(pixels, batch)])
        for name, pixels in (("drawn", drawn), ("real", real))
    }
    scores = {name: (images * texts).sum(1).mean() for name, images in seen.items()}
    # each picture with the caption of another: the baseline
    scores["shuffled"] = (seen["drawn"] * texts.roll(max(1, len(texts) // 2), 0)).sum(1).mean()
    found = {name: retrieval(images, texts, captions).to_dict() for name, images in seen.items()}
    return {"score": {name: round(float(score), 4) for name, score in scores.items()}, "right_of_64": found}


def nearest(scenes: list[Scene], drawn: np.ndarray, count: int = 8) -> list[dict[str, Any]]:
    """For the first pictures of an object in a held-out colour: the nearest sprite, and the nearest in training."""
    result = []
    for index in [i for i, one in enumerate(scenes) if memory.suits(one)][:count]:
        best, trained = memory.nearest_sprites(drawn[index], scenes[index])
        thing = scenes[index].things[0]
        composed = (best.thing.noun, best.thing.color) == (thing.noun, thing.color)
        result.append(
            {"index": index, "prompt": scenes[index].caption, "composed": composed}
            | {
                name: {**asdict(match.thing), "rmse": round(match.error, 4)}
                for name, match in (("nearest", best), ("nearest_in_training", trained))
            }
        )
    return result


def batches(pixels: np.ndarray, batch: int) -> Iterator[Tensor]:
    """Convert pictures (n, h, w, 3) uint8 to images in [-1, 1], a batch at a time."""
    return (to_images(pixels[start : start + batch]) for start in range(0, len(pixels), batch))


def _drawn(sd: StableDiffusion, prompts: list[str], first: int, settings: Settings) -> np.ndarray:
    seeds = list(range(first, first + len(prompts)))
    pictures = sd(
        prompts, seed=seeds, num_inference_steps=settings.steps, guidance_scale=settings.guidance, progress=False
    )
    return np.stack([np.asarray(picture) for picture in pictures])


def _write(path: Path, pixels: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, pixels)
