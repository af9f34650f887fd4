"""Rebuild the sprite atlas that `minisd.training.sprites` reads, from the published Fluent Emoji drawings.

The drawings are the "Color" set of Microsoft's Fluent Emoji (MIT licence), as SVG from an npm package. Only this script
needs the package and `resvg-py`; training needs neither.

    npm install --prefix /tmp/npm @iconify-json/fluent-emoji@1.2.7
    pip install resvg-py
    python tools/build_atlas.py /tmp/npm/node_modules/@iconify-json/fluent-emoji/icons.json
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from minisd.training.catalogue import CATALOGUE
from minisd.training.sprites import ATLAS, CELL, COLUMNS

OVERSAMPLING = 8


def rasterise(icons: dict, name: str) -> Image.Image:
    """Rasterise an icon, cropped to its visible part and fitted into a transparent CELL × CELL square.

    Raises KeyError if the package has no icon of that name.
    """
    import resvg_py

    body, view = icons["icons"][name]["body"], icons["width"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {view} {view}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg, width=CELL * OVERSAMPLING))
    icon = Image.open(io.BytesIO(png)).convert("RGBA")
    visible = Image.fromarray((np.asarray(icon)[..., 3] > 24).astype(np.uint8) * 255)
    cropped = icon.crop(visible.getbbox()).convert("RGBa")  # premultiplied, so that edges stay clean when shrunk
    scale = (CELL - 2) / max(cropped.size)
    small = cropped.resize((round(cropped.width * scale), round(cropped.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(small.convert("RGBA"), ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell


def build(icons_path: Path, target: Path = ATLAS) -> None:
    """Write the atlas: the sprites of the catalogue in order, row by row, in one transparent WebP file."""
    icons = json.loads(icons_path.read_text(encoding="utf-8"))
    rows = math.ceil(len(CATALOGUE) / COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, entry in enumerate(CATALOGUE):
        atlas.paste(rasterise(icons, entry.icon), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    target.parent.mkdir(parents=True, exist_ok=True)
    atlas.save(target, "WEBP", quality=95, method=6)


def main() -> None:
    """Rebuild the atlas from the icons.json of the npm package."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("icons", type=Path, help="icons.json of @iconify-json/fluent-emoji")
    build(parser.parse_args().icons)
    print(f"{ATLAS}: {len(CATALOGUE)} sprites, {ATLAS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
