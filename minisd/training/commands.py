"""`minisd train …`: the commands that make the tiny model, in the order in which they are run.

Those that tune a finished model are in `tuning_commands`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minisd.features.option_groups import option_groups
from minisd.training.sitting import run, told
from minisd.training.tuning_commands import dreambooth, full, inversion, lora

app = typer.Typer(
    no_args_is_help=True, help="Train the parts of the tiny model one after the other, or tune a finished model."
)

SceneFolder = Annotated[Path, typer.Option("--scenes", help="Folder of rendered scenes (minisd train scenes).")]
Output = Annotated[Path, typer.Option("--output", help="Where checkpoints, curves and sheets go.")]
Steps = Annotated[int | None, typer.Option(help="Length of the whole run, in steps.")]
Minutes = Annotated[float | None, typer.Option(help="Stop and save after so many minutes.")]
Batch = Annotated[int, typer.Option(help="Global batch, over all processes.")]
Rate = Annotated[float, typer.Option("--lr", help="Highest learning rate.")]
Seed = Annotated[int, typer.Option(help="Of the data's order, the noise and the first weights.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")]
Mixed = Annotated[bool, typer.Option("--bfloat16", help="Compute in mixed precision: faster on a CPU with AMX.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the model first: minutes, and then faster.")]
MuonOption = Annotated[bool, typer.Option("--muon", help="Muon in the place of AdamW.")]
From = Annotated[Path | None, typer.Option("--from", help="Start from the weights of this model folder.")]
Model = Annotated[Path, typer.Option("--model", help="Folder with the parts that are already trained.")]
Autoencoders = Annotated[Path, typer.Option("--autoencoder", help="Folder that holds vae/.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of your own captioned pictures, or of WebDataset shards, instead of scenes."),
]
Side = Annotated[int, typer.Option("--side", help="Of --data: the side in pixels that they are scaled to.")]
Sizes = Annotated[
    Path | None, typer.Option("--config", help="Of --data: JSON file with sizes that differ from the tiny model's.")
]
Place = Annotated[
    str | None, typer.Option("--device", help="Of --data: cuda, mps or cpu. [default: the first available]")
]
FEATURES = Path("runs/features/export/features.safetensors")
Features = Annotated[
    Path | None, typer.Option(help="Weights of the network of features (minisd train features): adds their loss.")
]


@app.command()
def scenes(
    folder: Path,
    count: Annotated[int, typer.Option(help="How many pictures (111 KB each).")] = 40_000,
    seed: Annotated[int, typer.Option(help="Names the endless stream of scenes.")] = 0,
    mixture: Annotated[
        tuple[float, float, float], typer.Option(help="Weights of one object, of two in a relation, of several alike.")
    ] = (0.6, 0.25, 0.15),
) -> None:
    """Render captioned scenes into FOLDER, about 300 a second on one core."""
    from minisd.training.data import render_scenes
    from minisd.training.scenes import Mixture

    try:
        render_scenes(folder, count, seed, mixture=Mixture(*mixture))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def autoencoder(
    scenes: SceneFolder = Path("runs/scenes"),
    output: Output = Path("runs/autoencoder"),
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = 8,
    lr: Rate = 5e-4,
    seed: Seed = 0,
    resume: Resume = False,
    start: From = None,
    bfloat16: Mixed = False,
    muon: MuonOption = False,
    decoder_only: Annotated[bool, typer.Option(help="Keep the encoder, so that cached latents stay valid.")] = False,
    whole_from: Annotated[float, typer.Option(help="From this share of the run on, whole pictures, not crops.")] = 0.75,
    features: Features = None,
    data: Data = None,
    side: Side = 64,
    config: Sizes = None,
    device: Place = None,
) -> None:
    """Train the autoencoder on crops, then on whole pictures."""
    from minisd.io.diffusers_folder import load_autoencoder
    from minisd.training.autoencoder import AutoencoderTask
    from minisd.training.features import SceneFeatures
    from minisd.training.own_pictures import read_data

    with told():
        source, sizes, _, place = read_data(scenes, data, side, config, device)
    model = None if start is None else load_autoencoder(start / "vae")
    shape = sizes.autoencoder if model is None else model.config
    network = None if features is None else SceneFeatures.load(features)
    phase: dict[str, Any] = {"whole_from": whole_from, "decoder_only": decoder_only}
    task = AutoencoderTask(source, shape, seed=seed, model=model, features=network, **phase)
    task.model.to(place)
    choices = {"resume": resume, "bfloat16": bfloat16, "muon": muon}
    run(task, output, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed, **choices)


@app.command()
def features(
    scenes: SceneFolder = Path("runs/scenes"),
    output: Output = Path("runs/features"),
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = 16,
    lr: Rate = 1.5e-3,
    seed: Seed = 0,
    resume: Resume = False,
    bfloat16: Mixed = False,
    muon: MuonOption = False,
) -> None:
    """Train the network whose features the perceptual loss compares."""
    from minisd.training.data import Scenes
    from minisd.training.features import FeaturesTask

    task = FeaturesTask(Scenes(scenes), seed=seed)
    choices = {"resume": resume, "bfloat16": bfloat16, "muon": muon}
    run(task, output, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed, **choices)


@app.command()
def decoder(
    scenes: SceneFolder = Path("runs/scenes"),
    output: Output = Path("runs/decoder"),
    start: Annotated[Path, typer.Option("--from", help="Folder that holds vae/.")] = Path("runs/autoencoder/export"),
    features: Annotated[Path, typer.Option(help="Weights of the network of features.")] = FEATURES,
    share: Annotated[float, typer.Option(help="Of the adversarial loss, in gradients of the reconstruction.")] = 0.25,
    alone: Annotated[int, typer.Option(help="Steps of the discriminator alone, before the decoder answers.")] = 800,
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = 4,
    lr: Rate = 1e-4,
    seed: Seed = 0,
    resume: Resume = False,
    bfloat16: Mixed = False,
) -> None:
    """Train the autoencoder's decoder alone, against a discriminator; latents stay valid."""
    from minisd.io.diffusers_folder import load_autoencoder
    from minisd.training.adversarial import AdversarialTask, Adversary
    from minisd.training.data import Scenes
    from minisd.training.features import SceneFeatures

    autoencoder, network = load_autoencoder(start / "vae"), SceneFeatures.load(features)
    task = AdversarialTask(Scenes(scenes), autoencoder, network, seed, adversary=Adversary(share=share, alone=alone))
    choices = {"betas": (0.5, 0.9), "decays": (0.997,), "resume": resume, "bfloat16": bfloat16}
    run(task, output, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed, **choices)


@app.command()
def clip(
    scenes: SceneFolder = Path("runs/scenes"),
    output: Output = Path("runs/clip"),
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = 128,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    resume: Resume = False,
    start: From = None,
    bfloat16: Mixed = False,
    data: Data = None,
    side: Side = 64,
    config: Sizes = None,
    device: Place = None,
) -> None:
    """Train the two towers of CLIP; the text tower becomes the model's text encoder."""
    from minisd.training.clip import CLIPTask
    from minisd.training.own_pictures import read_data
    from minisd.training.scenes import vocabulary

    with told():
        source, sizes, image, place = read_data(scenes, data, side, config, device)
    words = vocabulary() if data is None else ()
    task = CLIPTask(source, words, sizes.text_encoder, image, seed=seed, start=start)
    task.model.to(place)
    run(task, output, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed, resume=resume, bfloat16=bfloat16)


@app.command()
def latents(
    scenes: SceneFolder = Path("runs/scenes"),
    model: Model = Path("runs/autoencoder/export"),
    bfloat16: Mixed = False,
) -> None:
    """Encode every scene once, for the training of the UNet; under torchrun on several processes."""
    import torch

    from minisd.features.distributed import process_group
    from minisd.io.diffusers_folder import load_autoencoder
    from minisd.training.data import Scenes
    from minisd.training.unet import cache_latents

    with process_group(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        cache_latents(load_autoencoder(model / "vae"), Scenes(scenes), scenes / "latents.safetensors")


@app.command()
def unet(
    scenes: SceneFolder = Path("runs/scenes"),
    output: Output = Path("runs/unet"),
    vae: Autoencoders = Path("runs/autoencoder/export"),
    text: Annotated[Path, typer.Option("--clip", help="Folder that holds text_encoder/.")] = Path("runs/clip/export"),
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = 32,
    lr: Rate = 8e-4,
    seed: Seed = 0,
    resume: Resume = False,
    start: From = None,
    bfloat16: Mixed = False,
    muon: MuonOption = False,
    compile: Compiled = False,
    ceiling: Annotated[float, typer.Option(help="Of the loss's weight, as an error of clean latents.")] = 5.0,
    data: Data = None,
    side: Side = 64,
    config: Sizes = None,
    device: Place = None,
) -> None:
    """Train the denoiser on cached latents; under torchrun on several processes."""
    from minisd.features.distributed import process_group
    from minisd.io.diffusers_folder import load_autoencoder, load_text_encoder, load_unet
    from minisd.training.layout_loss import layouts
    from minisd.training.own_pictures import own_latents, read_data, sheet_prompts
    from minisd.training.unet import UNetTask

    with told():
        source, sizes, _, place = read_data(scenes, data, side, config, device)
    autoencoder, text_encoder = load_autoencoder(vae / "vae").to(place), load_text_encoder(text / "text_encoder")
    composed = source.descriptions
    with process_group(place):
        cached = scenes / "latents.safetensors" if data is None else own_latents(output, autoencoder, source)
        task = UNetTask(
            cached,
            source.captions,
            autoencoder,
            text_encoder.to(place),
            sizes,
            seed=seed,
            model=None if start is None else load_unet(start / "unet"),
            layout=layouts(composed) if composed and all("things" in each for each in composed) else None,
            ceiling=ceiling,
            prompts=sheet_prompts(source),
        )
        task.model.to(place)
        choices = {"resume": resume, "bfloat16": bfloat16, "muon": muon, "compile": compile}
        run(task, output, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed, **choices)


@app.command()
def judge(
    output: Output = Path("runs/judge"),
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = 16,
    lr: Rate = 1.5e-3,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train the judge of `minisd evaluate`, on scenes that are drawn on the fly."""
    from minisd.training.judge import JudgeTask

    task = JudgeTask(seed=seed)
    choices = {"steps": steps, "minutes": minutes, "resume": resume, "decays": (0.995,), "decay_from": 0.35}
    run(task, output, batch=batch, lr=lr, seed=seed, **choices)


@app.command()
def export(
    target: Path,
    vae: Autoencoders = Path("runs/autoencoder/export"),
    text: Annotated[Path, typer.Option("--clip", help="Folder that holds text_encoder/ and clip/.")] = Path(
        "runs/clip/export"
    ),
    denoiser: Annotated[Path, typer.Option("--unet", help="Folder that holds unet/.")] = Path("runs/unet/export"),
) -> None:
    """Put the trained parts together into the model folder TARGET, in float16."""
    from minisd.training.export import assemble

    assemble(vae, text, denoiser, target)


@app.command()
def sheet(
    output: Path,
    model: Annotated[Path | None, typer.Option(help="Model folder; by default the shipped one.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many pictures of each prompt, from seed 0 on.")] = 4,
) -> None:
    """Draw the sixteen fixed prompts with the first seeds, as one picture: the contact sheet of the README."""
    from minisd.features.validate import check_writable
    from minisd.images import grid
    from minisd.pipeline.stable_diffusion import StableDiffusion
    from minisd.training.unet import PROMPTS

    check_writable(output.parent)
    if output.suffix.lower() not in (".png", ".webp", ".jpg"):
        raise typer.BadParameter(f"{output} is no picture's name; end it in .png, .webp or .jpg")
    sd = StableDiffusion.from_pretrained(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    blocks = [grid(sd([prompt] * seeds, seed=list(range(seeds)))) for prompt in PROMPTS]
    grid(blocks, columns=4, captions=PROMPTS).save(output, quality=92)


for command in (lora, dreambooth, inversion, full):
    app.command()(option_groups(command))

if __name__ == "__main__":
    app()
