"""Make a captioned folder of up to 500 small pictures, to try `minisd train … --data` on.

npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz
python tools/emoji_pictures.py package/assets pictures

The pictures are Microsoft's Fluent emoji in three dimensions (MIT License): animals, plants, food, things and vehicles,
each on white, with its Unicode name as its caption ("fox face"). None of them is part of this package.
"""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path

from PIL import Image

SIDE, COUNT = 128, 500
BLOCKS = [  # first and last code points
    (0x1F400, 0x1F43E),  # animals
    (0x1F32D, 0x1F37F),  # plants and food
    (0x1F950, 0x1F9CB),  # food and animals
    (0x1FAD0, 0x1FADF),
    (0x1F680, 0x1F6A4),  # vehicles
    (0x1F3A0, 0x1F3E0),  # leisure
    (0x1F451, 0x1F462),  # clothes
    (0x1F600, 0x1F640),  # faces
    (0x1F488, 0x1F4FF),  # things
]


def collect(source: Path, folder: Path) -> int:
    """Write pictures and captions into `folder`, and return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = [code for first, last in BLOCKS for code in range(first, last + 1)]
    found = [code for code in codes if (source / f"{code:x}.webp").exists() and unicodedata.name(chr(code), "")]
    for code in found[:COUNT]:
        with Image.open(source / f"{code:x}.webp") as picture:
            picture = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(white, picture).convert("RGB").save(folder / f"{code:x}.png")
        caption = unicodedata.name(chr(code)).lower().replace("-", " ")
        (folder / f"{code:x}.txt").write_text(caption + "\n", encoding="utf-8")
    return min(len(found), COUNT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of WebP pictures named by code point")
    parser.add_argument("folder", type=Path, help="where pictures and captions go")
    options = parser.parse_args()
    print(collect(options.source, options.folder), "pictures in", options.folder)
