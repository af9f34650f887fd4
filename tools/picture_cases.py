"""The cases that `same_pictures.py` draws: samplers, guidance, prompts, sizes, parts, feature reuse.

Each method yields the names of cases, each with a function that draws it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LONG = ", ".join(["a red fox in the snow at night", "a blue car on the beach"] * 9)  # more than 75 tokens

Case = Callable[[], Any]


class Cases:
    """Cases by name. A model is loaded once and shared, except by the cases that change it."""

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

    def picture(self, seed: int = 1, width: int = 192, height: int = 192) -> Any:
        from PIL import Image

        noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

    def mask(self, width: int = 192, height: int = 192) -> Any:
        from PIL import Image

        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 4, height // 8, 3 * width // 4, 5 * height // 8))
        return mask

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
        """All steps of `denoise`, and the picture and preview of the last one."""
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
            lambda: self.denoise("a fox", latents=self.noise(1, 4, 24, 24), num_inference_steps=3),
        )
        yield (
            "denoise from image tensors",
            lambda: self.denoise(
                ["a fox", "a cat"], self.noise(2, 3, 192, 192).clamp(-1, 1), strength=0.5, num_inference_steps=6, seed=2
            ),
        )
        yield "decode", lambda: self.shared().decode(self.noise(2, 4, 24, 24))
        yield "decode_to_tensor", lambda: self.shared().decode_to_tensor(self.noise(1, 4, 12, 20))
        yield "encode_image", lambda: self.shared().encode_image(self.picture(2, 96, 160))
        yield "predict", lambda: self.predict()
        yield "the parts themselves", lambda: self.alone()

    def predict(self) -> Any:
        sd, latents = self.shared(), self.noise(1, 4, 24, 24)
        contexts = sd.encode_text(["a dog", "a fox"])
        return [sd.predict(latents, 500, contexts, 4.0), sd.predict(latents, 3.5, contexts[1:])]

    def alone(self) -> Any:
        sd, torch = self.shared(), self.torch
        with torch.inference_mode():
            ids = sd.tokenizer("a fox in the snow")
            context = sd.text_encoder(ids)
            prediction = sd.unet(self.noise(1, 4, 24, 24), torch.tensor(300.0), context)
            image = sd.autoencoder.decode(self.noise(1, 4, 24, 24))
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
