"""The notebooks' pictures: pixels worked out by hand, files that are the same twice, words for those who cannot see."""

from __future__ import annotations

import io
from base64 import b64decode

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from minisd import figures


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What `display` was given, in place of a notebook."""
    kept: list[tuple[dict, dict]] = []
    monkeypatch.setattr(figures, "display", lambda data, metadata=None, raw=False: kept.append((data, metadata)))
    return kept


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_enlarge_repeats_pixels_and_does_not_shrink():
    small, large = noise(128, 128), noise(512, 300)
    assert np.array_equal(np.asarray(figures.enlarge(small)), np.asarray(small).repeat(2, 0).repeat(2, 1))
    assert figures.enlarge(large).tobytes() == large.tobytes()


@pytest.mark.parametrize("native", [24, 40, 100, 192])
def test_film_strip_fits_pictures_to_its_cells(native):
    red, blue = (Image.new("RGB", (native, native), color) for color in ("#ff0000", "#0000ff"))
    strip = np.asarray(figures.film_strip({"": [red, blue], "row": [blue, red]}, ["first", "second"]))
    side = 100 if native == 100 else 120  # whole multiples, or shrunk
    for color in ((255, 0, 0), (0, 0, 255)):
        assert (strip == color).all(axis=-1).sum() == 2 * side * side
    red, blue = (Image.new("RGB", (40, 40), color) for color in ("#ff0000", "#0000ff"))
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        figures.film_strip({"a": [red], "b": [red, blue]})
    with pytest.raises(ValueError, match="1 column names"):
        figures.film_strip({"a": [red, blue]}, ["one"])


def test_paint_goes_from_black_to_white():
    picture = figures.paint(torch.tensor([[-3.0, 0.0], [3.0, 99.0]]), -3, 3, "gray")
    assert np.asarray(picture)[..., 0].tolist() == [[0, 128], [255, 255]]
    grey = figures.channels(torch.full((1, 4, 2, 2), -5.0))
    assert len(grey) == 4 and all(np.asarray(one).max() == 0 for one in grey)


def test_heat_is_bright_where_weights_are_large():
    weights = torch.zeros(8, 8)
    weights[1, 6] = 1
    heat = np.asarray(figures.heat_over(Image.new("RGB", (64, 64), "#808080"), weights).convert("L"))
    assert np.unravel_index(heat.argmax(), heat.shape)[0] // 8 == 1
    assert np.unravel_index(heat.argmax(), heat.shape)[1] // 8 == 6


def test_heat_map_is_a_table_of_its_values():
    values = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    table = figures.heat_map(values, ["a", "b"], ["x", "y", "z"], digits=None, cell=20).convert("L")
    cells = np.asarray(table).astype(int)[-2 * 20 :, -3 * 20 :].reshape(2, 20, 3, 20)
    assert cells.min((1, 3)).tolist() == cells.max((1, 3)).tolist()  # one colour to a cell
    means = cells.mean((1, 3))
    assert (means > 128).tolist() == (values > 0.5).tolist()
    with pytest.raises(ValueError, match=r"\(2, 3\) with 2 row and 2 column names"):
        figures.heat_map(values, ["a", "b"], ["x", "y"])


def test_shape_ladder_draws_all_maps_of_one_width():
    varied = torch.stack([torch.zeros(16, 16), torch.eye(16), 5 * torch.eye(16), *torch.zeros(5, 16, 16)])[None]
    ladder = figures.shape_ladder({"picture": torch.zeros(1, 3, 64, 64), "features": varied})
    pixels = np.asarray(ladder)
    assert ladder.width == 2 * 106 and ladder.height == 2 * 100 + 58
    assert (pixels[:96, 5:101] == 128).all()  # a picture of 64 × 64 in a column of 96 + 10
    assert (pixels[100:196, :106] == 255).all()  # it has one face only
    for top in (0, 100):  # the two most varied channels: bright diagonals of 16 places, 6 pixels each
        face = pixels[top : top + 96, 111:207].astype(int)
        assert face[3, 3].sum() > face[3, 93].sum() + 200
        assert (face[:6, :6] == face[0, 0]).all() and (face[0, 6] == face[0, 95]).all()


def test_plot_picture_has_few_colours_and_closes_the_plot():
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    picture = figures.plot_picture(figure, colors=16)
    assert len(picture.getcolors()) <= 16 and picture.width > 100
    assert not plt.fignum_exists(figure.number)


def test_token_row_colours_boxes_by_weight():
    row = np.asarray(figures.token_row(["a</w>", "fox</w>"], [320, 3240], torch.tensor([0.0, 1.0])))
    assert tuple(row[30, 15]) == (255, 255, 255)
    assert tuple(row[30, -20]) == (0x56, 0xB4, 0xE9)


def test_diagram_lights_the_parts_that_are_named():
    def lit(*names: str) -> int:
        pixels = np.asarray(figures.you_are_here(*names).convert("RGB")).astype(int)
        return int((np.abs(pixels - (0x56, 0xB4, 0xE9)).max(axis=-1) < 8).sum())

    one, two = lit("unet"), lit("unet", "sampler")
    assert 0 < one < two < lit() == lit(*figures.STAGES)
    with pytest.raises(ValueError, match="no part is called u-net; choose from tokenizer"):
        figures.you_are_here("u-net")


def test_diagram_of_editing_has_an_encoder_that_is_lit_with_the_autoencoder():
    def lit(*names: str) -> int:
        pixels = np.asarray(figures.you_are_here(*names, from_picture=True).convert("RGB")).astype(int)
        return int((np.abs(pixels[140:] - (0x56, 0xB4, 0xE9)).max(axis=-1) < 8).sum())

    assert lit("noise") == 0 < lit("autoencoder") == lit()
    assert figures.you_are_here("noise").height < 140 < figures.you_are_here("noise", from_picture=True).height


@pytest.mark.parametrize(
    ("picture", "kind"), [(noise(4, 4).resize((128, 128)), "jpeg"), (figures.you_are_here(), "png")]
)
def test_show_gives_text_and_the_same_bytes_twice(picture, kind, shown):
    figures.show(picture, "a diagram")
    figures.show(picture, "a diagram")
    (data, metadata), again = shown[0], shown[1]
    assert (data, metadata) == again
    assert data["text/plain"] == metadata[f"image/{kind}"]["alt"] == "a diagram"
    decoded = Image.open(io.BytesIO(b64decode(data[f"image/{kind}"]))).convert("RGB")
    difference = np.asarray(decoded, dtype=float) - np.asarray(picture.convert("RGB"), dtype=float)
    assert np.abs(difference).mean() <= (3 if kind == "jpeg" else 0)


def test_show_wants_a_text_and_closes_plots(shown):
    with pytest.raises(ValueError, match="say in `alt` what it shows"):
        figures.show(noise(8, 8), " ")
    for _ in range(2):
        plot = Figure(figsize=(2, 1))
        plot.subplots().plot([1, 2])
        figures.show(plot, "a line that rises")
    assert shown[0] == shown[1]
    assert b"Software" not in b64decode(shown[0][0]["image/png"])


def test_setup_says_which_model_it_is(monkeypatch, capsys):
    monkeypatch.delenv("MINISD_MODEL", raising=False)
    figures.notebook_setup()
    first = torch.rand(3)
    assert figures.shipped() and "the tiny one" in capsys.readouterr().out
    monkeypatch.setenv("MINISD_MODEL", "owner/name")
    figures.notebook_setup()
    assert torch.equal(torch.rand(3), first)
    assert not figures.shipped() and figures.model_source() == "owner/name"
    assert "name (MINISD_MODEL)" in capsys.readouterr().out


def test_load_model_takes_what_minisd_model_names(monkeypatch, small_model):
    monkeypatch.setenv("MINISD_MODEL", str(small_model))
    assert figures.load_model().config.unet.sample_size == 4


def test_slider_redraws_when_it_moves(shown, monkeypatch):
    boxes = []
    monkeypatch.setattr(figures, "display", boxes.append)
    drawn = []

    def draw(value: int) -> Image.Image:
        drawn.append(value)
        return Image.new("RGB", (4, 4), (value, 0, 0))

    figures.slider(draw, "step", 5, alt="squares that grow red")
    handle, frame, _ = boxes[0].children
    before = frame.value
    handle.value = 4
    assert drawn == [0, 4] and frame.value != before
    assert Image.open(io.BytesIO(frame.value)).getpixel((0, 0)) == (4, 0, 0)


def test_load_model_takes_the_dtype_that_minisd_dtype_names(monkeypatch, small_model):
    monkeypatch.setenv("MINISD_MODEL", str(small_model))
    monkeypatch.setenv("MINISD_DTYPE", "float16")
    assert figures.load_model().dtype == torch.float16
    monkeypatch.setenv("MINISD_DTYPE", "float8")
    with pytest.raises(ValueError, match="MINISD_DTYPE='float8'; expected float32, float16 or bfloat16"):
        figures.load_model()
