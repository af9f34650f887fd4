"""Take the screenshot of `minisd serve` for README: python tools/serve_picture.py docs/serve.png [WIDTH HEIGHT]"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/app")]
from browsers import chromium  # noqa: E402
from test_web import Opened, started  # noqa: E402


def main(path: Path, width: int = 1080, height: int = 740) -> None:
    """Draw a picture in the page, click a word, and save a screenshot of a window of this size."""
    with TemporaryDirectory() as folder, started(Path(folder), Path(folder) / "log") as address, chromium() as browser:
        opened = Opened.at(browser, address, width, height)
        opened.draw(prompt="a fox in the snow", seed="7")
        opened.wait("drawn in")
        opened.choose("fox")
        opened.wait("“fox”")
        opened.page.mouse.move(0, 0)
        opened.page.wait_for_timeout(500)  # until the colours have faded in
        opened.page.screenshot(path=str(path))
    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
