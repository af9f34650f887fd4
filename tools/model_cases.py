"""More cases that `same_pictures.py` draws: editing, adapters, small models of every kind, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from picture_cases import Case, Cases


class AllCases(Cases):
    """All cases by name."""

    def collect(self) -> dict[str, Case]:
        groups = [self.samplers, self.guidance, self.prompts, self.sizes, self.parts, self.reuse]
        groups += [self.editing, self.inpainting, self.outpainting, self.adapters, self.models, self.command]
        return {name: case for group in groups for name, case in group()}

    def editing(self) -> Any:
        picture = self.picture()
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

    def inpainting(self) -> Any:
        picture, mask = self.picture(), self.mask()
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

    def outpainting(self) -> Any:
        picture = self.picture()
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

    def run(self, name: str, *arguments: str) -> Case:
        """A case that runs `minisd` in a folder of its own, and returns the pictures that it wrote."""

        def case() -> Any:
            from PIL import Image

            folder = self.place / name
            folder.mkdir()
            command = [sys.executable, "-m", "minisd", *arguments, "--model", str(self.model)]
            process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(f"exit code {process.returncode}: {process.stderr.strip().splitlines()[-1]}")
            return [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]

        return case

    def command(self) -> Any:
        run = self.run
        steps = ("--steps", "3", "--seed", "5")
        options = ("--sampler", "euler", "--karras", "--guidance", "3", "--negative", "a dog")
        prompts = self.place / "prompts.jsonl"
        lines = [
            {"prompt": "a fox", "seed": 4},
            {"prompt": "a cat", "num_inference_steps": 2, "sampler": "ddpm", "width": 64},
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
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
        lora = ("--lora", f"{self.place / 'peft.safetensors'}:0.5")
        yield "command generate --lora", run("c7", "generate", "a fox", *lora, "--output", "a.png", *steps)
        yield "command interpolate", run("c8", "interpolate", "a fox", "a cat", "--images", "3", *steps[:2])
