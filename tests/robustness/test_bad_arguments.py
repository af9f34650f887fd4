"""Bad arguments, one at a time and mixed at random, to everything public and to the command: refused, or a picture.

Which values are good and which are bad is written down by hand below. An error counts only where the package raised it
on purpose: of a documented type, in a `raise` of its own, with a sentence. MINISD_HUNT=4000 tries that many mixtures;
`hunt.py` sets it.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import math
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd import Sampler, Schedule, StableDiffusion
from minisd.app import cli
from minisd.app.options import LoadOptions
from minisd.features.adapters import layers_of
from minisd.guidance import Guidance
from minisd.io.adapter_files import save_lora
from minisd.lora import LoRA, LowRank
from minisd.samplers import SAMPLERS

HUNT = int(os.environ.get("MINISD_HUNT", 0))
DOCUMENTED = (TypeError, ValueError, FloatingPointError, OSError)
NAN, INF = float("nan"), float("inf")


def hunt(share: float, few: int) -> settings:
    """This share of MINISD_HUNT, at random; without it `few` examples, the same ones every time."""
    return settings(
        max_examples=max(1, round(share * HUNT)) if HUNT else few,
        derandomize=not HUNT,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=bool(HUNT),
    )


@pytest.fixture(scope="module")
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


def assert_on_purpose(error: Exception) -> None:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    told = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}: {line})"
    assert isinstance(error, DOCUMENTED), told
    assert Path(minisd.__file__).parent in Path(frame.filename).parents and line.startswith("raise"), told
    assert 20 < len(str(error)) < 500 and "\n" not in str(error), told


def noise_picture(mode: str, width: int = 32, height: int = 24) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(pixels[..., 0].astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    if "a" in mode.lower():
        return Image.fromarray(pixels).convert(mode[:-1] + "A").convert(mode)
    return Image.fromarray(pixels[..., :3]).convert(mode)


def rotated() -> Image.Image:
    """A picture stored 24×32 that its EXIF entry turns into 32×24."""
    picture = noise_picture("RGB", 24, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    return Image.open(buffer)


def transparent() -> Image.Image:
    picture = noise_picture("P")
    picture.info["transparency"] = 3
    return picture


def with_nan(*shape: int) -> torch.Tensor:
    x = torch.zeros(shape)
    x.view(-1)[-1] = NAN
    return x


MODES = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I", "F")
MASK = np.zeros((24, 32), np.uint8)
MASK[8:16, 8:24] = 255
GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(1, 4, 4, 4, generator=GENERATOR)
EMBEDS = torch.randn(1, 77, 16, generator=GENERATOR)
SMALL = torch.rand(1, 3, 24, 32, generator=GENERATOR) * 2 - 1

# For each argument the values that must draw, and those that must be refused.
SIZES = [32, 24, 40, np.int64(16), None], [
    0, -8, 12, 33, 520, 10**6, 2**70, 64.0, "64", True, np.True_, NAN, [32], torch.tensor(32.0), b"32", object()
]  # fmt: skip
POOLS: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (
        ["fox", "", " \t\n", "fox " * 100, "a" * 300, "fox\0snow",
        "שלום عالم", "🦊🏳️‍🌈", "(fox:1.2) [snow]", np.str_("fox")],
        ["fox " * 10_000, "(fox:nan)", "(fox:99)",
         [], (), 7, None, b"fox", [None], [["fox"]], {"fox"}, "\ud800", ["fox", "a\udfffb"], [b"fox"], True, NAN],
    ),
    "negative_prompt": (["", "red snow", ["red"], "🦊"], [None, 7, [], ["a", "b", "c"], [None], b"x", "\udc00"]),
    "num_inference_steps": (
        [1, 2, 3, np.int64(2), None],
        [0, -1, 10**6, 1001, 1.5, 2.0, True, "3", NAN, [3], 2**70, b"1"],
    ),
    "guidance_scale": (
        [0, 1, 4.0, -2, 100, np.float32(3), None, torch.tensor(2.0)],
        [NAN, INF, -INF, "7", 1e30, 10**400, True, [7, 7, 7, 7, 7], 1 + 1j, torch.zeros(3), np.zeros(2), b"7"],
    ),
    "guidance_rescale": ([0, 0.5, 1], [-0.1, 1.1, NAN, "x", True, None, [0.5]]),
    "guidance_interval": (
        [(0, 1), (0.2, 0.5), [0.0, 1.0], (0, 0), None],
        [(0.8, 0.2), (0, 2), (0,), "01", 5, (NAN, 1), (0, "1"), (0, 0.5, 1), {0, 1}],
    ),
    "feature_reuse": (
        [(2, 1), [3, 6], (np.int64(1), 2), None],
        [(0, 1), (2, 7), (2, 0), (2,), (2, 1, 1), 3, "21", (2.0, 1), (True, 1), ("2", 1), {2, 1}, (2**70, 1), NAN],
    ),
    "preset": (["fast", np.str_("fast"), None], ["quick", "", 5, True, ["fast"], b"fast", NAN, object()]),
    "height": SIZES,
    "width": SIZES,
    "seed": (
        [0, 7, np.int64(5), None, 2**63 - 3],
        [-1, 2**63, 2**64, 1.0, "7", True, [1] * 7, [], [1.5], [None], NAN, b"7", torch.tensor(7.5)],
    ),
    "sampler": (
        ["ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", Sampler("euler", karras=True), None],
        ["dpm", "", 5, ["ddim"], object(), b"ddim", True],
    ),
    "num_images_per_prompt": ([1, 2, np.int64(1)], [0, -1, 1.0, "2", True, 10**9, None, 2**70]),
    "clip_skip": ([1, np.int64(1)], [0, 2, -1, 1.0, "1", True, None, 2**70]),
    "latents": (
        [LATENTS, LATENTS.double(), None],
        [LATENTS[0], LATENTS[:, :3], LATENTS.long(), with_nan(1, 4, 4, 4), LATENTS / 0, LATENTS.numpy(), "x", 5,
         LATENTS[:0], LATENTS.repeat(2, 1, 1, 1)],
    ),
    "prompt_embeds": (
        [EMBEDS, EMBEDS.half(), None],
        [EMBEDS[0], EMBEDS[:, :5], EMBEDS[..., :3], EMBEDS.long(), with_nan(1, 77, 16),
         EMBEDS.numpy(), "fox", [EMBEDS]],
    ),
    "image": (
        [*map(noise_picture, MODES), rotated(), transparent(), SMALL, SMALL.double(), SMALL.half()],
        [
            None, 5, "fox.png", b"", np.zeros((24, 32, 3), np.uint8),
            Image.new("RGB", (1, 1)), Image.new("RGB", (0, 0)),
            Image.new("RGB", (33, 32)), Image.new("RGB", (520, 8)),
            Image.fromarray(np.full((24, 32), NAN, np.float32)), SMALL[0], SMALL[:, :1], SMALL.repeat(3, 1, 1, 1),
            SMALL[:0], (SMALL * 255).byte(), SMALL * 255, with_nan(1, 3, 24, 32), SMALL / 0, SMALL[..., :30],
            torch.zeros(1).expand(1, 3, 10**6, 10**6),
        ],
    ),
    "mask_image": (
        [*(Image.fromarray(MASK).convert(mode) for mode in ("L", "1", "RGB", "RGBA", "LA", "P", "CMYK", "I", "F")),
         Image.fromarray(MASK.astype(np.uint16) * 257), Image.new("L", (32, 24), 255), torch.from_numpy(MASK > 0),
         torch.from_numpy(MASK)[None] / 255, torch.from_numpy(MASK)[None, None] // 255],
        [None, 5, "mask.png", MASK, MASK > 0, Image.new("L", (32, 24)), Image.new("L", (24, 32), 255),
         Image.new("L", (1, 1), 255), Image.new("L", (0, 0)), torch.from_numpy(MASK), with_nan(24, 32),
         torch.ones(24, 32, dtype=torch.complex64), torch.ones(24), torch.ones(3, 24, 32), torch.zeros(24, 32)],
    ),
    "strength": ([1, 0.9, 0.5, np.float64(0.7)], [0, -0.5, 1.1, NAN, INF, "0.5", True, [0.5], 0.01, b""]),
    "left": ([0, 8], [-8, 3, 10**6, 8.0, "8", True, None, NAN]),
    "prompts": ([("fox", "snow"), ["fox", ""]],
                [("fox",), "ab", None, 5, ("fox", None), ("a", "b", "c"), [], ("a", "\ud800")]),
    "seeds": ([(0, 1), [3, np.int64(3)], (2**63 - 1, 0)],
              [(1,), (1, 2, 3), (-1, 0), (0.5, 1), (None, 1), "12", (True, 1), 1.5]),
    "count": ([2, 3, np.int64(2)], [1, 0, -1, 2.0, "2", True, None, 10**9, 2**70]),
    "t": ([0.0, 500, torch.tensor(3.0)], [NAN, "5", True, [5]]),
}  # fmt: skip

TEXT = ("negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval", "seed",
        "sampler", "clip_skip", "feature_reuse", "preset")  # fmt: skip
# For each function the arguments it needs, and those it may be given.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "__call__": (("prompt",), (*TEXT, "height", "width", "num_images_per_prompt")),
    "denoise": (("prompt",), (*TEXT, "latents", "prompt_embeds")),
    "image_to_image": (("prompt", "image"), (*TEXT, "strength", "prompt_embeds")),
    "inpaint": (("prompt", "image", "mask_image"), (*TEXT, "strength")),
    "outpaint": (("prompt", "image"), (*TEXT, "left", "strength")),
    "interpolate": (("prompts", "seeds", "count"),
                    tuple(name for name in TEXT if name != "seed") + ("height", "width")),
    "encode_text": (("prompts",), ("clip_skip",)),
    "encode_image": (("image",), ()),
    "decode": (("latents",), ()),
    "decode_to_tensor": (("latents",), ()),
    "preview": (("latents",), ()),
    "unknown_words": (("prompt",), ()),
    "predict": (("latents", "t", "prompt_embeds"), ()),
}  # fmt: skip


def fitting(function: str, name: str) -> tuple[list[Any], list[Any]]:
    """The pool of an argument, less what is bad in general but good here, or the other way round."""
    good, bad = POOLS[name]
    if function in ("inpaint", "outpaint") and name == "image":  # they hand pixels back, so they want a picture
        tensors = [one for one in good if isinstance(one, torch.Tensor)]
        good, bad = [one for one in good if not isinstance(one, torch.Tensor)], [*bad, *tensors]
    if function == "encode_image":  # any number and size of images
        bad = [one for one in bad if not (tuple(getattr(one, "shape", ())) == (3, 3, 24, 32) or one_is(one, (520, 8)))]
    if function == "encode_text" and name == "prompts":  # any number of them
        bad = [one for one in bad if one not in (("fox",), "ab", ("a", "b", "c"))]
    if function in ("decode", "decode_to_tensor", "preview", "predict"):
        good = [one for one in good if one is not None]
        bad = [*bad, None]
        if name == "latents":
            bad = [one for one in bad if not (isinstance(one, torch.Tensor) and one.shape == (2, 4, 4, 4))]
        if function == "predict":
            bad = [one for one in bad if not (isinstance(one, torch.Tensor) and one.shape == (1, 5, 16))]
    if function == "unknown_words":  # of a prompt of any length
        bad = [one for one in bad if one != "fox " * 10_000]
    if function == "outpaint" and name == "image":
        bad = [one for one in bad if not one_is(one, (520, 8))] + [Image.new("RGB", (520, 520))]
    if function == "image_to_image" and name == "num_inference_steps":
        good = [one for one in good if one != 1]
    if name == "num_inference_steps" and function in ("inpaint", "outpaint"):
        good = [one for one in good if one != 1]
    return good, bad


def one_is(value: Any, size: tuple[int, int]) -> bool:
    return isinstance(value, Image.Image) and value.size == size


def call(sd: StableDiffusion, function: str, values: dict[str, Any]) -> Any:
    """Call a public function with arguments by name."""
    values = dict(values)
    if function == "outpaint":
        values.setdefault("right", 8)
    if function == "unknown_words":
        return sd.unknown_words(values["prompt"])
    if function == "predict":
        return sd.predict(values["latents"], values["t"], values["prompt_embeds"])
    result = getattr(sd, function)(**values)
    return list(result) if function == "denoise" else result


def assert_drawn(sd: StableDiffusion, function: str, values: dict[str, Any], result: Any) -> None:
    """What comes of good values only: as many pictures as asked for, of the size asked for, and not of one colour."""
    if function in ("encode_text", "encode_image", "decode_to_tensor", "predict"):
        expected = {
            "encode_text": (len(values.get("prompts", "")), 77, 16),
            "encode_image": (1, 4, 3, 4),
            "decode_to_tensor": (1, 3, 32, 32),
            "predict": (1, 4, 4, 4),
        }[function]
        assert tuple(result.shape) == expected and bool(torch.isfinite(result).all()) and float(result.std()) > 0
        return
    if function == "unknown_words":
        assert isinstance(result, list)
        return
    if function == "denoise":
        assert all(bool(torch.isfinite(x).all()) for step in result for x in (step.latents, step.x0, step.noise))
        assert [step.index for step in result] == list(range(result[0].calls))
        return
    pictures = result if isinstance(result, list) else [result]
    width, height = (int(values.get(name) or 32) for name in ("width", "height"))
    if function in ("image_to_image", "inpaint", "outpaint"):
        width, height = 32 + (8 + values.get("left", 0) if function == "outpaint" else 0), 24
    if function == "preview":
        width, height = 4, 4
    count = int(values.get("count", values.get("num_images_per_prompt", 1)))
    assert len(pictures) == count
    for picture in pictures:
        assert (picture.mode, picture.size) == ("RGB", (width, height))
        assert float(np.asarray(picture).std()) > 1


@pytest.mark.parametrize("function", CALLS)
def test_every_bad_value_is_refused_before_anything_is_drawn(
    sd: StableDiffusion, function: str, monkeypatch: pytest.MonkeyPatch, tally: Counter[str]
) -> None:
    resource = pytest.importorskip("resource")
    needed, optional = CALLS[function]

    if function != "predict":
        monkeypatch.setattr(sd.unet, "forward", forbidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in (*needed, *optional):
        for value in fitting(function, name)[1]:
            values = {each: fitting(function, each)[0][0] for each in needed} | {name: value}
            try:
                call(sd, function, values)
            except Exception as error:
                assert_on_purpose(error)
                tally["refused"] += 1
            else:
                pytest.fail(f"{function}({name}={value!r:.80}) was not refused")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kilobytes"


@pytest.mark.parametrize("function", CALLS)
@hunt(0.04, 8)
@given(data=st.data())
def test_mixed_values_draw_or_are_refused(
    sd: StableDiffusion, function: str, tally: Counter[str], data: st.DataObject
) -> None:
    """Any mixture with a bad value is refused, any other is drawn."""
    needed, optional = CALLS[function]
    given = [*needed, *data.draw(st.lists(st.sampled_from(optional or needed), unique=True, max_size=4), label="given")]
    given = list(dict.fromkeys(given))
    wrong = data.draw(st.lists(st.sampled_from(given), unique=True, max_size=2), label="wrong")
    wrong = [name for name in wrong if fitting(function, name)[1]]
    values = {name: data.draw(st.sampled_from(fitting(function, name)[name in wrong]), label=name) for name in given}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            result = call(sd, function, values)
    except Exception as error:
        assert_on_purpose(error)
        assert wrong, f"{values} were refused: {error}"
        tally["refused"] += 1
    else:
        assert not wrong, f"{wrong} of {values} were not refused"
        assert_drawn(sd, function, values, result)
        tally["whole"] += 1


@hunt(0.05, 60)
@given(
    name=st.sampled_from(list(SAMPLERS)),
    spacing=st.sampled_from([None, "leading", "trailing", "linspace", "odd", 3]),
    karras=st.booleans(),
    eta=st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, NAN, "1", None, True]),
    steps=st.one_of(st.integers(-2, 1003), st.sampled_from([1.5, "2", None, True])),
    start=st.one_of(st.integers(-2, 30), st.sampled_from([1.5, "2", None, True])),
)
def test_every_plan_is_finite_and_descends_or_is_refused(
    tally: Counter[str], name: str, spacing: Any, karras: bool, eta: Any, steps: Any, start: Any
) -> None:
    try:
        run = Sampler(name, spacing, karras, eta).plan(Schedule(), steps, start)
    except Exception as error:
        assert_on_purpose(error)
        tally["refused"] += 1
        return
    tally["whole"] += 1
    assert all(map(math.isfinite, (*run.timesteps, *run.sigmas, *run.fresh))) and run.sigmas[-1] < run.sigmas[0]
    assert all(a >= b >= 0 for a, b in zip(run.sigmas, run.sigmas[1:], strict=False))
    assert all(0 <= t <= 999 for t in run.timesteps)


def test_loading_and_saving_refuse_what_cannot_be(
    sd: StableDiffusion, small_model: Path, tmp_path: Path, tally: Counter[str]
) -> None:
    for choices in (
        {"device": "toaster"}, {"device": "cuda:99"}, {"device": 5}, {"device": b"cpu"}, {"device": "meta"},
        {"dtype": torch.int8}, {"dtype": torch.complex64}, {"dtype": "float16"}, {"dtype": 16}, {"dtype": torch.bool},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as caught:
            StableDiffusion.from_pretrained(small_model, **choices)
        assert_on_purpose(caught.value)
        tally["refused"] += 1
    for dtype in (torch.int8, "float16", torch.uint8):
        with pytest.raises((TypeError, ValueError)) as caught:
            sd.save_pretrained(tmp_path / "model", dtype)
        assert_on_purpose(caught.value)
    assert not (tmp_path / "model").exists()
    for bad in ("7", None, NAN, 1e30, True):
        with pytest.raises((TypeError, ValueError), match="guidance_scale"):
            Guidance(bad)  # type: ignore[arg-type]


# What is loaded and saved, by path, name and weight.
PATHS: list[Any] = [
    "", " ", ".", "none.safetensors", "none/none", "a\0b", "x" * 5000, "\udc80", "https://huggingface.co/a/b", "a/b/c",
    "é/ö", "-", "/dev/null", "/dev/zero", "text.txt", "start.png", Path("none"), 5, 1.5, True, b"tiny", [], {},
    object(),
]  # fmt: skip
NUMBERS: list[Any] = [NAN, INF, -INF, "1", None, True, [1], 10**400, 1j, object()]
NAMES: list[Any] = ["", 5, True, b"style", ["style"], {}, 1.5]
FILES: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    "from_pretrained": {
        "source": (["model"], PATHS),
        "device": (["cpu"], ["toaster", "cuda:99", 5, b"cpu", "meta", [], True]),
        "dtype": ([torch.float32, None], [torch.int8, torch.complex64, "float16", 16, torch.bool, True]),
    },
    "load_lora": {
        "path": (["style.safetensors"], [*PATHS, "word.safetensors", "model", None]),
        "name": (["a", "a b", None], NAMES),
        "weight": ([1, 0.5, 0, -2, np.float32(1)], NUMBERS),
    },
    "load_textual_inversion": {
        "path": (["word.safetensors"], [*PATHS, "style.safetensors", "model", None]),
        "token": (["<new>", None], ["fox", " ", "\ud800", 5, True, b"x", ["<new>"], {}]),
    },
    "set_adapters": {
        "weights": (
            [{"style": 0.5}, {}],
            [None, 5, "style", [], {"none": 1}, {5: 1}, *({"style": weight} for weight in NUMBERS)],
        ),
    },
    "unload_lora": {"name": (["style", None], ["none", 5, b"style", ["style"], {}, True])},
    "save_pretrained": {
        "folder": (
            ["new", "model"],
            ["", ".", "text.txt", "x" * 300, "a\0b", "text.txt/new", 5, None, b"new", [], True],
        ),
        "dtype": ([None, torch.float16], [torch.int8, "float16", 16, torch.bool, True]),
    },
}


@pytest.mark.parametrize("function", FILES)
@hunt(0.02, 30)
@given(data=st.data())
def test_files_and_adapters_are_used_or_refused(
    desk: Path, sd: StableDiffusion, function: str, tally: Counter[str], data: st.DataObject
) -> None:
    """Where an argument is refused, nothing is loaded and nothing is written."""
    pools = FILES[function]
    first = next(iter(pools))
    wrong = data.draw(st.lists(st.sampled_from(list(pools)), unique=True, max_size=2), label="wrong")
    given = dict.fromkeys([first, *data.draw(st.lists(st.sampled_from(list(pools))), label="given"), *wrong])
    values = {name: data.draw(st.sampled_from(pools[name][name in wrong]), label=name) for name in given}
    tokens, before = sd.tokenizer, sorted(desk.rglob("*"))
    embedding = sd.text_encoder.token_embedding
    if function in ("set_adapters", "unload_lora"):
        sd.load_lora("style.safetensors")
    loaded = dict(sd.adapters.weights)
    try:
        getattr(sd, function)(**values)
    except Exception as error:
        assert_on_purpose(error)
        assert wrong, f"{values} were refused: {error}"
        assert sd.adapters.weights == loaded and sd.tokenizer is tokens and sorted(desk.rglob("*")) == before
        tally["refused"] += 1
    else:
        assert not wrong, f"{wrong} of {values} were not refused"
        tally["whole"] += 1
    finally:
        sd.unload_lora()
        sd.tokenizer = tokens
        sd.text_encoder.text_model["embeddings"].token_embedding = embedding
        shutil.rmtree(desk / "new", ignore_errors=True)


def test_what_memory_cannot_hold_is_refused_with_advice(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    # three maps of 8 channels, float32, at full size: 96 bytes a pixel
    monkeypatch.setattr("minisd.pipeline.parts.free_memory", lambda device: 96 * 32 * 32 * 3)
    assert len(sd("fox", num_images_per_prompt=3, num_inference_steps=1, seed=0)) == 3
    for draw in (
        lambda: sd("fox", num_images_per_prompt=4),
        lambda: sd("fox", height=64, width=64),
        lambda: sd.decode(torch.zeros(1, 4, 8, 8)),
        lambda: sd.encode_image(Image.new("RGB", (64, 64))),
        lambda: sd.interpolate(("fox", "red"), (0, 1), count=4),
        lambda: sd.outpaint("fox", Image.new("RGB", (32, 32)), right=96),
    ):
        with pytest.raises(ValueError, match="GB are free; draw smaller pictures or fewer at a time.*tile=True"):
            draw()


# The command. Arguments as they are typed, good and bad.
OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "--steps": (["1", "2"], ["0", "-1", "1000000", "1.5", "True", "many", "", "nan", "9" * 30]),
    "--seed": (["0", "7", str(2**63 - 2)], ["-1", str(2**63), str(2**64), "1.5", "x", ""]),
    "--guidance": (["1", "7.5", "-2", "0"], ["nan", "inf", "-inf", "1e30", "x", ""]),
    "--width": (["32", "24"], ["0", "-8", "33", "1000000", "64.5", "wide"]),
    "--height": (["32", "24"], ["0", "-8", "33", "1000000", "64.5", "high"]),
    "--images": (["1", "2"], ["0", "-1", "1000000000", "two"]),
    "--batch": (["1", "3"], ["0", "-1", "x"]),
    "--rescale": (["0", "0.5"], ["-1", "2", "nan", "x"]),
    "--clip-skip": (["1"], ["0", "2", "x"]),
    "--sampler": (["ddim", "heun"], ["magic", ""]),
    "--spacing": (["trailing"], ["odd"]),
    "--dtype": (["float32"], ["int8", "float128"]),
    "--device": (["cpu"], ["toaster", "cuda:99", ""]),
    "--negative": (["", "red", "🦊"], ["\udcff"]),
    "--output": (["a.png", "new/", "deep/er/a.png"], ["a.jpg", "a\0b.png", "a"]),
    "--image": (["start.png", "gray.png", "small.png"], ["none.png", ".", "text.txt"]),
    "--strength": (["1", "0.9"], ["0", "2", "nan", "x"]),
    "--mask": (["mask.png"], ["none.png", "black.png", "text.txt"]),
    "--outpaint": (["8 0 0 0"], ["3 0 0 0", "0 0 0 0", "-8 0 0 0", "1000000 0 0 0", "a b c d", "8 8"]),
}
PROMPTS = (
    ["fox", "", "fox\0snow", "שלום", "🦊 " * 50, "a" * 300, "../../etc/passwd", "fox/snow", "%s {0} \\n"],
    ["\udcff"],
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, sd: StableDiffusion) -> Iterator[Path]:
    """A folder with pictures, in which the command runs on a model that is loaded once."""
    folder = tmp_path_factory.mktemp("desk")
    noise_picture("RGB", 50, 40).save(folder / "start.png")
    noise_picture("L").save(folder / "gray.png")
    Image.new("RGB", (1, 1)).save(folder / "small.png")
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    Image.new("L", (32, 32)).save(folder / "black.png")
    sd.save_pretrained(folder / "model")
    layers = layers_of({"unet": sd.unet})
    save_lora(LoRA({name: LowRank(layers[name], 2) for name in list(layers)[:3]}), folder / "style.safetensors")
    save_file({"<word>": torch.randn(2, 16, generator=GENERATOR)}, folder / "word.safetensors")
    (folder / "text.txt").write_text("no picture")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.delenv("MINISD_DEBUG", raising=False)
        patch.setattr(cli, "app", typer.main.get_command(cli.app))  # built once, which takes most of a call's time
        patch.setattr(LoadOptions, "load_model", lambda self, dtype=None: (self.find_device(), sd)[1])
        yield folder


Run = Callable[[list[str]], tuple[int, str, str]]


def run(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def typed(options: dict[str, str]) -> list[str]:
    return [
        word
        for name, value in options.items()
        for word in (name, *(value.split() if name == "--outpaint" else [value]))
    ]


WORK = (  # what costs time, and must not have begun where something is refused
    "minisd.pipeline.stable_diffusion.StableDiffusion._contexts",
    "minisd.training.loop.Trainer.advance", "minisd.training.data.render",
    "minisd.evaluation.measure.evaluate", "minisd.bench.compare._import_seconds",
)  # fmt: skip


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


def assert_refused(folder: Path, arguments: list[str], run: Run = run, codes: tuple[int, ...] = (2,)) -> None:
    """The command ends with one line that says why, before any work; it prints and writes nothing."""
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        for work in WORK:
            patch.setattr(work, forbidden)
        code, out, err = run(arguments)
    _, told, reason = f"\n{err}".rpartition("\nerror: ")
    assert (code in (1, 2)) and not out, (arguments, code, out, err)
    assert told and reason and "Traceback" not in err and "unexpected " not in err, (arguments, err)
    assert "\n" not in reason.rstrip("\n") or "does not fit" in reason, (arguments, err)
    assert code in codes or "text.txt" in arguments, (arguments, code, err)
    assert sorted(folder.rglob("*")) == before, arguments


def test_every_bad_option_is_one_line_and_code_2(desk: Path, tally: Counter[str]) -> None:
    for name, (_, bad) in OPTIONS.items():
        for value in bad:
            options = {name: value}
            if name in ("--strength", "--mask", "--outpaint"):
                options["--image"] = "start.png"
            assert_refused(desk, ["generate", "fox", *typed(options)])
            tally["refused"] += 1
    for name in ("--strength", "--mask", "--outpaint"):  # nothing to change
        assert_refused(desk, ["generate", "fox", *typed({name: OPTIONS[name][0][0]})])
    assert_refused(desk, ["generate", "\udcff"])
    assert_refused(desk, ["generate", "fox", "--grid", "--images", "2000"])
    for words in (["fox", "\udcff"], ["fox", "red", "--seeds", "-1", "0"], ["fox", "red", "-n", "1000000"],
                  ["fox", "red", "--guidance", "nan"], ["fox", "red", "--steps", "0"]):  # fmt: skip
        assert_refused(desk, ["interpolate", *words])


@hunt(0.15, 25)
@given(data=st.data())
def test_mixed_options_draw_or_are_refused(desk: Path, tally: Counter[str], data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(OPTIONS)), unique=True, max_size=5), label="names")
    if {"--strength", "--mask", "--outpaint"} & {*names} and "--image" not in names:
        names.append("--image")
    if "--mask" in names:
        names = [name for name in names if name not in ("--outpaint", "--width", "--height")]
    wrong = data.draw(st.lists(st.sampled_from([*names, "prompt"]), unique=True, max_size=1), label="wrong")
    options = {name: data.draw(st.sampled_from(OPTIONS[name][name in wrong]), label=name) for name in names}
    prompt = data.draw(st.sampled_from(PROMPTS["prompt" in wrong]), label="prompt")
    arguments = ["generate", prompt, *typed(options)]
    if "--image" in options and options.get("--steps") == "1" and options.get("--strength", "") != "1":
        return  # one step at part of the strength runs none
    if wrong:
        assert_refused(desk, arguments)
        tally["refused"] += 1
        return
    code, out, err = run(arguments)
    assert code == 0 and "Traceback" not in err, (arguments, err)
    files = out.splitlines()
    assert len(files) == int(options.get("--images", 1)), (arguments, out)
    size = [int(options.get(name, 32)) for name in ("--width", "--height")]
    if "--outpaint" in options:
        size[0] += 8
    for file in files:
        with Image.open(file) as picture:
            assert list(picture.size) == size
            assert float(np.asarray(picture).std()) > (0 if options.get("--image") == "small.png" else 1)
        (desk / file).unlink()
    tally["whole"] += 1


PLACES = ["text.txt", "text.txt/deep", "a\0b", "x" * 300]
TRAINING: dict[str, list[str]] = {
    "--steps": ["0", "-1", "1.5", "x", "9" * 30],
    "--minutes": ["nan", "-1", "inf", "x"],
    "--batch": ["0", "-1", "x"],
    "--lr": ["nan", "inf", "-1", "x"],
    "--seed": ["-1", str(2**64), "x"],
    "--output": PLACES,
}
# Other commands: what they are given, and for each option (or place, where it has no name) what they refuse.
COMMANDS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "train scenes": (["new"], {
        "--count": ["0", "-1", "1000000000000", "x", "1.5"],
        "--seed": ["-1", "x"],
        "--mixture": ["0 0 0", "-1 1 1", "nan 1 1", "1 1"],
    }),
    "train lora": (["--steps", "1", "--model", "model"], TRAINING | {
        "--rank": ["0", "-1", "1000000", "x"],
        "--layers": ["some"],
        "--pictures": ["none", "text.txt", "."],
        "--prompt": ["\udcff", "fox " * 10_000, "(fox:nan)"],
        "--model": ["none", "text.txt", "", "style.safetensors"],
    }),
    "train inversion": (["--steps", "1", "--model", "model", "--initial", "fox"], TRAINING | {
        "--vectors": ["0", "-1", "1000", "x"],
        "--token": ["", "fox", "\udcff"],
        "--word": ["", " ", "zebra"],
        "--initial": ["", "zebra"],
        "--pictures": ["none", "text.txt", "."],
    }),
    "train judge": (["--steps", "1"], TRAINING),
    "train autoencoder": (["--steps", "1"], {"--scenes": ["none", "text.txt", "."], "--from": ["none", "text.txt"]}),
    "train clip": (["--steps", "1"], {"--scenes": ["none", "text.txt", "."]}),
    "train latents": ([], {"--scenes": ["none", "text.txt"], "--model": ["none", "text.txt"]}),
    "train unet": (["--steps", "1"], {"--scenes": ["none", "text.txt"], "--clip": ["none"], "--from": ["none"]}),
    "train export": (["new"], {"--unet": ["none"], "--clip": ["none"], "--autoencoder": ["none", "text.txt"]}),
    "train sheet": (["--model", "model"], {"": ["x.qqq", "x", "text.txt/x.png", "a\0b.png"], "--seeds": ["0", "x"]}),
    "info": ([], {
        "": ["none", "none.png", "text.txt", "start.png", "x" * 400, "a\0b", "", ".", "/dev/zero", "style.safetensors"],
        "--prediction-type": ["noise"],
    }),
    "evaluate": ([], {
        "--model": ["none", "text.txt"],
        "--count": ["0", "-1", "x", "10000000000"],
        "--steps": ["0", "100000", "x"],
        "--guidance": ["nan", "inf", "x"],
        "--output": PLACES,
    }),
    "bench": (["--model", "tiny", "--alone"], {
        "--model": ["none", "text.txt"],
        "--size": ["0", "-64", "33", "1000000", "x"],
        "--steps": ["-1", "x"],
        "--repeats": ["0", "x"],
        "--threads": ["0", "x"],
        "--device": ["toaster", "cuda:99"],
        "--dtype": ["int8"],
        "--output": ["text.txt/x.json", "a\0b/x.json"],
    }),
    "interpolate": (["fox", "red"], {
        "--images": ["0", "1", "-1", "x", "1000000000"],
        "--seeds": ["-1 0", "0 x", f"0 {2**63}"],
        "--steps": ["0", "-1", "1000000", "x"],
        "--guidance": ["nan", "inf", "x"],
        "--output": ["a.jpg", "text.txt/a.png", "x" * 300 + ".png"],
    }),
    "generate": (["fox"], {
        "--lora": ["none", "text.txt", "style.safetensors:nan", "style.safetensors:1e400", ":", "", "word.safetensors"],
        "--textual-inversion": ["none", "text.txt", "", "style.safetensors"],
        "--like": ["none", "text.txt", "start.png"],
        "--prompts": ["none", "text.png", "start.png"],
        "--output": ["text.txt/x.png", "x" * 300 + ".png", "x" * 300 + "/"],
    }),
}  # fmt: skip


def bad_command(command: str, options: dict[str, str]) -> list[str]:
    """The words of a command with these options, in place of those that it is given."""
    words, usual = [*command.split(" ")], [*COMMANDS[command][0]]
    for name, value in options.items():
        if name in usual:
            del usual[usual.index(name) : usual.index(name) + 2]
        several = name in ("--mixture", "--seeds") and " " in value
        words += [*([name] if name else []), *(value.split() if several else [value])]
    return [*words, *usual]


def test_every_bad_option_of_the_other_commands(desk: Path, tally: Counter[str]) -> None:
    for command, (_, options) in COMMANDS.items():
        for name, values in options.items():
            for value in values:
                assert_refused(desk, bad_command(command, {name: value}), codes=(1, 2))
                tally["refused"] += 1


@st.composite
def bad_commands(draw: st.DrawFn) -> list[str]:
    """One of the other commands, with one to three bad options."""
    command = draw(st.sampled_from(list(COMMANDS)))
    options = COMMANDS[command][1]
    names = draw(st.lists(st.sampled_from(list(options)), min_size=1, max_size=3, unique=True))
    return bad_command(command, {name: draw(st.sampled_from(options[name])) for name in names})


@hunt(0.08, 20)
@given(arguments=bad_commands())
def test_bad_options_together(desk: Path, tally: Counter[str], arguments: list[str]) -> None:
    assert_refused(desk, arguments, codes=(1, 2))
    tally["refused"] += 1


@hunt(0.003, 2)
@given(arguments=bad_commands())
def test_bad_options_in_a_process_of_its_own(desk: Path, tally: Counter[str], arguments: list[str]) -> None:
    def fresh(words: list[str]) -> tuple[int, str, str]:
        environment = os.environ | {"PYTHONPATH": str(Path(minisd.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-m", "minisd", *words], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    if any("\0" in word for word in arguments):  # which the operating system takes from nobody
        return
    assert_refused(desk, arguments, fresh, codes=(1, 2))
    tally["refused"] += 1


# The lines of a prompts file.
LINES: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["fox", "", "🦊"], [5, None, ["fox"], "\ud800", "fox\0", "fox " * 10_000, "(fox:nan)", True, {}]),
    "negative_prompt": (["", "red"], [5, ["red"], "\udc00", True, {}, "(red:99)"]),
    "seed": ([0, 7, 2**63 - 3], ["5", 5.0, True, -1, 2**63, 2**70, [1], {}]),
    "num_inference_steps": ([1, 2], [0, -1, 1001, 10**6, 1.5, "3", True, [3]]),
    "guidance_scale": ([1, 7.5], [NAN, INF, "7", True, [7], 1e30, 10**400]),
    "guidance_rescale": ([0, 0.5], [-1, 2, NAN, "x", True]),
    "sampler": (["ddim", "heun"], ["magic", "", 5, True, ["ddim"]]),
    "width": ([32, 24], [0, -8, 33, 520, 10**6, 32.5, "32", True]),
    "height": ([32, 24], [0, -8, 33, 520, 10**6, 32.5, "32", True]),
    "clip_skip": ([1], [0, 2, -1, "1", 1.5]),
    "images": ([1, 2], [0, -1, "2", 1.5, True, 10**9]),
    "name": (
        ["fox", "a b", "狐"],
        ["../fox", "/fox", "a/b", "", ".", "..", ".x", "nul", "x" * 300, 5, "a\0b", "\ud800"],
    ),
}


@hunt(0.1, 25)
@given(data=st.data())
def test_a_prompts_file_is_drawn_or_its_bad_line_named(desk: Path, tally: Counter[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), label="lines")
    more = st.lists(st.sampled_from(list(LINES)), max_size=4)
    keys = [list(dict.fromkeys(["prompt", *data.draw(more, label="keys")])) for _ in range(count)]
    wrong = data.draw(st.integers(0, count), label="wrong line")  # 0: none
    spoilt = data.draw(st.sampled_from(keys[wrong - 1]), label="wrong key") if wrong else ""
    lines = [
        {key: data.draw(st.sampled_from(LINES[key][number == wrong and key == spoilt]), label=key) for key in given}
        for number, given in enumerate(keys, start=1)
    ]
    for number, line in enumerate(lines, start=1):
        if "name" in line and (number, spoilt) != (wrong, "name"):
            line["name"] += f" {number}"  # no name twice
    shutil.rmtree(desk / "many", ignore_errors=True)
    (desk / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["generate", "--prompts", "many.jsonl", "--output", "many/"]
    if wrong:
        assert_refused(desk, arguments)
        assert f"many.jsonl, line {wrong}" in run(arguments)[2]
        tally["refused"] += 1
        return
    code, out, err = run(arguments)
    assert code == 0 and len(out.splitlines()) == sum(line.get("images", 1) for line in lines), err
    tally["whole"] += 1
