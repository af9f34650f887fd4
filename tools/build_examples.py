"""Rebuild the default training pictures of `minisd train lora` and `minisd train inversion`.

They show the unicorn of Fluent Emoji (MIT licence), which the scenes of the tiny model do not have, on the backgrounds
of these scenes. It is never in the snow or under the sea, so that such prompts are new to the trained adapter.

    npm install --prefix /tmp/npm @iconify-json/fluent-emoji@1.2.7
    pip install resvg-py
    python tools/build_examples.py /tmp/npm/node_modules/@iconify-json/fluent-emoji/icons.json
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
from build_atlas import rasterise
from PIL import Image, ImageOps

from minisd.training.backgrounds import FRAME, HORIZON, PIXEL, PLAIN, background, disc
from minisd.training.captions import PLACE_PHRASES, TIME_PHRASES, article

EXAMPLES = Path(__file__).parents[1] / "minisd/assets/examples"
NOUN = "unicorn"
LAND = ("meadow", "desert", "beach", "mountains")
TIMES = ("day", "sunset", "night")


def caption(place: str, time: str) -> str:
    """The caption of a picture, as the captions of scenes are worded."""
    where = PLACE_PHRASES.get(place, f"on {article(place)} {place} background")
    return " ".join(filter(None, ("a", NOUN, where, TIME_PHRASES.get(time))))


def compose(drawing: Image.Image, place: str, time: str, rng: np.random.Generator) -> Image.Image:
    """Compose a picture: the drawing (RGBA) in a place, standing on the ground or floating."""
    scale = rng.integers(66, 101) / max(drawing.size)
    width, height = (side * scale for side in drawing.size)
    pixel_size = [round(side / PIXEL) for side in (width, height)]
    small = drawing.convert("RGBa").resize(pixel_size, Image.Resampling.BICUBIC).convert("RGBA")
    x = 64 + rng.uniform(-1, 1) * (FRAME - width) * 0.4
    y = 64 + rng.uniform(-1, 1) * (FRAME - height) * 0.4
    pixels = background(place, time, int(rng.integers(2**31)))
    if place in LAND:
        foot = rng.uniform(HORIZON + 32, 121)
        y = foot - height / 2
        pixels *= 1 - 0.35 * disc(x, foot - 2, width * 0.46, softness=width * 0.2, squash=0.16)[..., None]
    picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).convert("RGBA")
    layer = Image.new("RGBA", picture.size)
    corner = round((x - width / 2) / PIXEL), round((y - height / 2) / PIXEL)
    layer.paste(ImageOps.mirror(small) if rng.random() < 0.5 else small, corner)
    return Image.alpha_composite(picture, layer).convert("RGB")


def build(icons: dict, folder: Path = EXAMPLES) -> int:
    """Write the pictures, and metadata.jsonl with their captions; return the number of pictures."""
    drawing = rasterise(icons, NOUN)
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    backgrounds = (
        [*product(LAND, TIMES)] * 2 + [("space", "day")] * 3 + [(color, "day") for color in PLAIN if color != "gray"]
    )
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (place, time) in enumerate(backgrounds):
        name = f"{index:02}.webp"
        compose(drawing, place, time, np.random.default_rng((0, index))).save(
            folder / name, "WEBP", quality=90, method=6
        )
        lines.append(json.dumps({"file_name": name, "text": caption(place, time)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(backgrounds)


def main() -> None:
    """Rebuild the pictures from the icons.json of the npm package."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("icons", type=Path, help="icons.json of @iconify-json/fluent-emoji")
    count = build(json.loads(parser.parse_args().icons.read_text(encoding="utf-8")))
    print(f"{EXAMPLES}: {count} pictures, {sum(p.stat().st_size for p in EXAMPLES.iterdir()) / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
