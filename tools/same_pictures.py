"""Draw with two checkouts of minisd on the same machine, and compare the pictures bit for bit.

    python tools/same_pictures.py                      # this checkout and commit 6bd0a67
    python tools/same_pictures.py --base ../other --only lora

Both get the same model folder, are called through the public API only, and run in processes of one thread. Prints a
line for each case and ends with exit code 1 where a case differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "6bd0a67"
LONG = ", ".join(["a red fox in the snow at night", "a blue car on the beach"] * 9)  # more than 75 tokens

Case = Callable[[], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help=f"a checkout to compare with (default: a worktree of {COMMIT})")
    parser.add_argument("--model", type=Path, help="the model folder (default: the shipped model of the base)")
    parser.add_argument("--only", default="", help="a regular expression; draw the cases whose names match")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("INPUTS", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, metavar="INPUTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_inputs(options.write)
        return 0
    if options.draw:
        return draw(*options.draw, options.model, options.only)
    with tempfile.TemporaryDirectory() as place:
        if options.base:
            return compare(options.base.resolve(), Path(place), options)
        base = Path(place) / COMMIT
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(base), COMMIT], check=True, capture_output=True)
        try:
            return compare(base, Path(place), options)
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)


def compare(base: Path, place: Path, options: argparse.Namespace) -> int:
    """Let both checkouts draw, at the same time, and print what differs."""
    model = (options.model or base / "minisd/assets/tiny").resolve()
    inputs, outputs = place / "inputs", {"base": place / "base.npz", "here": place / "here.npz"}
    start(base, base / "tests", "--write", inputs).check_returncode()
    children = [
        start(root, "--draw", inputs, out, "--model", model, "--only", options.only, wait=False)
        for root, out in zip((base, ROOT), outputs.values(), strict=True)
    ]
    if codes := [code for child in children if (code := child.wait())]:
        print(f"a process ended with exit code {codes[0]}")
        return 1
    then, now = (dict(np.load(out)) for out in outputs.values())
    cases = list(dict.fromkeys(name.split(" / ")[0] for name in [*then, *now]))
    faults = 0
    for case in cases:
        result = verdict(*({k: v for k, v in some.items() if k.split(" / ")[0] == case} for some in (then, now)))
        faults += result != "identical"
        print(f"{case:60} {result}")
    print(f"{len(cases)} cases, {len(cases) - faults} identical, {faults} not")
    return 1 if faults or not cases else 0


def start(root: Path, *arguments: Any, wait: bool = True) -> Any:
    """Run this script with the package of a checkout, in a process of one thread."""
    extra = [str(argument) for argument in arguments if isinstance(argument, Path) and argument.name == "tests"]
    path = os.pathsep.join([str(root), *extra])
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    environment = (
        os.environ
        | threads
        | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONDONTWRITEBYTECODE": "1"}
    )
    rest = [str(argument) for argument in arguments if str(argument) not in extra]
    command = [sys.executable, str(Path(__file__).resolve()), *rest]
    return (subprocess.run if wait else subprocess.Popen)(command, env=environment, cwd=tempfile.gettempdir())


def verdict(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What one case's arrays say: identical, or how they differ."""
    for side, some in (("base", then), ("here", now)):
        if not some:
            return f"not drawn by {side}"
        for name, value in some.items():
            if name.endswith(" / error"):
                return f"{side} raises {value}"
    if then.keys() != now.keys():
        return f"{len(then)} arrays, now {len(now)}"
    for name, old in then.items():
        new = now[name]
        if old.dtype != new.dtype or old.shape != new.shape:
            return f"{old.dtype}{list(old.shape)}, now {new.dtype}{list(new.shape)}"
        if old.tobytes() != new.tobytes():
            apart = np.abs(old.astype(float) - new.astype(float))
            return f"DIFFERS in {name.split(' / ')[1]}: {(apart > 0).mean():.2%} of it, by {apart.max():.3g} at most"
    return "identical"


def write_inputs(folder: Path) -> None:
    """Small random models and adapters, as files; run with the base checkout's tests on the path, which write them."""
    from dataclasses import replace

    import torch
    from checkpoints import SMALL, SMALL_2, make_parts, write_folder
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    sizes = {"sd1": SMALL, "sd2": SMALL_2, "inpaint": replace(SMALL, unet=replace(SMALL.unet, in_channels=9))}
    for number, (name, config) in enumerate(sizes.items()):
        write_folder(folder / name, make_parts(config, seed=number))
    scheduler = folder / "sd2/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    write_folder(folder / "half", make_parts(SMALL, seed=3), torch.float16, variant="fp16")
    generator = torch.Generator().manual_seed(7)
    for name, tokens in (("<one>", 1), ("<three>", 3)):
        vectors = torch.randn(tokens, 128, generator=generator) * 0.3
        save_file({name: vectors if tokens > 1 else vectors[0]}, folder / f"{name[1:-1]}.safetensors")


def write_loras(folder: Path, model: Path) -> None:
    """LoRAs for the model, in the layouts of peft and kohya: the first for attention, the second for every layer."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(11)
    parts = {"unet": "unet/diffusion_pytorch_model", "text_encoder": "text_encoder/model"}
    peft, kohya = {}, {}
    for part, file in parts.items():
        for key, weight in load_file(model / f"{file}.safetensors").items():
            layer = key.removesuffix(".weight").removeprefix("text_model.")
            if not key.endswith(".weight") or weight.ndim < 2 or "embedding." in key or "norm" in key:
                continue
            down = torch.randn(4, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
            up = torch.randn(len(weight), 4, *(1 for _ in weight.shape[2:]), generator=generator) * 0.1
            if re.search(r"to_[qkv]|to_out|[qkv]_proj|out_proj", layer):
                peft |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
            stem = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + layer.replace(".", "_")
            kohya |= {f"{stem}.lora_down.weight": down.flip(0), f"{stem}.lora_up.weight": up * 0.5}
            kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(peft, folder / "peft.safetensors")
    save_file(kohya, folder / "kohya.safetensors")


def draw(inputs: Path, out: Path, model: Path, only: str) -> int:
    """Draw every case with the package on the path, and save the arrays."""
    import minisd

    warnings.simplefilter("ignore")
    place = out.with_suffix("")
    place.mkdir()
    write_loras(place, model)
    arrays: dict[str, np.ndarray] = {}
    for name, case in Cases(inputs, place, model).collect().items():
        if not re.search(only, name):
            continue
        begin = time.perf_counter()
        try:
            results = list(flatten(case()))
            arrays |= {f"{name} / {index}": value for index, value in enumerate(results)}
        except Exception as error:
            arrays[f"{name} / error"] = np.array(f"{type(error).__name__}: {error}"[:300])
        if os.environ.get("SAME_PICTURES_TIMES"):
            print(f"{Path(minisd.__file__).parent.parent} {name} {time.perf_counter() - begin:.2f} s", file=sys.stderr)
    np.savez(out, **arrays)
    return 0


def flatten(result: Any) -> Any:
    """The arrays in a picture, a tensor, a step, an array, or a list of these."""
    if hasattr(result, "x0"):
        yield np.array([result.index, result.t])
        yield from flatten([result.latents, result.x0, result.noise])
    elif hasattr(result, "detach"):
        yield result.detach().cpu().numpy()
    elif isinstance(result, (list, tuple)) or hasattr(result, "__next__"):
        for one in result:
            yield from flatten(one)
    else:
        yield np.asarray(result)
        if seed := getattr(result, "info", {}).get("seed"):
            yield np.array(seed)


class Cases:
    """The cases by name. A model is loaded once and shared, except where a case changes it."""

    def __init__(self, inputs: Path, place: Path, model: Path) -> None:
        self.inputs, self.place, self.model = inputs, place, model
        self.loaded: dict[str, Any] = {}

    def load(self, name: str = "tiny", **choices: Any) -> Any:
        from minisd import StableDiffusion

        source = self.model if name == "tiny" else self.inputs / name
        return StableDiffusion.from_pretrained(source, device="cpu", **choices)

    def shared(self, name: str = "tiny", **choices: Any) -> Any:
        key = f"{name} {choices}"
        if key not in self.loaded:
            self.loaded[key] = self.load(name, **choices)
        return self.loaded[key]

    def picture(self, seed: int = 1, width: int = 128, height: int = 128) -> Any:
        from PIL import Image

        noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

    def mask(self, width: int = 128, height: int = 128) -> Any:
        from PIL import Image

        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 4, height // 8, 3 * width // 4, 5 * height // 8))
        return mask

    def collect(self) -> dict[str, Case]:
        groups = (self.samplers, self.guidance, self.prompts, self.sizes, self.parts, self.reuse, self.editing)
        return {name: case for group in (*groups, self.adapters, self.models, self.command) for name, case in group()}

    def samplers(self) -> Any:
        from minisd import Sampler

        def one(prompt: str = "a fox in the snow", steps: int = 6, **choices: Any) -> Case:
            return lambda: self.shared()(prompt, num_inference_steps=steps, seed=7, sampler=Sampler(**choices))

        able = ("euler", "heun", "dpmpp_2m")
        for name in ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m"):
            for spacing in ("leading", "trailing", "linspace"):
                yield f"sampler {name} {spacing}", one(name=name, spacing=spacing)
        for name in able:
            yield f"sampler {name} karras", one(name=name, karras=True)
            yield f"sampler {name} karras linspace", one(name=name, karras=True, spacing="linspace")
        yield "sampler ddim eta 0.5", one(name="ddim", eta=0.5)
        yield "sampler ddim eta 1", one(name="ddim", eta=1.0)
        for steps in (1, 2, 4, 8):
            yield f"sampler lcm {steps} steps", one(steps=steps, name="lcm")
        for name in ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m"):
            for steps in (1, 2, 3, 9):
                yield f"sampler {name} {steps} steps", one(steps=steps, name=name)

    def guidance(self) -> Any:
        def one(**choices: Any) -> Case:
            return lambda: self.shared()("a red car on the beach", num_inference_steps=5, seed=3, **choices)

        yield "defaults of the model", lambda: self.shared()("a red car on the beach", seed=3)
        for scale in (0, 1, 2.5, 12):
            yield f"guidance {scale}", one(guidance_scale=scale)
        yield "guidance rescale", one(guidance_rescale=0.7)
        yield "guidance interval", one(guidance_interval=(0.2, 0.8))
        yield "guidance interval and rescale", one(guidance_interval=(0.0, 0.5), guidance_rescale=0.3)
        yield "negative prompt", one(negative_prompt="a blue car")
        yield "negative prompt at scale 0", one(negative_prompt="a blue car", guidance_scale=0)
        yield "preset fast", lambda: self.shared()("a fox in a meadow", preset="fast", seed=2)
        yield "preset fast, changed", one(preset="fast", sampler="euler")
        yield "without progress", one(progress=False)
        prompts = ["a fox", "a cat", "a red car"]
        several = {"negative_prompt": ["", "(snow)", "a dog"], "seed": [3, 8, 3], "guidance_scale": [4, 7.5, 1]}
        several |= {"num_inference_steps": 4}
        yield "several, each with settings of its own", lambda: self.shared()(prompts, **several)
        yield (
            "several, scale 0 among them",
            lambda: self.shared()(
                prompts, num_inference_steps=3, seed=1, guidance_scale=[0, 1, 5], negative_prompt="a dog"
            ),
        )
        yield "several images of a prompt", one(num_images_per_prompt=3)
        yield (
            "several images of several prompts",
            lambda: self.shared()(
                prompts[:2],
                num_images_per_prompt=2,
                num_inference_steps=3,
                seed=5,
                sampler="ddpm",
                negative_prompt=["", "x"],
            ),
        )

    def prompts(self) -> Any:
        def one(prompt: str, **choices: Any) -> Case:
            return lambda: self.shared()(prompt, num_inference_steps=4, seed=5, **choices)

        yield "prompt weights", one("a (fox:1.3) in the [snow], ((night))")
        yield "prompt weights below 0 and escapes", one(r"a (fox:-0.5) \(in\) the snow:(:0.3)")
        yield "prompt empty", one("")
        yield "prompt long", one(LONG)
        yield "prompt long with weights", one(f"({LONG}:1.2), a (moon:0.7)", negative_prompt="a [dog]")
        yield "prompt short, negative long", one("a fox", negative_prompt=LONG)
        yield "prompt odd characters", one("Ein Füchslein, 狐狸 🦊 & l'été's  <b>")
        yield "prompt several, long and short", lambda: self.shared()([LONG, "a (cat)"], num_inference_steps=3, seed=5)
        for skip in (2, 4):
            yield f"clip skip {skip}", one("a fox in the snow", clip_skip=skip, negative_prompt="a dog")
        yield "encode_text", lambda: self.shared().encode_text(["a fox", "a (red:1.4) car", LONG])
        yield "encode_text clip skip", lambda: self.shared().encode_text("a fox", 3)
        yield (
            "prompt embeds",
            lambda: self.denoise(
                "x", prompt_embeds=self.shared().encode_text("a blue car"), num_inference_steps=3, seed=1
            ),
        )
        yield (
            "prompt embeds, negative long",
            lambda: self.denoise(
                ["x", "y"],
                prompt_embeds=self.shared().encode_text(["a blue car", "a (cat:0.8)"]),
                negative_prompt=[LONG, "a dog"],
                guidance_scale=[0, 3],
                num_inference_steps=3,
                seed=1,
            ),
        )

    def denoise(self, *arguments: Any, **choices: Any) -> Any:
        """Every step of `denoise`, and the picture and preview of the last."""
        sd = self.shared()
        steps = list(sd.denoise(*arguments, **choices))
        return [steps, sd.decode(steps[-1].latents), sd.preview(steps[-1].x0)]

    def sizes(self) -> Any:
        for width, height in ((64, 64), (128, 64), (72, 200), (256, 192), (8, 8)):
            yield (
                f"size {width}x{height}",
                lambda w=width, h=height: self.shared()(
                    "a fox in the snow", width=w, height=h, num_inference_steps=3, seed=6
                ),
            )
        yield "tile", lambda: self.shared(tile=True)("a fox", width=320, height=256, num_inference_steps=2, seed=6)
        yield (
            "tile, image to image",
            lambda: self.shared(tile=True).image_to_image(
                "a fox", self.picture(1, 320, 256), 0.5, num_inference_steps=4, seed=6
            ),
        )
        yield "offload", lambda: self.shared(offload=True)("a fox in the snow", num_inference_steps=3, seed=6)
        yield "bfloat16", lambda: self.load(dtype=self.torch.bfloat16)("a fox", num_inference_steps=3, seed=6)
        yield "float64", lambda: self.load(dtype=self.torch.float64)("a fox", num_inference_steps=3, seed=6)

    @property
    def torch(self) -> Any:
        import torch

        return torch

    def noise(self, *shape: int) -> Any:
        return self.torch.randn(*shape, generator=self.torch.Generator().manual_seed(4))

    def parts(self) -> Any:
        for name in ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "lcm"):
            yield (
                f"denoise, every step, {name}",
                lambda n=name: self.denoise(["a fox", "a cat"], num_inference_steps=4, seed=[1, 9], sampler=n),
            )
        yield (
            "denoise from latents",
            lambda: self.denoise("a fox", latents=self.noise(1, 4, 16, 16), num_inference_steps=3),
        )
        yield (
            "denoise from image tensors",
            lambda: self.denoise(
                ["a fox", "a cat"], self.noise(2, 3, 128, 128).clamp(-1, 1), strength=0.5, num_inference_steps=6, seed=2
            ),
        )
        yield "decode", lambda: self.shared().decode(self.noise(2, 4, 16, 16))
        yield "decode_to_tensor", lambda: self.shared().decode_to_tensor(self.noise(1, 4, 12, 20))
        yield "encode_image", lambda: self.shared().encode_image(self.picture(2, 96, 160))
        yield "predict", lambda: self.predict()
        yield "the parts themselves", lambda: self.alone()

    def predict(self) -> Any:
        sd, latents = self.shared(), self.noise(1, 4, 16, 16)
        contexts = sd.encode_text(["a dog", "a fox"])
        return [sd.predict(latents, 500, contexts, 4.0), sd.predict(latents, 3.5, contexts[1:])]

    def alone(self) -> Any:
        sd, torch = self.shared(), self.torch
        with torch.inference_mode():
            ids = sd.tokenizer("a fox in the snow")
            context = sd.text_encoder(ids)
            prediction = sd.unet(self.noise(1, 4, 16, 16), torch.tensor(300.0), context)
            image = sd.autoencoder.decode(self.noise(1, 4, 16, 16))
            return [ids, context, prediction, image, sd.autoencoder.encode(image.clamp(-1, 1)).mean]

    def reuse(self) -> Any:
        for every, layers in ((1, 1), (2, 1), (2, 2), (3, 2), (3, 4), (5, 3)):
            yield (
                f"feature reuse {every}, {layers}",
                lambda r=(every, layers): self.shared()(
                    "a fox in the snow", num_inference_steps=6, seed=4, feature_reuse=r
                ),
            )
        yield (
            "feature reuse and guidance interval",
            lambda: self.shared()(
                "a fox", num_inference_steps=7, seed=4, feature_reuse=(2, 2), guidance_interval=(0.25, 0.75)
            ),
        )
        yield (
            "feature reuse, heun",
            lambda: self.denoise(
                ["a fox", "a cat"], num_inference_steps=4, seed=4, feature_reuse=(2, 3), sampler="heun"
            ),
        )

    def editing(self) -> Any:
        picture, mask = self.picture(), self.mask()
        for strength in (0.3, 0.6, 1.0):
            yield (
                f"image to image {strength}",
                lambda s=strength: self.shared().image_to_image(
                    "a fox on the beach", picture, strength=s, num_inference_steps=8, seed=2
                ),
            )
        for name in ("ddpm", "pndm", "heun", "dpmpp_2m", "lcm"):
            yield (
                f"image to image {name}",
                lambda n=name: self.shared().image_to_image(
                    "a fox", picture, 0.5, num_inference_steps=6, seed=2, sampler=n
                ),
            )
        for strength in (0.5, 1.0):
            yield (
                f"inpaint {strength}",
                lambda s=strength: self.shared().inpaint(
                    "a penguin in the snow", picture, mask, strength=s, num_inference_steps=6, seed=2
                ),
            )
        for name in ("ddpm", "pndm", "euler_a", "heun"):
            yield (
                f"inpaint {name}",
                lambda n=name: self.shared().inpaint(
                    "a penguin", picture, mask, num_inference_steps=4, seed=2, sampler=n, negative_prompt="a dog"
                ),
            )
        yield "inpaint, fast preset", lambda: self.shared().inpaint("a penguin", picture, mask, preset="fast", seed=1)
        yield (
            "inpaint, every step",
            lambda: self.denoise(["a fox", "a cat"], picture, mask, num_inference_steps=4, seed=2, strength=0.9),
        )
        yield (
            "outpaint",
            lambda: self.shared().outpaint("a fox in the snow", picture, right=64, num_inference_steps=4, seed=2),
        )
        yield (
            "outpaint on all sides",
            lambda: self.shared().outpaint(
                "a fox", self.picture(3, 64, 96), left=32, top=16, bottom=8, right=24, num_inference_steps=3, seed=2
            ),
        )
        yield (
            "interpolate",
            lambda: self.shared().interpolate(("a fox", "a cat"), seeds=(7, 8), count=4, num_inference_steps=4),
        )
        yield (
            "interpolate, one seed, sampler",
            lambda: self.shared().interpolate(
                ("a fox", "a (cat:1.2)"),
                seeds=(7, 7),
                count=3,
                num_inference_steps=3,
                sampler="ddpm",
                clip_skip=2,
                width=64,
            ),
        )

    def adapters(self) -> Any:
        def drawn(change: Callable[[Any], Any], prompt: str = "a fox in the snow") -> Case:
            def case() -> Any:
                sd = self.load()
                change(sd)
                return [sd(prompt, num_inference_steps=3, seed=8), sd.encode_text(prompt)]

            return case

        peft, kohya = self.place / "peft.safetensors", self.place / "kohya.safetensors"
        yield "lora peft", drawn(lambda sd: sd.load_lora(peft, weight=0.8))
        yield "lora kohya", drawn(lambda sd: sd.load_lora(kohya))
        yield "lora with feature reuse", lambda: self.with_lora(peft)
        yield "lora two", drawn(lambda sd: [sd.load_lora(peft, "a", 0.5), sd.load_lora(kohya, "b", -0.3)])
        yield (
            "lora set_adapters",
            drawn(lambda sd: [sd.load_lora(peft), sd.load_lora(kohya), sd.set_adapters({"kohya": 0.4})]),
        )
        yield "lora fused", drawn(lambda sd: [sd.load_lora(peft), sd.load_lora(kohya, weight=0.5), sd.fuse_lora()])
        yield "lora unfused", drawn(lambda sd: [sd.load_lora(kohya), sd.fuse_lora(), sd.unfuse_lora()])
        yield (
            "lora one of two unloaded",
            drawn(lambda sd: [sd.load_lora(peft), sd.load_lora(kohya), sd.unload_lora("peft")]),
        )
        yield "lora unloaded", drawn(lambda sd: [sd.load_lora(peft), sd.fuse_lora(), sd.unload_lora()])
        one, three = self.inputs / "one.safetensors", self.inputs / "three.safetensors"
        yield "textual inversion", drawn(lambda sd: sd.load_textual_inversion(one), "a <one> in the snow")
        yield (
            "textual inversion of 3 vectors",
            drawn(lambda sd: sd.load_textual_inversion(three, "wug"), "a (wug:1.2), two wugs"),
        )
        yield (
            "textual inversion and lora",
            drawn(
                lambda sd: [sd.load_textual_inversion(one), sd.load_textual_inversion(three), sd.load_lora(peft)],
                "a <one> and a <three>",
            ),
        )

    def with_lora(self, path: Path) -> Any:
        sd = self.load()
        sd.load_lora(path)
        return sd("a fox", num_inference_steps=4, seed=8, feature_reuse=(2, 2))

    def models(self) -> Any:
        for name in ("sd1", "sd2"):
            for sampler in ("ddim", "euler_a", "heun", "dpmpp_2m"):
                yield (
                    f"model {name} {sampler}",
                    lambda n=name, s=sampler: self.shared(n)(
                        "a fox in the snow", num_inference_steps=3, seed=8, sampler=s
                    ),
                )
        yield "model sd1, defaults", lambda: self.shared("sd1")("a fox", seed=8)
        yield (
            "model sd1, feature reuse",
            lambda: self.shared("sd1")("a fox", num_inference_steps=4, seed=8, feature_reuse=(2, 2)),
        )
        yield "model in float16", lambda: self.shared("half", variant="fp16")("a fox", num_inference_steps=3, seed=8)
        picture, mask = self.picture(5, 64, 64), self.mask(64, 64)
        for strength in (1.0, 0.6):
            yield (
                f"model inpaint {strength}",
                lambda s=strength: self.shared("inpaint").inpaint(
                    "a fox", picture, mask, strength=s, num_inference_steps=4, seed=8
                ),
            )
        yield (
            "model inpaint, outpaint",
            lambda: self.shared("inpaint").outpaint("a fox", picture, left=16, num_inference_steps=3, seed=8),
        )
        yield (
            "model inpaint, reuse and interval",
            lambda: self.shared("inpaint").inpaint(
                "a fox",
                picture,
                mask,
                num_inference_steps=4,
                seed=8,
                feature_reuse=(2, 1),
                guidance_interval=(0.0, 0.6),
            ),
        )
        yield "model saved and loaded", lambda: self.saved()

    def saved(self) -> Any:
        folder = self.place / "saved"
        self.shared("sd2").save_pretrained(folder)
        from minisd import StableDiffusion

        return StableDiffusion.from_pretrained(folder)("a fox", num_inference_steps=3, seed=8)

    def command(self) -> Any:
        def run(name: str, *arguments: str) -> Case:
            def case() -> Any:
                from PIL import Image

                folder = self.place / name.replace(" ", "-")
                folder.mkdir()
                command = [sys.executable, "-m", "minisd", *arguments, "--model", str(self.model)]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
                return [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]

            return case

        steps = ("--steps", "3", "--seed", "5")
        options = ("--sampler", "euler", "--karras", "--guidance", "3", "--negative", "a dog")
        prompts = self.place / "prompts.jsonl"
        lines = [
            {"prompt": "a fox", "seed": 4},
            {"prompt": "a cat", "num_inference_steps": 2, "sampler": "ddpm", "width": 64},
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.picture().save(self.place / "in.png")
        self.mask().save(self.place / "mask.png")
        image = ("--image", str(self.place / "in.png"))
        yield "command generate", run("c1", "generate", "a fox", "--output", "a.png", *steps, *options)
        yield "command generate, several", run("c2", "generate", "a fox", "--images", "3", "--output", "a.png", *steps)
        yield "command generate --image", run("c3", "generate", "a fox", *image, "--output", "a.png", *steps)
        yield (
            "command generate --mask",
            run("c4", "generate", "a fox", *image, "--mask", str(self.place / "mask.png"), "--output", "a.png", *steps),
        )
        yield "command generate --prompts", run("c5", "generate", "--prompts", str(prompts), "--output", "o", *steps)
        yield (
            "command generate --preset",
            run("c6", "generate", "a fox", "--preset", "fast", "--output", "a.png", "--seed", "1"),
        )
        yield (
            "command generate --lora",
            run(
                "c7",
                "generate",
                "a fox",
                "--lora",
                f"{self.place / 'peft.safetensors'}:0.5",
                "--output",
                "a.png",
                *steps,
            ),
        )
        yield "command interpolate", run("c8", "interpolate", "a fox", "a cat", "--images", "3", *steps[:2])


if __name__ == "__main__":
    sys.exit(main())
