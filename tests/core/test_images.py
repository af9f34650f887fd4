"""Pictures and tensors: pixels worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.features.pictures import to_rgb
from minisd.images import from_pil, grid, to_images, to_pixels


def test_to_rgb_reads_every_mode():
    red, white = Image.new("RGB", (8, 8), (255, 0, 0)), torch.ones(1, 3, 8, 8)
    expected = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.equal(from_pil(red), expected)
    assert torch.equal(from_pil(to_rgb(red.convert("RGBA"))), expected)
    assert torch.equal(from_pil(to_rgb(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))), white)  # transparent
    assert torch.equal(from_pil(to_rgb(Image.new("L", (8, 8), 255))), white)
    assert torch.equal(from_pil(to_rgb(Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)))), white)


def test_pixels_survive_the_way_to_images_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert np.array_equal(to_pixels(to_images(pixels)), pixels)


def test_grid_places_pictures_in_reading_order():
    sheet = grid([Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")])
    assert sheet.size == (8, 8)
    assert [sheet.getpixel(place) for place in ((0, 0), (4, 0), (0, 4))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    captioned = grid([Image.new("RGB", (64, 64), "red")] * 2, columns=2, captions=["a fox", "a very long caption " * 3])
    assert captioned.width == 128 and captioned.height > 64
    assert {captioned.getpixel((x, y)) for x in range(128) for y in range(64)} == {(255, 0, 0)}
    assert any(captioned.getpixel((x, y)) != (255, 255, 255) for x in range(64) for y in range(64, captioned.height))
    with pytest.raises(ValueError, match="got 1 captions for 2"):
        grid([Image.new("RGB", (4, 4))] * 2, captions=["one"])
    with pytest.raises(ValueError, match="same size"):
        grid([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
